"""Layers share a budget by their scores, within a floor and a cap."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rowscope import Budget, InputError, criterion, scoring, select, trace
from rowscope.records import LayerScores, ScoreTable
from rowscope.scoring.allocation import allocate
from rowscope.scoring.layer_scores import from_rows

BLOCKS = ("model.layers.0", "model.layers.1")


@pytest.fixture
def table(tiny_llama) -> ScoreTable:
    return scoring.score(tiny_llama, criterion("magnitude"), model_source="tiny", model_fingerprint="f" * 64)


layers = st.lists(
    st.tuples(st.integers(1, 10**6), st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(1, 8)),
    min_size=1,
    max_size=9,
)


@given(layers, st.floats(0, 1), st.floats(1, 6))
def test_allocation_is_proportional_within_its_bounds(layers, floor, cap):
    """Guards water-filling: the sum is kept, bounds hold, and between the bounds scores decide."""
    even, scores, room = zip(*layers, strict=True)
    capacities = [own * times for own, times in zip(even, room, strict=True)]
    if not any(scores):
        with pytest.raises(InputError, match="all layer scores are 0"):
            allocate(even, scores, capacities, floor, cap)
        return
    found = allocate(even, scores, capacities, floor, cap)
    high = [min(Fraction(cap) * own, most) for own, most in zip(even, capacities, strict=True)]
    low = [min(Fraction(floor) * own, most) for own, most in zip(even, high, strict=True)]
    assert sum(found) == min(sum(even), sum(high)), "not a weight is lost"
    assert all(least <= own <= most for least, own, most in zip(low, found, high, strict=True))
    free = {
        own / Fraction(score)
        for own, score, least, most in zip(found, scores, low, high, strict=True)
        if score and least < own < most
    }
    assert len(free) <= 1
    rate = free.pop() if free else None
    for own, score, least, most in zip(found, scores, low, high, strict=True):
        if rate is not None and score:
            assert own == max(least, min(most, rate * Fraction(score)))


def test_allocation_by_hand():
    """Guards the numbers: inside the bounds in proportion, beyond them at the bound, the rest shared again."""
    assert allocate([100] * 4, [1, 2, 3, 4], [10**6] * 4) == [40, 80, 120, 160]
    assert allocate([100] * 4, [0, 1, 1, 2], [10**6] * 4) == [25, 93.75, 93.75, 187.5]
    assert allocate([100] * 4, [1, 0, 0, 0], [10**6] * 4, cap=2) == [200, Fraction(200, 3)] + [Fraction(200, 3)] * 2
    assert allocate([100] * 4, [8, 1, 1, 1], [120] * 4) == [120, Fraction(280, 3)] + [Fraction(280, 3)] * 2


def spent(selection) -> dict[str, int]:
    """Trained weights by block."""
    return {
        block: sum(
            index.numel() * selection.shapes[module][1 if axis == "row" else 0]
            for module, axes in selection.indices.items()
            for axis, index in axes.items()
            if module.startswith(block)
        )
        for block in BLOCKS
    }


@pytest.mark.parametrize("scope", ["layer", "global", "coupled", "coupled-global"])
@pytest.mark.parametrize("budget", ["params=6K", "rank=6", "lora=3", "memory=100KiB", "ratio=0.1"])
def test_layers_get_their_part(tiny_llama, table, scope, budget):
    """Guards --layer-scores with every scope and budget: three times the score, three times the weights."""
    given = LayerScores(dict(zip(BLOCKS, (1.0, 3.0), strict=True)), "by hand", model_fingerprint="f" * 64)
    groups = trace(tiny_llama).groups
    even = select(table, Budget.parse(budget), scope=scope, groups=groups).trainable_parameters()
    selection = select(table, Budget.parse(budget), scope=scope, groups=groups, layer_scores=given)
    first, second = spent(selection).values()
    assert selection.trainable_parameters() <= even + 240, "never more, but for what rounding left"
    assert even / 4 - 240 < first <= even / 4 + 60
    assert even * 3 / 4 - 240 < second <= even * 3 / 4 + 180
    assert selection.origin["layer_scores"] == "by hand from 0.25 to 4 times even"


def test_layer_scores_from_rows(table):
    """Guards the sum of a layer's rows, and that it is the sum of its columns for magnitudes."""
    found = from_rows(table)
    for block in BLOCKS:
        expected = sum(float(axes["row"].sum()) for module, axes in table.scores.items() if module.startswith(block))
        assert found.scores[block] == pytest.approx(expected)
        assert from_rows(table, "column").scores[block] == pytest.approx(expected, rel=1e-5)
    assert (found.criterion, found.model_source) == ("rows:magnitude", "tiny")
    rows = {module: {"row": axes["row"]} for module, axes in table.scores.items()}
    with pytest.raises(InputError, match="sum its rows instead"):
        from_rows(ScoreTable(rows, rows, table.provenance), "column")


