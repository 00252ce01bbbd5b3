"""Scores of whole layers, summed from those of rows or columns."""

from __future__ import annotations

from ..errors import InputError
from ..records import AXES, LayerScores, ScoreTable


def layer_of(module: str, layers: list[str]) -> str:
    """The block that a module is in; empty if it is in none."""
    return next((layer for layer in layers if module == layer or module.startswith(f"{layer}.")), "")


def from_rows(table: ScoreTable, axis: str = "row") -> LayerScores:
    """Each layer's score: the sum over all rows (or columns) of its modules.

    Raises:
        InputError: if the table has no such axis, or the model no layers.
    """
    provenance = table.provenance
    sums = dict.fromkeys(provenance.layers, 0.0)
    for module, axes in table.scores.items():
        if axis not in axes:
            raise InputError(f"no {axis} scores of {module}: sum its {next(a for a in AXES if a in axes)}s instead")
        if layer := layer_of(module, provenance.layers):
            sums[layer] += float(axes[axis].double().sum())
    if not sums:
        raise InputError(f"{provenance.model_source or 'the model'} has no layers: layer scores need blocks")
    return LayerScores(
        sums,
        f"{axis}s:{provenance.criterion}",
        provenance.model_source,
        provenance.model_fingerprint,
        provenance.data_source,
        provenance.data_fingerprint,
        provenance.seed,
        provenance.forward_passes,
        provenance.backward_passes,
    )
