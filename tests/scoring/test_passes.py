"""The budget of forward passes: never overspent, and refused with a number that suffices."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rowscope import InputError
from rowscope.scoring.passes import FEWEST, MOST, OWNER_PROBES, Costs

COSTS = st.integers(1, 10**9)
BATCHES = st.integers(1, 12)
WEIGHTS = st.integers(1, 900)


def cost_of(plan, costs: Costs, weights: int) -> float:
    """What the plan's parts come to, counted part by part."""
    block = costs.within / (costs.within + costs.outside)
    head = 1 - block
    heads = (
        OWNER_PROBES + 1 if plan.feature_probes else 0
    )  # the positions, and one run to see that the head can be run
    total = 1.0  # costs are counted
    for _ in range(plan.batches):  # looked at by the head, for the activations, and by the blocks' first run
        total += 2 + (1 if plan.feature_probes else 0)
        total += head * (heads + plan.feature_probes) + block * (plan.probes + weights + 1)
    for _ in range(plan.others):
        total += 1 + (1 if plan.feature_probes else 0) + head * heads
    return total


@given(within=COSTS, outside=st.integers(0, 10**9), batches=BATCHES, passes=st.integers(4, 20000), weights=WEIGHTS)
def test_never_overspends(within, outside, batches, passes, weights):
    """Guards the promise of `passes`: a plan's parts, added up, cost no more, and it has a batch for each."""
    costs = Costs(within, outside)
    try:
        plan = costs.plan(passes, batches, weights)
    except InputError:
        assume(False)
    assert cost_of(plan, costs, weights) <= passes + 1e-6
    assert cost_of(plan, costs, weights) <= plan.spent + 1e-6
    assert plan.spent <= passes
    assert FEWEST <= plan.probes <= MOST
    assert 1 <= plan.batches <= plan.batches + plan.others <= batches


@given(within=COSTS, outside=st.integers(0, 10**9), batches=BATCHES, passes=st.integers(4, 2000), weights=WEIGHTS)
def test_too_few_passes(within, outside, batches, passes, weights):
    """Guards the refusal: the number it names suffices, as does all beyond, and two less does not."""
    costs = Costs(within, outside)
    with_message = None
    try:
        costs.plan(passes, batches, weights)
    except InputError as error:
        with_message = str(error)
    assume(with_message is not None)
    found = re.fullmatch(
        rf"criterion zo-taylor: passes={passes} do not suffice here: use at least (\d+)", with_message
    )
    least = int(found[1])
    assert least > passes
    assert least % 2 == 0  # odd numbers are refused
    for more in (0, 2, 10, 1000):
        assert costs.plan(least + more, batches, weights).spent <= least + more
    with pytest.raises(InputError, match="do not suffice"):
        costs.plan(least - 2, batches, weights)


@given(outside=st.integers(0, 10**6), weights=st.integers(1, 30))
def test_more_passes_buy_more(outside, weights):
    """Guards that passes are worth their price: more of them never mean fewer probes in all, and most are spent."""
    costs = Costs(10**6, outside)
    plans = [costs.plan(passes, 8, weights) for passes in (256, 512, 1024, 2048)]
    probes = [plan.batches * plan.probes for plan in plans]
    assert probes == sorted(probes)
    assert plans[0].spent >= 0.9 * 256


def test_many_weights_in_a_block():
    """Guards blocks of many experts, where a second batch cannot be paid for and the first has all it may have."""
    plan = Costs(100, 0).plan(1200, 8, 600)
    assert (plan.batches, plan.probes) == (1, MOST)


def test_blocks_that_do_not_run():
    """Guards against dividing by the cost of blocks that no pass comes through."""
    with pytest.raises(InputError, match="no layer of the model's blocks has run"):
        Costs(0, 10).plan(512, 4, 7)
