"""Means of row and column values over batches, and over two halves of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ranks import summed, world
from ..records import AXES, AxisTensors
from .weights import Weight


class HalfMeans:
    """Running sums of per-batch values; even batches make one half, odd ones the other."""

    def __init__(self) -> None:
        self.sums: tuple[AxisTensors, AxisTensors] = ({}, {})

    def add(self, number: int, name: str, values: dict[str, Tensor]) -> None:
        """Add batch `number`'s values of the rows and columns of module `name`."""
        entry = self.sums[number % 2].setdefault(name, {})
        for axis, value in values.items():
            entry[axis] = entry[axis] + value if axis in entry else value

    def reduce_over_ranks(self, weights: Mapping[str, Weight]) -> None:
        """Make the sums those of all ranks' batches."""
        first, second = summed_tables(self.sums, weights)
        self.sums = (first, second)

    def means(self, count: int) -> tuple[AxisTensors, tuple[AxisTensors, AxisTensors] | tuple[()]]:
        """Means over `count` batches, and over each half of them (none if there is one batch only)."""
        first, second = self.sums
        if count == 1:
            return first, ()
        for entries, others in ((first, second), (second, first)):
            for name in others.keys() - entries.keys():  # an expert that no token of a half came to, say
                entries[name] = {axis: torch.zeros_like(total) for axis, total in others[name].items()}
        both = {
            name: {axis: total + second[name][axis] for axis, total in axes.items()} for name, axes in first.items()
        }
        return _divided(both, count), (_divided(first, (count + 1) // 2), _divided(second, count // 2))


def _divided(sums: AxisTensors, count: int) -> AxisTensors:
    return {name: {axis: total / count for axis, total in entry.items()} for name, entry in sums.items()}


def summed_tables(
    tables: Sequence[AxisTensors], weights: Mapping[str, Weight], axes: Sequence[str] = AXES
) -> list[AxisTensors]:
    """Tables of row and column values, each summed over all ranks, in one go.

    A module that a rank's table lacks counts as zero there; one that all lack stays away.
    """
    if world()[1] == 1:
        return list(tables)
    device = next(iter(weights.values())).parameter.device
    parts: list[Tensor] = []
    for table in tables:
        for name, weight in weights.items():
            sizes = {"row": weight.out_features, "column": weight.in_features}
            entry = table.get(name) or {axis: torch.zeros(sizes[axis]) for axis in axes}
            parts += [torch.tensor([float(name in table)]), *(entry[axis] for axis in axes)]
    flat = summed(torch.cat([part.to(device, torch.float32) for part in parts]))
    whole = iter(flat.split([part.numel() for part in parts]))
    found: list[AxisTensors] = [{} for _ in tables]
    for table in found:
        for name in weights:
            is_met, values = bool(next(whole)), {axis: next(whole) for axis in axes}
            if is_met:
                table[name] = values
    return found
