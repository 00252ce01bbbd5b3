"""How far two score tables agree, and how much of that is only the size of the weights.

Two criteria can rank rows alike for a dull reason: both grow with the norm of the row. So every agreement is also
given with the weight norm partialled out, and every ranking can be compared with the norm itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import median

import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr

from ..errors import InputError
from ..records import AxisTensors, ScoreTable

TOP_FRACTION = 0.1
Vector = np.ndarray
"""1-D float64: one value per row ``(out_features,)`` or column ``(in_features,)``."""


@dataclass(frozen=True)
class Measures:
    """How far two rankings agree; every value is 0.0 where a ranking is constant.

    Attributes:
        spearman: Spearman's rank correlation, -1 to 1.
        kendall: Kendall's tau-b, -1 to 1: of all pairs of rows, those ordered alike minus those ordered otherwise.
        partial: Spearman with the weight norm partialled out, -1 to 1, see :func:`partial_spearman`.
        overlap: share of the top tenth of one that is in the top tenth of the other, 0 to 1.
    """

    spearman: float
    kendall: float
    partial: float
    overlap: float

    @classmethod
    def of(cls, a: Vector, b: Vector, norm: Vector) -> Measures:
        """Measure two score vectors and the norms of the same rows."""
        return cls(spearman(a, b), kendall(a, b), partial_spearman(a, b, norm), top_overlap(a, b))


@dataclass(frozen=True)
class Agreement:
    """Agreement of two score tables along one axis.

    Attributes:
        axis: ``row`` or ``column``.
        modules: module -> its agreement.
        median: the median over the modules, measure by measure.
        overall: of the rows of all modules in one ranking, each score and norm divided by its module's mean, so that
            modules whose scores are large as numbers do not lead.
    """

    axis: str
    modules: dict[str, Measures]
    median: Measures
    overall: Measures


def agreement(a: ScoreTable, b: ScoreTable, axis: str) -> Agreement:
    """Compare two score tables of one model, on the modules that both have along `axis`.

    Rows whose score is not finite in either table are left out.

    Raises:
        InputError: if the tables belong to different models or have no module in common along `axis`.
    """
    check_same_model(a, b)
    vectors = dict(_common(axis, a.scores, b.scores, a.weight_norm))
    if not vectors:
        raise InputError(
            f"{a.provenance.criterion} and {b.provenance.criterion} have no {axis} scores in common: "
            f"score both along the {axis} axis"
        )
    modules = {module: Measures.of(*entry) for module, entry in vectors.items()}
    names = [name.name for name in fields(Measures)]
    middle = {name: median(getattr(values, name) for values in modules.values()) for name in names}
    pooled = [np.concatenate(parts) for parts in zip(*map(_relative, vectors.values()), strict=True)]
    return Agreement(axis, modules, Measures(**middle), Measures.of(*pooled))


def check_same_model(a: ScoreTable, b: ScoreTable) -> None:
    """Raise an InputError unless both tables are of one model: its fingerprint, and the shapes of common modules."""
    first, second = a.provenance, b.provenance
    common = first.shapes.keys() & second.shapes.keys()
    if first.model_fingerprint != second.model_fingerprint or any(
        first.shapes[module] != second.shapes[module] for module in common
    ):
        raise InputError(
            f"scores of {first.model_source} and of {second.model_source} belong to different models: "
            "compare score tables of one model"
        )


def split_half(table: ScoreTable, axis: str, beyond_norm: bool = False) -> float | None:
    """Reliability of a table: Spearman between its two halves, Spearman-Brown corrected, median over modules.

    Each half sees half the data, so its ranking is noisier than the whole table's. The Spearman-Brown formula
    ``2r / (1 + r)`` estimates the reliability of the whole (Spearman 1910; Brown 1910); it holds for r >= 0, and a
    negative r is returned as it is.

    Args:
        table: the scores.
        axis: ``row`` or ``column``.
        beyond_norm: with the weight norm partialled out of both halves. Pure noise times the weights is stable as a
            ranking, since the weights stay what they are; beyond their norm it is not.

    Returns:
        the reliability, at most 1; None if the table keeps no halves along `axis`.
    """
    if not table.halves:
        return None
    correlations = [
        partial_spearman(first, second, norm) if beyond_norm else spearman(first, second)
        for _, (first, second, norm) in _common(axis, *table.halves, table.weight_norm)
    ]
    return median(2 * r / (1 + r) if r > 0 else r for r in correlations) if correlations else None


def norm_agreement(table: ScoreTable, axis: str) -> float | None:
    """Spearman between a table's scores and the weight norm, median over modules; None without scores along `axis`.

    Near 1, the ranking says little that the weights' size does not say for free.
    """
    values = [spearman(scores, norm) for _, (scores, norm) in _common(axis, table.scores, table.weight_norm)]
    return median(values) if values else None


def spearman(a: Vector, b: Vector) -> float:
    """Spearman's rank correlation with average ranks for ties; 0.0 if either is constant or shorter than two."""
    if len(a) < 2 or _constant(a) or _constant(b):
        return 0.0
    return float(spearmanr(a, b).statistic)


