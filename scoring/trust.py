"""How far a score table can be trusted, from what the table itself holds; and several tables side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import AXES, ScoreTable
from .agreement import agreement, check_same_model, norm_agreement, split_half

ALMOST_THE_NORM = 0.95
"""Spearman with the weight norm from which a ranking is called the norm's."""
UNSTABLE, STABLE = 0.5, 0.9
"""Split-half reliability below which half of the data gives another ranking, and from which nearly the same."""


@dataclass(frozen=True)
class Trust:
    """What a score table says of itself along one axis; correlations are medians over modules.

    Attributes:
        criterion: name and settings.
        axis: ``row`` or ``column``.
        forward_passes: forward passes of one batch.
        backward_passes: backward passes of one batch.
        seconds: wall time of the scoring; None if it was not measured.
        peak_memory: bytes above the state before the scoring; None if it is not known.
        norm_agreement: Spearman with the weight norm, see :func:`rowscope.scoring.agreement.norm_agreement`.
        split_half: reliability, see :func:`rowscope.scoring.agreement.split_half`; None without halves.
        split_half_beyond_norm: the same with the weight norm partialled out.
        signal_to_noise: None where the score is exact.
        verdict: all of it in one sentence.
    """

    criterion: str
    axis: str
    forward_passes: int
    backward_passes: int
    seconds: float | None
    peak_memory: int | None
    norm_agreement: float
    split_half: float | None
    split_half_beyond_norm: float | None
    signal_to_noise: float | None
    verdict: str


def trust(table: ScoreTable, axis: str | None = None) -> Trust:
    """How far to trust a table along `axis`, by default its rows, or its columns if it has no rows.

    Raises:
        InputError: if the table has no scores along `axis`.
    """
    axis = axis or common_axis([table])
    likeness = norm_agreement(table, axis)
    if likeness is None:
        raise InputError(f"{table.provenance.criterion} has no {axis} scores: score the {axis} axis")
    provenance = table.provenance
    found = Trust(
        criterion=provenance.criterion,
        axis=axis,
        forward_passes=provenance.forward_passes,
        backward_passes=provenance.backward_passes,
        seconds=provenance.seconds,
        peak_memory=provenance.peak_memory,
        norm_agreement=likeness,
        split_half=split_half(table, axis),
        split_half_beyond_norm=split_half(table, axis, beyond_norm=True),
        signal_to_noise=provenance.signal_to_noise,
        verdict="",
    )
    broken = sum(int((~axes[axis].isfinite()).sum()) for axes in table.scores.values() if axis in axes)
    return replace(found, verdict=_verdict(found, bool(provenance.data_fingerprint), broken))


def _verdict(found: Trust, knows_data: bool, broken: int) -> str:
    """The gravest thing to say of a table, or that it is stable."""
    like, ratio = found.norm_agreement, found.signal_to_noise
    half, beyond = found.split_half, found.split_half_beyond_norm
    if broken:
        return f"{broken:,} scores are NaN or infinite: score again with --dtype float32"
    if not knows_data and like > ALMOST_THE_NORM:
        return f"knows nothing of the data: it ranks {found.axis}s as the weight norm does"
    if not knows_data:
        return f"knows nothing of the data (Spearman with the weight norm {like:.2f})"
    if ratio is not None and not ratio >= 1:
        mostly = "weight magnitude" if like > 0.5 else "noise"
        return f"signal-to-noise {ratio:.2f}: this ranking is mostly {mostly}; try --criterion taylor"
    if like > ALMOST_THE_NORM:
        return f"ranks {found.axis}s almost as the weight norm does (Spearman {like:.2f}): magnitude costs no pass"
    if half is None or beyond is None:
        return "keeps no halves, so its stability is not known: score at least 2 batches (--score-batches)"
    halves, mend = ("data", "--score-batches") if ratio is None else ("probes", "passes")
    if half < UNSTABLE:
        return f"half of the {halves} gives another ranking (split-half {half:.2f}): more {mend}"
    if beyond < UNSTABLE:
        return f"beyond the weight norm, half of the {halves} gives another ranking ({beyond:.2f}): more {mend}"
    alike = "nearly the same" if half >= STABLE else "a similar"
    return f"half of the {halves} gives {alike} ranking (split-half {half:.2f}, {beyond:.2f} beyond the weight norm)"


def common_axis(tables: Sequence[ScoreTable]) -> str:
    """The axis that all tables have, rows before columns. Raises InputError if there is none."""
    for axis in AXES:
        if all(any(axis in axes for axes in table.scores.values()) for table in tables):
            return axis
    raise InputError("the score tables have no axis in common: score all of them with --axis both")


def labels(tables: Sequence[ScoreTable], sources: Sequence[str]) -> dict[str, ScoreTable]:
    """A name for each table: its criterion, and its file where criteria repeat.

    Args:
        tables: any.
        sources: the file of each; no two alike. Their stems are enough where these differ.
    """
    stems = [Path(source).stem for source in sources]
    if len(set(stems)) == len(stems):
        sources = stems
    criteria = [table.provenance.criterion for table in tables]
    return {
        name if criteria.count(name) == 1 else f"{name} ({source})": table
        for name, source, table in zip(criteria, sources, tables, strict=True)
    }


def weight_norm(table: ScoreTable) -> ScoreTable:
    """The weight norms that a table keeps, as a table of their own."""
    provenance = replace(
        table.provenance, criterion="weight norm", data_source="", data_fingerprint="", forward_passes=0,
        backward_passes=0, signal_to_noise=None, seconds=None, peak_memory=None,
    )  # fmt: skip
    return ScoreTable(table.weight_norm, table.weight_norm, provenance)


def compare(tables: Mapping[str, ScoreTable], axis: str | None = None) -> dict[str, Any]:
    """Several tables of one model side by side: what ``comparison.json`` holds, see ``docs/formats.md``.

    Args:
        tables: name -> table; one alone is compared with the weight norm.
        axis: ``row`` or ``column``; by default the one that all tables have, rows before columns.

    Raises:
        InputError: if the tables belong to different models, or one has no scores along `axis`.
    """
    first, *others = tables.values()
    for other in others:
        check_same_model(first, other)
    axis = axis or common_axis(list(tables.values()))
    entries = []
    for name, table in tables.items():
        data = {"data_source": table.provenance.data_source, "data_fingerprint": table.provenance.data_fingerprint}
        entries.append({"name": name, **asdict(trust(table, axis)), **data})
    compared = dict(tables) if others else {**tables, "weight norm": weight_norm(first)}
    pairs = []
    for (name, table), (other_name, other) in combinations(compared.items(), 2):
        found = asdict(agreement(table, other, axis))
        del found["axis"]
        pairs.append({"first": name, "second": other_name, **found})
    source = {"source": first.provenance.model_source, "fingerprint": first.provenance.model_fingerprint}
    return {"axis": axis, "model": source, "tables": entries, "pairs": pairs}
