"""Ways to pick k of n scored units: the largest, a sample, a diverse set, or any."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from .competition import Floats

Order = NDArray[np.intp]


def top(scores: Floats) -> Order:
    """From the largest score down; equal ones in their own order."""
    return np.argsort(-scores, kind="stable")


def sample(scores: Floats, generator: np.random.Generator) -> Order:
    """Draw one after the other without putting back, each with probability proportional to its score.

    Units of score 0 come last, in random order. By the exponential keys of Efraimidis and Spirakis (Information
    Processing Letters 97, 2006): ``log(u) / score`` with u uniform, largest first.
    """
    keys = np.full(len(scores), -np.inf)
    with np.errstate(over="ignore"):  # of a score next to nothing the key is minus infinity, as of none
        np.divide(-generator.exponential(size=len(scores)), scores, out=keys, where=scores > 0)
    return np.lexsort((generator.random(len(scores)), -keys))


def shuffle(scores: Floats, generator: np.random.Generator) -> Order:
    """Any order, whatever the scores: the control."""
    return generator.permutation(len(scores))


def diverse(scores: Floats, vectors: Tensor, count: int) -> Order:
    """The first `count` pivots of a QR decomposition with column pivoting, one of each direction that matters.

    A pivot is the unit whose vector has most left after the directions of the earlier pivots are taken out (Businger
    and Golub 1965; as column subset selection in Boutsidis et al. 2009). Where the vectors have fewer than `count`
    directions, the rest are the largest scores.

    Args:
        scores: ``(units,)``.
        vectors: float64 ``(units, dims)``; the squared norm of each is the unit's score, see
            :func:`rowscope.scoring.vectors.unit_vectors`.
        count: how many are wanted.
    """
    triangle, pivots = scipy.linalg.qr(vectors.numpy().T, mode="r", pivoting=True)
    left = np.abs(np.diagonal(triangle))
    noise = np.finfo(np.float64).eps * max(vectors.shape) * left[0]
    order = pivots[: min(count, int((left > noise).sum()))]
    rest = top(scores)
    return np.concatenate([order, rest[~np.isin(rest, order)]])[:count]


def picked(way: str, scores: Floats, count: int, generator: np.random.Generator, vectors: Tensor | None) -> Tensor:
    """Indices of the `count` units that `way` picks, int64, ascending."""
    if way == "diverse" and vectors is not None:
        chosen = diverse(scores, vectors, count)
    elif way == "sample":
        chosen = sample(scores, generator)[:count]
    elif way == "random":
        chosen = shuffle(scores, generator)[:count]
    else:
        chosen = top(scores)[:count]
    return torch.from_numpy(np.sort(chosen))
