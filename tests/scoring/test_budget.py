"""A budget is what it says, is never exceeded, and a competition for it is won by the best."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from rowscope import Budget, InputError, criterion, scoring, trace
from rowscope.models import linear_modules
from rowscope.scoring.allocation import spread
from rowscope.scoring.budget import Share, trained_state
from rowscope.scoring.competition import best, fill
from rowscope.scoring.units import coupled_families, module_families, shares

shares_lists = st.lists(
    st.builds(Share, st.just("m"), st.integers(1, 300), st.integers(1, 500), st.integers(2, 1000)),
    min_size=1,
    max_size=9,
)
limits = st.one_of(
    st.builds(Budget, st.just("params"), st.integers(1, 10**6)),
    st.builds(Budget, st.just("lora"), st.integers(1, 64)),
    st.builds(Budget, st.just("memory"), st.integers(1, 2 * 10**7)),
)


def limit_of(budget, priced) -> int:
    """What a budget allows, worked out again."""
    if budget.kind == "lora":
        return budget.value * sum(share.lora_cost for share in priced)
    return budget.value if budget.kind == "params" else budget.value // 16


@given(shares_lists, limits)
def test_limits_are_kept_and_used(priced, budget):
    """Guards params, lora and memory: never more, short by less than the cheapest unit, never beyond the model."""
    limit, whole = limit_of(budget, priced), sum(share.units * share.cost for share in priced)
    if limit > whole:
        with pytest.raises(InputError, match="more than all"):
            budget.allowances(priced)
        return
    counts = spread(budget.allowances(priced), priced)
    spent = sum(count * share.cost for count, share in zip(counts, priced, strict=True))
    remaining = [share.cost for count, share in zip(counts, priced, strict=True) if count < share.units]
    assert all(0 <= count <= share.units for count, share in zip(counts, priced, strict=True))
    assert spent <= limit
    assert not remaining or limit - spent < min(remaining)


@given(shares_lists, st.integers(1, 300), st.floats(1e-6, 1))
def test_rank_and_ratio_count_units(priced, rank, ratio):
    """Guards rank and ratio: so many units of each family, the nearest whole number to the share, and at least one."""
    if rank <= max(share.units for share in priced):
        found = spread(Budget("rank", rank).allowances(priced), priced)
        assert found == [min(rank, share.units) for share in priced]
    for count, share in zip(spread(Budget("ratio", ratio).allowances(priced), priced), priced, strict=True):
        assert 1 <= count <= share.units
        assert count == 1 or abs(count - ratio * share.units) <= 0.5 + 1e-9


@given(
    st.one_of(
        st.builds(Budget, st.sampled_from(["rank", "lora", "params", "memory"]), st.integers(1, 10**18)),
        st.builds(Budget, st.just("ratio"), st.floats(1e-9, 1)),
    )
)
def test_budgets_are_read_as_written(budget):
    """Guards the record of a selection: what is spelled there is the same budget again."""
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("params=80M", 80_000_000),
        ("params=1.5k", 1500),
        ("params=7B", 7 * 10**9),
        ("params=12345", 12345),
        ("memory=24GiB", 24 * 2**30),
        ("memory=0.5KiB", 512),
        ("memory=3MiB", 3 * 2**20),
        ("ratio=0.02", 0.02),
        ("rank=64", 64),
    ],
)
def test_suffixes(text, value):
    """Guards the spelling of large budgets: K, M and B are decimal, KiB, MiB and GiB binary."""
    assert Budget.parse(text).value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=0", "trains nothing"),
        ("rank=-3", "trains nothing"),
        ("ratio=0", "trains nothing: use a share above 0"),
        ("ratio=-0.1", "trains nothing"),
        ("ratio=nan", "write a number, e.g. ratio=0.02"),
        ("ratio=1.01", "more than the whole model"),
        ("ratio=2%", "write a number"),
        ("params=0K", "trains nothing"),
        ("params=0.5", "write a whole number, e.g. params=80M"),
        ("params=80G", "write a whole number"),
        ("params=inf", "write a whole number"),
        ("params=1e999999999", "write a whole number"),
        ("memory=24GB", "e.g. memory=24GiB"),
        ("memory=nanGiB", "write a whole number"),
        ("lora=2.5", "write a whole number, e.g. lora=16"),
        ("lora", "write a whole number"),
        ("rank=" + "9" * 5000, "write a whole number"),
        ("rnak=3", "did you mean 'rank'"),
    ],
)
def test_bad_budgets(text, message):
    """Guards the one-line answers to a wrong budget."""
    with pytest.raises(InputError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(("kind", "value"), [("rank", float("nan")), ("ratio", float("nan")), ("params", 2.5)])
def test_bad_budgets_in_python(kind, value):
    """Guards the same where no text is read."""
    with pytest.raises(InputError, match=kind):
        Budget(kind, value)


def test_memory_is_a_callers_function():
    """Guards the seam for memory prediction: whatever tells bytes of weights decides; by default 16 a weight."""
    assert trained_state(10) == 160
    priced = [Share("m", 100, 7, 1)]
    assert spread(Budget("memory", 16 * 70).allowances(priced), priced) == [10]
    assert spread(Budget("memory", 16 * 70 - 1).allowances(priced), priced) == [9]
    assert spread(Budget("memory", 1000).allowances(priced, lambda weights: 580 + 2 * weights), priced) == [30]
    with pytest.raises(InputError, match="more than all 700 weights"):
        Budget("memory", 10**6).allowances(priced)
    assert sum(Budget("memory", 10).allowances(priced, lambda weights: 580 + 2 * weights)) == 0


def test_the_remainder_goes_to_the_costlier_of_equals():
    """Guards published counts: queries/keys and feed-forward of the demo are rounded down by equal parts, exactly."""
    block = [Share("qk", 32, 1536, 640), Share("vo", 64, 768, 640), Share("mlp", 512, 576, 2112)]
    counts = spread(Budget("lora", 16).allowances(block * 8), block * 8)
    assert counts == [7, 13, 59] + [7, 13, 58] * 7


def lora_parameters(model, rank: int, targets) -> int:
    """What PEFT's own LoRA would train."""
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def test_lora_budget_is_pefts_lora(tiny_llama):
    """Guards comparisons with LoRA: lora=r is exactly what PEFT trains at rank r, whatever the units are."""
    table = scoring.score(tiny_llama, criterion("magnitude"))
    groups = trace(tiny_llama).groups
    families = [module_families(table, axis) for axis in ("row", "column", "auto")]
    families += [coupled_families(table, groups, heads, "mean") for heads in (False, True)]
    allowed = [sum(Budget("lora", 4).allowances(shares(some, table.provenance))) for some in families]
    assert allowed == [lora_parameters(tiny_llama, 4, list(linear_modules(tiny_llama)))] * 5


