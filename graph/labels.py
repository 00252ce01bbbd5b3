"""Labels: every index of every dimension of every weight gets a number, and numbers that belong together are united.

While a model runs on the meta device, each tensor carries *fields*: integer tensors of its own shape that say, element
by element, which index of which weight made it. Views of the tensor are the same views of its fields, so no layout
(heads, fused projections, interleaving, windows, shuffles) needs to be known. A field is an expanded view wherever it
does not vary, so its memory is that of what varies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .structure import Port

Ids = NDArray[np.int32]
MAX_LABELS = 2**27
"""As many rows, columns and other indices as a trace takes on; a 405B has 6e7."""
MAX_ELEMENTS = 2**27
"""A field that no view can express is copied; beyond this many elements the trace is refused."""


class Untraceable(Exception):  # noqa: N818 (a verdict on the model, not an error of ours)
    """The model does something of which the coupling is not known."""


class Labels:
    """Union-find over labels; label 0 says that an element belongs to no weight's index.

    Attributes:
        ports: first label of a dimension of a weight -> that port and its size, in ascending order.
    """

    def __init__(self) -> None:
        self.ports: dict[int, tuple[Port, int]] = {}
        self._parent: Ids = np.zeros(1, dtype=np.int32)
        self._count = 1
        self._bits: dict[str, int] = {}
        self._marks = np.zeros(0, dtype=np.uint16)  # a bit for each kind

    def new(self, size: int) -> Ids:
        """`size` fresh labels."""
        first, self._count = self._count, self._count + size
        if self._count > len(self._parent):
            self.reserve(self._count // 8)
        return np.arange(first, self._count, dtype=np.int32)

    def reserve(self, size: int) -> None:
        """Room for `size` more labels."""
        grown = np.arange(self._count + size, dtype=np.int32)
        grown[: len(self._parent)] = self._parent
        self._parent = grown

    def of_port(self, port: Port, size: int) -> Ids:
        """Fresh labels of a dimension of a weight."""
        ids = self.new(size)
        self.ports[int(ids[0])] = (port, size)
        return ids

    def find(self, ids: Ids) -> Ids:
        """The label that stands for all labels united with each of `ids`."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[ids] = roots
                return roots
            roots = above

    def unite(self, first: Ids, second: Ids) -> None:
        """Unite labels pair by pair; pairs with label 0 say nothing."""
        open_ = (first != second) & (first > 0) & (second > 0)
        first, second = first[open_], second[open_]
        while len(first):
            first, second = self.find(first), self.find(second)
            low, high = np.minimum(first, second), np.maximum(first, second)
            open_ = low < high
            first, second = low[open_], high[open_]
            np.minimum.at(self._parent, second, first)

    def dim_of(self, label: int) -> int:
        """The dim of the weight that a label was made for; -1 if it was made for none."""
        first = max((start for start in self.ports if start <= label), default=0)
        port, size = self.ports.get(first, (None, 0))
        return port.dim if port is not None and label < first + size else -1

    def mark(self, mark: str, ids: Ids) -> None:
        """Mark labels, e.g. as ``consumed``."""
        bit = self._bits.setdefault(mark, 1 << len(self._bits))
        if len(self._marks) < self._count:
            grown = np.zeros(len(self._parent), dtype=np.uint16)
            grown[: len(self._marks)] = self._marks
            self._marks = grown
        self._marks[ids] |= np.uint16(bit)

    def marked(self, mark: str) -> NDArray[np.bool_]:
        """Whether each label is marked."""
        flags = np.zeros(self._count, dtype=np.bool_)
        known = self._marks[: self._count]
        flags[: len(known)] = known & np.uint16(self._bits.get(mark, 0))
        return flags

    def classes(self) -> Ids:
        """For every label the number of its class, counted in the order of the classes' first labels."""
        roots = self._parent[: self._count]
        while True:
            above = roots[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        numbers = np.cumsum(roots == np.arange(self._count, dtype=np.int32), dtype=np.int32)
        numbers -= 1
        return numbers[roots]


@dataclass(frozen=True)
class Entry:
    """What a tensor carries.

    Attributes:
        fields: int32, each of the tensor's shape.
        static: whether it is a weight, a view of it, or several element by element.
        weights: names of the weights of a static tensor.
        merged: whether it is made of weights by a product (a low-rank update), which may be used as a weight.
    """

    fields: tuple[Tensor, ...]
    static: bool = False
    weights: frozenset[str] = frozenset()
    merged: bool = False


def varying(field: Tensor) -> frozenset[int]:
    """Dims along which a compressed field varies."""
    return frozenset(
        d for d, (size, stride) in enumerate(zip(field.shape, field.stride(), strict=True)) if size > 1 and stride
    )


def core(field: Tensor, *others: Tensor) -> tuple[slice, ...]:
    """Index that keeps one element along every dim in which neither the field nor the others vary."""
    fields = (field, *others)
    return tuple(slice(0, 1) if not any(f.stride(d) for f in fields) else slice(None) for d in range(field.ndim))


def vary_along(ids: Ids | Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """A field of `shape` that varies along `dim` only."""
    ids = torch.as_tensor(ids)
    return ids.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(*shape)


def compressed(field: Tensor) -> Tensor:
    """The field expanded along all dims in which it does not vary."""
    small = field[core(field)]
    for dim in range(small.ndim):
        if small.shape[dim] > 1 and not _differs(small, dim):
            small = small.narrow(dim, 0, 1)
    return small.expand(field.shape)


def _differs(field: Tensor, dim: int) -> bool:
    if bool((field.select(dim, 0) != field.select(dim, 1)).any()):
        return True
    return bool((field != field.narrow(dim, 0, 1)).any())


def reshaped(field: Tensor, shape: Iterable[int]) -> Tensor:
    """The field in another shape of as many elements, without a copy where a view can express it."""
    try:
        return field.view(*shape)
    except RuntimeError:
        if field.numel() > MAX_ELEMENTS:
            raise Untraceable(f"a weight of shape {tuple(field.shape)} is reshaped before use") from None
        return field.reshape(*shape)


def first_of(field: Tensor, dims: Iterable[int], shape: Sequence[int]) -> Tensor:
    """The field at index 0 of `dims` (kept, of size 1), expanded or narrowed to `shape`."""
    for dim in dims:
        field = field.narrow(dim, 0, 1)
    for dim, size in enumerate(shape):
        if 1 < size < field.shape[dim]:
            field = field.narrow(dim, 0, size)
        elif size == 1 and field.shape[dim] > 1:
            field = field.narrow(dim, 0, 1)
    return field.expand(*shape)
