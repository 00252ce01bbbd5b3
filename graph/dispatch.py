"""The trace itself: a dispatch mode under which a model on the meta device runs, and every operation passes labels on.

Whatever is computed from the inputs alone (positions, masks, buckets) is computed for real, so that branches on it
work; whatever touches a weight is meta. What each operation does to labels is in ``rules``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from . import picking, products  # noqa: F401 (they register their rules)
from .labels import MAX_LABELS, Entry, Ids, Labels, Untraceable, compressed, core, vary_along, varying
from .rules import propagate
from .structure import Port

REAL_FACTORIES = {"arange", "full", "ones", "zeros", "empty", "eye", "new_zeros", "new_ones", "new_full"}


class LabelTrace(TorchDispatchMode):
    """Runs operations on meta tensors and keeps the labels of what they return.

    Attributes:
        labels: all labels, what is united, and their marks: ``row`` where a weight writes, ``column`` where it reads,
            ``written`` by one, ``consumed`` by a sum over channels, ``reduced`` by a norm or another reduction,
            ``fixed`` in a softmax or a ranking, ``added`` to others, ``activated`` by a nonlinearity, ``convolved``.
        bundles: pairs of (label of a head, labels that a product summed up into it).
        gates: pairs of (label, labels of the wider tensor that it multiplies or adds to).
        splits: pairs of (label of a part, labels in it) where a view cuts channels into equal parts.
        experts: weights whose first dim was indexed -> its size: they are so many independent copies.
        flops: multiplications and additions with each weight.
        used: names of the weights seen.
        shapes: of all labelled tensors by name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = Labels()
        self.bundles: list[tuple[Ids, Ids]] = []
        self.gates: list[tuple[Ids, Ids]] = []
        self.splits: list[tuple[Ids, Ids]] = []
        self.experts: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.used: set[str] = set()
        self._entries: Any = WeakTensorKeyDictionary()
        tensors = labelled_tensors(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        indices = sum(sum(tensor.shape) for _, tensor in tensors)
        if indices > MAX_LABELS:
            raise Untraceable(f"its weights have {indices:,} rows, columns and other indices, which is too many")
        self.labels.reserve(indices)
        for name, tensor in tensors:
            fields = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    fields.append(vary_along(self.labels.of_port(Port(name, dim), size), tensor.shape, dim))
            self._entries[tensor] = Entry(tuple(fields), static=True, weights=frozenset({name}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = _executed(func, args, kwargs, tensors)
        if any(tensor in self._entries for tensor in tensors):
            propagate(self, func, args, kwargs, out)
        return out

    def forget(self) -> None:
        """Drop what tensors carry once the model has run; labels stay."""
        self._entries.clear()

    def entry(self, tensor: Any) -> Entry:
        """What a tensor carries; nothing for a tensor that no weight made."""
        found = self._entries.get(tensor) if isinstance(tensor, Tensor) else None
        if found is None:
            return Entry(())
        self.used.update(found.weights)
        return found

    def set(self, tensor: Tensor, fields: Iterable[Tensor], like: Entry | None = None, merged: bool = False) -> None:
        """Let `tensor` carry `fields`, each of its shape; made of weights as `like` is."""
        kept = tuple(map(compressed, fields)) if tensor.numel() else ()
        like = like or Entry(())
        self._entries[tensor] = Entry(kept, like.static, like.weights, like.merged or merged)

    def unknown(self, shape: Sequence[int], dim: int) -> Tensor:
        """A field of new labels along `dim` that cannot vanish: for channels whose order is not known any more."""
        field = vary_along(self.labels.new(shape[dim]), shape, dim)
        self.mark("fixed", field)
        return field

    def standing(self, field: Tensor) -> Tensor:
        """The field with one label per class: it varies only where classes differ."""
        small = field[core(field)]
        ids = torch.from_numpy(self.labels.find(_ids(small)).reshape(small.shape))
        return compressed(ids.expand(field.shape))

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite two fields element by element."""
        small = core(first, second)
        self.labels.unite(_ids(first[small]), _ids(second[small]))

    def gate(self, narrow: Tensor, wide: Tensor) -> None:
        """Note that `narrow` serves every element of `wide` that it meets.

        What serves one channel is one: query heads that share a value head.
        """
        small = core(narrow, wide)
        serving, served = _ids(narrow[small]), _ids(wide[small])
        self.gates.append((serving, served))
        channels = self.labels.find(served)
        order = np.argsort(channels, kind="stable")
        same = np.diff(channels[order]) == 0
        self.labels.unite(serving[order][:-1][same], serving[order][1:][same])

    def joined(self, operands: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """The fields of what operands, added or multiplied element by element, make together.

        Fields of different operands that vary along the same dims are one; a field that varies along some of
        another's dims serves it. Fields of one operand stay apart: two of them may share a dim that was flattened.
        """
        kept: list[Tensor] = []
        for fields in operands:
            free = list(range(len(kept)))
            for field in reversed(fields):
                met = next((n for n in reversed(free) if self._alike(field, kept[n])), None)
                if met is not None:
                    self.unite(field, kept[met])
                    kept[met] = _filled(kept[met], field)
                    free.remove(met)
                    continue
                wider = [n for n in free if varying(field) < varying(kept[n])]
                narrower = [n for n in free if varying(kept[n]) < varying(field)]
                for n in wider:
                    self.gate(field, kept[n])
                for n in narrower:
                    self.gate(kept[n], field)
                    kept[n] = field
                if not wider and not narrower:
                    kept.append(field)
        return list({id(field): field for field in kept}.values())

    def _alike(self, first: Tensor, second: Tensor) -> bool:
        """Whether two fields vary along the same dims, as they stand or once united labels are one."""
        if varying(first) == varying(second):
            return True
        if varying(first) < varying(second) or varying(second) < varying(first):
            return varying(self.standing(first)) == varying(self.standing(second))
        return False

    def matched(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Unite the fields of two operands along a dim that a product sums over.

        Where one has more of them than the other, its outer ones cannot vanish on their own.
        """
        for one, other in zip(reversed(first), reversed(second), strict=False):
            self.unite(one, other)
        if first and second:
            count = min(len(first), len(second))
            for field in (*first[: len(first) - count], *second[: len(second) - count]):
                self.mark("fixed", field)

    def split(self, before: Tensor, after: Tensor) -> None:
        """Note that channels along one dim are laid out along several: they must stay as many in each part."""
        dims = sorted(varying(after))
        if len(varying(before)) != 1 or len(dims) < 2:
            return
        small = after[core(after)]
        for dim in dims[:-1]:
            parts = torch.from_numpy(self.labels.new(small.shape[dim]))
            self.splits.append((_ids(vary_along(parts, small.shape, dim)), _ids(small)))

    def mark(self, mark: str, field: Tensor) -> None:
        """Mark all labels of a field."""
        self.labels.mark(mark, _ids(field[core(field)]))


class ListIndices(TorchFunctionMode):
    """Keeps the values of lists that index a tensor: on the meta device they would be lost."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            parts = (torch.tensor(part) if isinstance(part, list) else part for part in args[1])
            args = (args[0], tuple(parts))
        elif func is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        return func(*args, **(kwargs or {}))


def labelled_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters (tied ones once) and what is kept per channel beside them (running statistics), by name."""
    saved = model.state_dict(keep_vars=True)
    buffers = [
        (name, b) for name, b in model.named_buffers() if name in saved and b.ndim == 1 and b.is_floating_point()
    ]
    return [*model.named_parameters(), *buffers]


def _filled(field: Tensor, other: Tensor) -> Tensor:
    """`field`, with `other`'s labels where it has none."""
    return torch.where(field > 0, field, other) if bool((field[core(field)] == 0).any()) else field


def _ids(field: Tensor) -> Ids:
    return field.reshape(-1).numpy()


def _executed(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """Run an operation: for real on real tensors, on meta as soon as one tensor is."""
    name = func._schema.name.removeprefix("aten::")
    if any(tensor.is_meta for tensor in tensors):
        if name in ("_local_scalar_dense", "nonzero", "equal", "_is_all_true", "_is_any_true"):
            raise Untraceable(f"its forward branches on computed values ({name})")
        if name in ("index", "index_put", "index_put_", "masked_select") and _has_mask(tensors[1:]):
            raise Untraceable("it selects elements by a computed mask")
        args, kwargs = tree_map(_to_meta, (args, kwargs))
        if "device" in kwargs and name not in REAL_FACTORIES:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if name in REAL_FACTORIES and _is_index(kwargs.get("dtype") or tensors[0].dtype):
            kwargs = {**kwargs, "device": torch.device("cpu")}
    elif _is_meta_device(kwargs) and (tensors or _is_index(kwargs.get("dtype")) or name == "arange"):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return func(*args, **kwargs)


def _has_mask(indices: Sequence[Tensor]) -> bool:
    return any(tensor.is_meta and tensor.dtype in (torch.bool, torch.uint8) for tensor in indices)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _is_meta_device(kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _is_index(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex
