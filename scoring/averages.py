"""Means of row and column values over batches, and over two halves of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import AxisTensors


class HalfMeans:
    """Running sums of per-batch values; even batches make one half, odd ones the other."""

    def __init__(self) -> None:
        self.sums: tuple[AxisTensors, AxisTensors] = ({}, {})

    def add(self, number: int, name: str, values: dict[str, Tensor]) -> None:
        """Add batch `number`'s values of the rows and columns of module `name`."""
        entry = self.sums[number % 2].setdefault(name, {})
        for axis, value in values.items():
            entry[axis] = entry[axis] + value if axis in entry else value

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
