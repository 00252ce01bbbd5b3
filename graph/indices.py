"""Index maps: which indices of a port belong to which channel of a group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Strides = list[tuple[int, int]]
"""``(size, stride)`` pairs, outermost first, as of an array in memory."""


class IndexMap:
    """Channel -> indices.

    Attributes:
        table: int64 ``(channels, indices per channel)``, read-only.
    """

    def __init__(self, table: ArrayLike) -> None:
        self.table: NDArray[np.int64] = np.array(table, dtype=np.int64)
        if self.table.ndim != 2:
            raise ValueError(f"an index map has two dimensions, not {self.table.ndim}")
        self.table.setflags(write=False)

    @classmethod
    def identity(cls, size: int) -> IndexMap:
        """Channel c is index c."""
        return cls(np.arange(size).reshape(-1, 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexMap) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.table.shape, self.table.tobytes()))

    def __repr__(self) -> str:
        return f"IndexMap({self.to_json()})"

    def to_json(self) -> Any:
        """None for the identity, ``start, stop, step`` for a range, strides for any regular layout, else the table."""
        channels, width = self.table.shape
        if width == 1 and np.array_equal(self.table[:, 0], np.arange(channels)):
            return None
        outer, inner = _strides(self.table[:, 0]), _strides(self.table[0])
        start = int(self.table[0, 0])
        if not np.array_equal(_regular(start, outer, inner), self.table):
            return self.table.tolist()
        if width == 1 and len(outer) == 1 and outer[0][1]:
            step = outer[0][1]
            return {"start": start, "stop": start + step * channels, "step": step}
        return {"start": start, "channels": [list(pair) for pair in outer], "repeats": [list(pair) for pair in inner]}

    @classmethod
    def from_json(cls, value: Any, size: int) -> IndexMap:
        """The inverse of :meth:`to_json`, of a group with `size` channels."""
        if value is None:
            return cls.identity(size)
        if isinstance(value, list):
            return cls(value)
        if "step" in value:
            return cls(np.arange(value["start"], value["stop"], value["step"]).reshape(-1, 1))
        return cls(_regular(value["start"], value["channels"], value["repeats"]))


def _regular(start: int, channels: Strides, repeats: Strides) -> NDArray[np.int64]:
    return start + np.add.outer(_flat(channels), _flat(repeats))


def _flat(strides: Strides) -> NDArray[np.int64]:
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in strides:
        offsets = np.add.outer(offsets, np.arange(size) * stride).reshape(-1)
    return offsets


def _strides(sequence: NDArray[np.int64]) -> Strides:
    """The nested strides of a sequence, as far as it is regular: whoever calls compares."""
    found: Strides = []
    while len(sequence) > 1:
        steps = np.diff(sequence)
        breaks = np.flatnonzero(steps != steps[0])
        block = int(breaks[0]) + 1 if len(breaks) else len(sequence)
        found.insert(0, (block, int(steps[0])))
        if len(sequence) % block:
            break
        sequence = sequence[::block]
    return found or [(1, 1)]