def kendall(a: Vector, b: Vector) -> float:
    """Kendall's tau-b, which counts ties; 0.0 if either is constant or shorter than two."""
    if len(a) < 2 or _constant(a) or _constant(b):
        return 0.0
    return float(kendalltau(a, b).statistic)


def partial_spearman(a: Vector, b: Vector, norm: Vector) -> float:
    """Rank correlation of `a` and `b` with `norm` partialled out.

    The ranks of `a` and of `b` are each regressed on the ranks of `norm`; the result is the Pearson correlation of
    the residuals, which equals ``(r_ab - r_an r_bn) / sqrt((1 - r_an**2) (1 - r_bn**2))`` for Spearman correlations r.
    It is 0.0 where the norm explains a ranking fully: nothing is left to agree on.
    """
    if len(a) < 2:
        return 0.0
    by = _centred_ranks(norm)
    first, second = (_residual(_centred_ranks(values), by) for values in (a, b))
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(first @ second / scale, -1.0, 1.0)) if scale > 0 else 0.0


def top_overlap(a: Vector, b: Vector, fraction: float = TOP_FRACTION) -> float:
    """Share of the top `fraction` of `a` (at least one) that is in that of `b`; 0.0 if either is constant."""
    if len(a) == 0 or _constant(a) or _constant(b):
        return 0.0
    count = max(1, round(fraction * len(a)))
    first, second = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (a, b))
    return len(first & second) / count


def _constant(values: Vector) -> bool:
    return bool((values == values[0]).all())


def _centred_ranks(values: Vector) -> Vector:
    ranks = rankdata(values)
    return ranks - ranks.mean()


def _residual(ranks: Vector, by: Vector) -> Vector:
    """What is left of centred `ranks` after least squares on centred `by`; exactly zero where that is rounding."""
    if not by.any():
        return ranks
    residual = ranks - (ranks @ by) / (by @ by) * by
    # A fully explained ranking leaves residuals of rounding only, whose correlation would be noise.
    return residual if residual @ residual > 1e-12 * (ranks @ ranks) else np.zeros_like(ranks)


def _relative(vectors: list[Vector]) -> list[Vector]:
    """Each vector divided by its mean, unless that is 0."""
    return [vector / (vector.mean() or 1.0) if len(vector) else vector for vector in vectors]


def _common(axis: str, *tables: AxisTensors) -> Iterator[tuple[str, list[Vector]]]:
    """Each module that all `tables` have along `axis`, with its vectors where all of them are finite."""
    for module in tables[0]:
        if all(axis in table.get(module, {}) for table in tables):
            vectors = [table[module][axis].double().numpy() for table in tables]
            finite = np.logical_and.reduce([np.isfinite(vector) for vector in vectors])
            yield module, [vector[finite] for vector in vectors]
