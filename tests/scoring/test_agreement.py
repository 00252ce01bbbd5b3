"""Agreement of rankings against computations of its own: ranks by counting, pairs by enumeration."""

import itertools
import math
import statistics

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rowscope import InputError, ScoreTable
from rowscope.records import Provenance
from rowscope.scoring import agreement as measures

SHAPES = {"blocks.0.up": (40, 30), "blocks.0.down": (30, 40), "blocks.1.up": (40, 30)}
few_values = st.lists(st.integers(0, 6), min_size=2, max_size=12)
pairs = few_values.flatmap(
    lambda first: st.lists(st.integers(0, 6), min_size=len(first), max_size=len(first)).map(lambda b: (first, b))
)


def ranks(values):
    """Rank by counting: how many are smaller, and half of those that are equal."""
    return [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def pearson(a, b):
    a, b = (numpy.array(values, dtype=float) for values in (a, b))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return (a @ b) / scale if scale else 0.0


def spearman(a, b):
    return pearson(ranks(a), ranks(b))


def kendall(a, b):
    """Tau-b by enumerating all pairs."""
    signs = [(numpy.sign(a[i] - a[j]), numpy.sign(b[i] - b[j])) for i, j in itertools.combinations(range(len(a)), 2)]
    together = sum(x * y for x, y in signs)
    scale = math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    return together / scale if scale else 0.0


def partial(a, b, norm):
    """The textbook formula from three correlations."""
    ab, an, bn = spearman(a, b), spearman(a, norm), spearman(b, norm)
    return (ab - an * bn) / math.sqrt((1 - an**2) * (1 - bn**2))


def table(seed, share=0.5, axes=("row", "column"), modules=SHAPES, **provenance):
    """Random scores that share a factor, the weight norm, with all other tables."""
    scores, norms, halves = {}, {}, ({}, {})
    for number, name in enumerate(modules):
        for axis, size in zip(("row", "column"), SHAPES[name], strict=True):
            if axis not in axes:
                continue
            norm = numpy.random.default_rng(number).lognormal(0, 1, size)
            random = numpy.random.default_rng(100 * seed + number)
            own = random.lognormal(0, 1, size)
            value = 10**number * norm**share * own
            scores.setdefault(name, {})[axis] = torch.tensor(value, dtype=torch.float32)
            norms.setdefault(name, {})[axis] = torch.tensor(norm, dtype=torch.float32)
            for half in halves:
                noisy = value * random.lognormal(0, 0.7, size)
                half.setdefault(name, {})[axis] = torch.tensor(noisy, dtype=torch.float32)
    known = {"criterion": "taylor", "model_source": "demo", "model_fingerprint": "f" * 64, "shapes": SHAPES}
    origin = Provenance(**{**known, **provenance}, layers=["blocks.0", "blocks.1"], dtypes={})
    return ScoreTable(scores, norms, origin, halves)


def numbers(tensor):
    return tensor.double().tolist()


@given(pairs)
def test_correlations_count_ties(pair):
    """Guards Spearman and Kendall's tau-b, ties and constant rankings included, against counting."""
    a, b = (numpy.array(values, dtype=float) for values in pair)
    assert measures.spearman(a, b) == pytest.approx(spearman(*pair), abs=1e-9)
    assert measures.kendall(a, b) == pytest.approx(kendall(*pair), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(4, 40))
def test_the_norm_is_partialled_out(seed, size):
    """Guards partial Spearman against the formula of three correlations, which it equals but does not use."""
    a, b, norm = numpy.random.default_rng(seed).lognormal(size=(3, size))
    if max(abs(spearman(a, norm)), abs(spearman(b, norm))) < 0.999:
        assert measures.partial_spearman(a, b, norm) == pytest.approx(partial(a, b, norm), abs=1e-9)
    assert measures.partial_spearman(a, norm, norm) == 0.0


@given(st.integers(0, 10**6), st.sampled_from(["spearman", "kendall", "partial_spearman", "top_overlap"]))
def test_only_ranks_count(seed, name):
    """Guards what a ranking is: a monotone change of the scores changes no measure, nor does swapping the two."""
    a, b, norm = numpy.random.default_rng(seed).lognormal(size=(3, 25))
    rest = (norm,) if name == "partial_spearman" else ()
    measure = getattr(measures, name)
    assert measure(a, b, *rest) == pytest.approx(measure(a**3, numpy.log(b), *rest), abs=1e-12)
    assert measure(a, b, *rest) == pytest.approx(measure(b, a, *rest), abs=1e-12)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_agreement_of_two_tables(axis):
    """Guards every figure of a pair: per module, the medians, and all modules' rows divided by their means."""
    a, b = table(1), table(2)
    found = measures.agreement(a, b, axis)
    assert list(found.modules) == list(SHAPES)
    columns = []
    for name, values in found.modules.items():
        first, second, norm = (numbers(source[name][axis]) for source in (a.scores, b.scores, a.weight_norm))
        columns.append([[x / statistics.fmean(values) for x in values] for values in (first, second, norm)])
        assert_measures(values, first, second, norm)
    for name in ("spearman", "kendall", "partial", "overlap"):
        middle = statistics.median(getattr(values, name) for values in found.modules.values())
        assert getattr(found.median, name) == middle
    assert_measures(found.overall, *(list(itertools.chain(*parts)) for parts in zip(*columns, strict=True)))


def assert_measures(values, first, second, norm):
    assert values.spearman == pytest.approx(spearman(first, second), abs=1e-9)
    assert values.kendall == pytest.approx(kendall(first, second), abs=1e-9)
    assert values.partial == pytest.approx(partial(first, second, norm), abs=1e-9)
    count = round(len(first) / 10)
    best = [set(sorted(range(len(first)), key=lambda i: -scores[i])[:count]) for scores in (first, second)]
    assert values.overlap == len(best[0] & best[1]) / count


def test_a_table_agrees_with_itself():
    """Guards the ends of the scales: full agreement is 1 in every measure."""
    found = measures.agreement(table(1), table(1), "row")
    for values in (found.median, found.overall, *found.modules.values()):
        assert values == measures.Measures(*[pytest.approx(1.0)] * 4)


def test_scores_that_are_no_numbers_are_left_out():
    """Guards rankings against NaN: the row is left out of both tables, and of nothing else."""
    a, b = table(1), table(2)
    name = "blocks.0.up"
    b.scores[name]["row"][3] = float("nan")
    b.scores["blocks.1.up"]["row"][:] = float("inf")
    found = measures.agreement(a, b, "row")
    keep = [number for number in range(40) if number != 3]
    rows = [numbers(source.scores[name]["row"][keep]) for source in (a, b)]
    assert found.modules[name].spearman == pytest.approx(spearman(*rows))
    assert found.modules["blocks.1.up"] == measures.Measures(0.0, 0.0, 0.0, 0.0)
    assert all(map(math.isfinite, vars(found.overall).values()))


@pytest.mark.parametrize("beyond", [False, True])
def test_split_half(beyond):
    """Guards Spearman-Brown over the halves' correlations, plain and beyond the norm, the median over modules."""
    scored = table(1)
    expected = []
    for name in SHAPES:
        first, second, norm = (numbers(source[name]["row"]) for source in (*scored.halves, scored.weight_norm))
        r = partial(first, second, norm) if beyond else spearman(first, second)
        expected.append(2 * r / (1 + r) if r > 0 else r)
    found = measures.split_half(scored, "row", beyond_norm=beyond)
    assert found == pytest.approx(statistics.median(expected), abs=1e-9)


def test_noise_times_weights_is_stable_only_by_the_norm():
    """Guards the trap of a stable ranking: halves that share nothing but the norm agree, and not beyond it."""
    halves = [table(seed, share=4.0) for seed in (1, 2)]
    scored = ScoreTable(
        halves[0].scores, halves[0].weight_norm, halves[0].provenance, (halves[0].scores, halves[1].scores)
    )
    assert measures.split_half(scored, "row") > 0.9
    assert abs(measures.split_half(scored, "row", beyond_norm=True)) < 0.4


def test_tables_without_halves_or_axis():
    """Guards tables that kept less: no halves and no axis mean not known, never a number."""
    rows = table(1, axes=("row",))
    assert measures.split_half(rows, "column") is None
    assert measures.norm_agreement(rows, "column") is None
    assert measures.split_half(ScoreTable(rows.scores, rows.weight_norm, rows.provenance), "row") is None
    assert measures.norm_agreement(rows, "row") == pytest.approx(
        statistics.median(
            spearman(numbers(rows.scores[name]["row"]), numbers(rows.weight_norm[name]["row"])) for name in SHAPES
        )
    )


def test_what_cannot_be_compared():
    """Guards against comparing rows that are not the same rows: one line says why."""
    rows = table(1, axes=("row",))
    with pytest.raises(InputError, match="have no column scores in common"):
        measures.agreement(rows, table(2), "column")
    with pytest.raises(InputError, match="have no row scores in common"):
        measures.agreement(table(1, modules=["blocks.0.up"]), table(2, modules=["blocks.1.up"]), "row")
    with pytest.raises(InputError, match="belong to different models"):
        measures.agreement(rows, table(2, model_fingerprint="e" * 64), "row")
    other = table(2, modules=["blocks.1.up"], shapes={**SHAPES, "blocks.0.up": (41, 30)})
    with pytest.raises(InputError, match="belong to different models"):
        measures.agreement(rows, other, "row")


def test_common_modules_are_compared():
    """Guards tables of other modules (--target-modules): what both have is compared."""
    found = measures.agreement(table(1), table(2, modules=["blocks.1.up", "blocks.0.up"]), "row")
    assert list(found.modules) == ["blocks.0.up", "blocks.1.up"]