def test_lora_budget_of_convolutions():
    """Guards the price of a convolution's row, column and LoRA: the kernel counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, (1, 3)))
    table = scoring.score(model, criterion("magnitude"))
    assert table.provenance.unit_cost("0", "row") == 5 * 9
    assert table.provenance.unit_cost("2", "column") == 6 * 3
    allowed = sum(Budget("lora", 2).allowances(shares(module_families(table, "row"), table.provenance)))
    assert allowed == lora_parameters(model, 2, ["0", "2"])


def test_a_fused_weight_has_one_lora():
    """Guards lora= on GPT-2: queries, keys and values are one weight in two groups, its LoRA is paid for once."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=1, n_head=4)).eval()
    table = scoring.score(model, criterion("magnitude"))
    priced = shares(coupled_families(table, trace(model).groups, False, "mean"), table.provenance)
    assert {share.name.rpartition(".")[2] for share in priced} == {"qk", "vo", "mlp"}
    shape = {name.rpartition(".")[2]: sum(shape) for name, shape in table.provenance.shapes.items()}
    assert sum(share.lora_cost for share in priced) == sum(sum(shape) for shape in table.provenance.shapes.values())
    by_name = {share.name.rpartition(".")[2]: share for share in priced}
    assert by_name["qk"].lora_cost == Fraction(2, 3) * shape["c_attn"]


# ---------------------------------------------------------------------------------------------- competition

contests = st.lists(st.tuples(st.integers(0, 50), st.sampled_from([1, 2, 7, 24, 60])), min_size=1, max_size=11)


def optimum(values, costs, budget) -> float:
    """The knapsack's optimum by scipy's mixed integer program."""
    room = LinearConstraint(costs[None], ub=budget)
    result = milp(-values, integrality=np.ones(len(values)), bounds=Bounds(0, 1), constraints=room)
    return -result.fun


@given(contests, st.integers(0, 300))
def test_greedy_is_near_the_optimum(units, budget):
    """Guards the greedy choice against milp: it loses less than the value of the first unit that did not fit."""
    values, costs = (np.array(column) for column in zip(*units, strict=True))
    values = values.astype(float)
    order = np.argsort(-values / costs, kind="stable")
    taken = fill(order, costs, budget)
    assert costs[taken].sum() <= budget
    assert taken.all() or costs[~taken].min() > budget - costs[taken].sum()
    broken = order[np.cumsum(costs[order]) > budget]
    gap = optimum(values, costs, budget) - values[taken].sum()
    assert gap <= 1e-6 if len(broken) == 0 else gap < values[broken[0]] + 1e-6


@given(contests, st.integers(0, 300))
def test_the_best_are_the_best(units, budget):
    """Guards lumps among small units: no other set of units within the budget is worth more, tried one by one."""
    values, costs = (np.array(column) for column in zip(*units, strict=True))
    values = values.astype(float)
    taken = best(values, costs, budget)
    assert costs[taken].sum() <= budget
    assert taken.all() or costs[~taken].min() > budget - costs[taken].sum()
    sets = np.array(list(itertools.product([0, 1], repeat=len(units))))
    assert values[taken].sum() == pytest.approx((sets @ values)[sets @ costs <= budget].max())


def test_large_competitions_are_no_worse_than_greedy():
    """Guards models with more units than the exact program takes: the budget is kept and greedy is the least."""
    random = np.random.default_rng(0)
    costs = random.choice([576, 1152, 24576], 5000)
    values = random.exponential(size=5000) * costs
    for budget in (500, 30_000, 10**6, int(costs.sum())):
        greedy = fill(np.argsort(-values / costs, kind="stable"), costs, budget)
        found = best(values, costs, budget)
        assert costs[found].sum() <= budget
        assert values[found].sum() >= values[greedy].sum()