def test_layer_scores_that_do_not_fit(table):
    """Guards against scores of another model, and against layers without one."""
    with pytest.raises(InputError, match="of another model"):
        select(table, Budget("rank", 2), layer_scores=LayerScores(dict.fromkeys(BLOCKS, 1.0), "x", "", "0" * 64))
    with pytest.raises(InputError, match=r"none for model\.layers\.1"):
        select(table, Budget("rank", 2), layer_scores=LayerScores({BLOCKS[0]: 1.0}, "x"))
    for budget in (Budget("memory", 10), Budget("params", 40)):
        with pytest.raises(InputError, match="smaller than one unit"):
            select(table, budget, layer_scores=LayerScores(dict.fromkeys(BLOCKS, 1.0), "x"))
    with pytest.raises(InputError, match="all layer scores are 0"):
        select(table, Budget("rank", 2), layer_scores=LayerScores(dict.fromkeys(BLOCKS, 0.0), "x"))


def test_what_is_in_no_layer_keeps_its_own(tiny_llama):
    """Guards heads and embeddings: they have no layer score, and what the budget says of them stays."""
    table = scoring.score(tiny_llama, criterion("magnitude"), target_modules=["lm_head", "up_proj"])
    given = LayerScores(dict(zip(BLOCKS, (1.0, 3.0), strict=True)), "by hand")
    selection = select(table, Budget("rank", 8), layer_scores=given)
    counts = {module: axes["row"].numel() for module, axes in selection.indices.items()}
    assert counts == {"model.layers.0.mlp.up_proj": 4, "model.layers.1.mlp.up_proj": 12, "lm_head": 8}


names = st.text(min_size=1, max_size=12)
numbers = st.floats(0, 1e300)


@given(st.dictionaries(names, numbers, min_size=1, max_size=6), names, st.integers(0, 2**32 - 1))
def test_layer_scores_round_trip(tmp_path_factory, scores, criterion, seed):
    """Guards layer_scores.json: every number and all provenance come back."""
    path = tmp_path_factory.mktemp("layers") / "l.json"
    written = LayerScores(
        scores, criterion, "demo", "f" * 64, "d", "e" * 64, seed, 3, 4, dict(list(scores.items())[:1])
    )
    written.save(path)
    assert LayerScores.load(path) == written


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "holds no layer scores"),
        ({"kind": "layer_scores"}, "is damaged"),
        ({"kind": "layer_scores", "scores": {"a": 1}}, "is damaged"),
        ({"kind": "layer_scores", "criterion": "x", "scores": {}}, "there are no layer scores"),
        ({"kind": "layer_scores", "criterion": "x", "scores": [1]}, "is damaged"),
        ({"kind": "layer_scores", "criterion": "x", "scores": {"a": "much"}}, "is damaged"),
        ({"kind": "layer_scores", "criterion": "x", "scores": {"a": -1}}, "'a' has -1.0"),
        ({"kind": "layer_scores", "criterion": "x", "scores": {"a": math.nan}}, "'a' has nan"),
        ({"kind": "layer_scores", "criterion": "x", "scores": {"a": 1}, "noise": {"b": 1}}, "'b' has 1.0"),
        ({"kind": "layer_scores", "criterion": "x", "scores": {"a": 1}, "format_version": 99}, "upgrade rowscope"),
    ],
)
def test_damaged_layer_scores(tmp_path, value, message):
    """Guards hand-edited layer scores: one line says what is wrong."""
    (tmp_path / "l.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        LayerScores.load(tmp_path / "l.json")


def test_equal_layer_scores_change_nothing(table):
    """Guards the starting point: equal scores of equal layers are no scores."""
    without = select(table, Budget("rank", 5))
    given = LayerScores(dict.fromkeys(BLOCKS, 2.5), "x")
    with_scores = select(table, Budget("rank", 5), layer_scores=given)
    for module, axes in without.indices.items():
        assert torch.equal(with_scores.indices[module]["row"], axes["row"])
