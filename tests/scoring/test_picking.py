"""Three ways to pick and a control: each does what its name says, and the same at the same seed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from rowscope import Budget, InputError, criterion, scoring, select
from rowscope.scoring.groups import ScoredMember
from rowscope.scoring.picking import diverse, picked, sample, shuffle, top
from rowscope.scoring.vectors import lines, unit_vectors, weight_matrices
from rowscope.scoring.weights import view

WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0, 0.0])


def test_samples_are_proportional_to_scores():
    """Guards 'sample': pairs come as often as drawing one after the other, by score, without putting back."""
    generator = np.random.default_rng(7)
    p = WEIGHTS[:4] / WEIGHTS.sum()
    pairs = list(itertools.combinations(range(4), 2))
    expected = [p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs]
    draws = 6000
    seen = dict.fromkeys(pairs, 0)
    for _ in range(draws):
        order = sample(WEIGHTS, generator)
        assert order[-1] == 4, "what has no score comes last"
        seen[tuple(sorted(order[:2].tolist()))] += 1
    assert chisquare(list(seen.values()), draws * np.array(expected)).pvalue > 0.01


def test_random_ignores_scores():
    """Guards the control: every unit comes first equally often."""
    generator = np.random.default_rng(3)
    first = [shuffle(WEIGHTS, generator)[0] for _ in range(5000)]
    assert chisquare(np.bincount(first, minlength=5)).pvalue > 0.01


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 40), st.integers(0, 9))
def test_every_way_picks_as_many_as_wanted(scores, count, seed):
    """Guards all ways, also where scores are 0 or equal: so many different units, ascending, the same at one seed."""
    scores = np.array(scores)
    vectors = torch.randn(len(scores), 3, dtype=torch.float64) * torch.from_numpy(scores).sqrt().unsqueeze(1)
    for way in ("top", "sample", "diverse", "random"):
        first, second = (picked(way, scores, count, np.random.default_rng(seed), vectors).tolist() for _ in range(2))
        assert first == second == sorted(set(first))
        assert len(first) == min(count, len(scores))


def duplicated() -> nn.Sequential:
    """A layer with five different rows, the two largest of them three times each."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 9)
    rows = torch.randn(5, 40) * torch.tensor([3.0, 2.5, 1.0, 0.9, 0.8]).unsqueeze(1)
    layer.weight.data = rows[[0, 0, 0, 1, 1, 1, 2, 3, 4]]
    return nn.Sequential(layer)


def test_diverse_leaves_out_duplicates():
    """Guards 'diverse': of rows that are there three times one is taken; 'top' takes them all."""
    model = duplicated()
    table = scoring.score(model, criterion("magnitude"))
    found = {
        way: select(table, Budget("rank", 5), pick=way, vectors=weight_matrices(model)).indices["0"]["row"].tolist()
        for way in ("top", "diverse")
    }
    assert found["top"] == [0, 1, 2, 3, 4]
    assert found["diverse"] == [0, 3, 6, 7, 8]
    more = select(table, Budget("rank", 7), pick="diverse", vectors=weight_matrices(model)).indices["0"]["row"]
    assert set(found["diverse"]) < set(more.tolist()), "where no direction is left, the largest follow"
    with pytest.raises(InputError, match="vectors=weight_matrices"):
        select(table, Budget("rank", 5), pick="diverse")


def test_diverse_equals_greedy_projection():
    """Guards the pivots: each is the vector with most left after the earlier ones are projected out, done by hand."""
    vectors = np.random.default_rng(5).standard_normal((12, 6))
    left, expected = vectors.copy(), []
    for _ in range(5):
        pivot = int(np.linalg.norm(left, axis=1).argmax())
        expected.append(pivot)
        direction = left[pivot] / np.linalg.norm(left[pivot])
        left -= np.outer(left @ direction, direction)
    found = diverse(np.ones(12), torch.from_numpy(vectors), 5)
    assert found.tolist() == expected


def test_unit_vectors():
    """Guards what 'diverse' compares: squared norms are scores, members count alike, sketches keep both."""
    random = np.random.default_rng(1)
    scores = random.exponential(size=6)
    torch.manual_seed(0)
    weights = {"a": torch.randn(6, 4), "b": 1000 * torch.randn(12, 3)}
    members = [
        ScoredMember("a", "row", torch.arange(6).unsqueeze(1)),
        ScoredMember("b", "column", torch.arange(12).view(6, 2)),
    ]
    exact = unit_vectors(members, scores, 1, lambda module, axis: weights[module], random)
    assert exact.shape == (6, 10)
    torch.testing.assert_close(exact.square().sum(1), torch.from_numpy(scores))
    parts = torch.cat([weights["a"] / weights["a"].norm(), weights["b"].view(6, 6) / weights["b"].norm()], 1).double()
    torch.testing.assert_close(nn.functional.cosine_similarity(exact, parts), torch.ones(6, dtype=torch.float64))
    weights = {"a": torch.randn(6, 5000)}
    whole = weights["a"].double() @ weights["a"].double().T
    norms = whole.diagonal().sqrt()
    sketch = unit_vectors(members[:1], norms.square().numpy(), 1000, lambda module, axis: weights[module], random)
    assert sketch.shape == (6, 2016)
    error = (sketch @ sketch.T - whole) / torch.outer(norms, norms)
    assert error.abs().max() < 5 / 2016**0.5


def test_lines_of_every_layer():
    """Guards rows and columns of transposed layers and convolutions: their norms are those the score table keeps."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    for layer in (
        nn.Linear(5, 3),
        Conv1D(6, 4),
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, (3, 1), groups=2),
        nn.Embedding(9, 4),
    ):
        weight = view("layer", layer)
        norms = weight.reduce(weight.values().square(), torch.sqrt)
        for axis, units in (("row", weight.out_features), ("column", weight.in_features)):
            found = lines(weight, axis)
            assert found.shape == (units, weight.numel // units)
            torch.testing.assert_close(found.norm(dim=1), norms[axis])


def test_top_keeps_the_order_of_equals():
    """Guards determinism: equal scores are taken from the first on."""
    assert top(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]
