"""The trace itself: a dispatch mode under which a model on the meta device runs, and every operation passes labels on.

Whatever is computed from the inputs alone (positions, masks, buckets) is computed for real, so that branches on it
work; whatever touches a weight is meta. What each operation does to labels is in ``rules``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .labels import Entry, Ids, Labels, Untraceable, compressed, core, varying, vary_along
from .structure import Port

REAL_FACTORIES = {"arange", "full", "ones", "zeros", "empty", "eye", "new_zeros", "new_ones", "new_full"}


class LabelTrace(TorchDispatchMode):
    """Runs operations on meta tensors and keeps the labels of what they return.

    Attributes:
        labels: all labels, what is united, and their marks: ``row`` where a weight writes, ``column`` where it reads,
            ``consumed`` by a sum over channels, ``fixed`` in a softmax or a ranking, ``exposed`` in the model's output.
        bundles: pairs of (label of a head, labels that a product summed up into it).
        gates: pairs of (label, labels of the wider tensor that it multiplies or adds to).
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
        self.experts: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.used: set[str] = set()
        self._entries: Any = WeakTensorKeyDictionary()
        tensors = labelled_tensors(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        self.labels.reserve(sum(sum(tensor.shape) for _, tensor in tensors))
        for name, tensor in tensors:
            fields = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    fields.append(vary_along(self.labels.of_port(Port(name, dim), size), tensor.shape, dim))
            self._entries[tensor] = Entry(tuple(fields), static=True, weights=frozenset({name}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .rules import propagate

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

    def set(self, tensor: Tensor, fields: Iterable[Tensor], static: bool = False, weights: Iterable[str] = ()) -> None:
        """Let `tensor` carry `fields`, each of its shape."""
        kept = tuple(compressed(field, self.labels) for field in fields) if tensor.numel() else ()
        self._entries[tensor] = Entry(kept, static, frozenset(weights))

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite two fields element by element."""
        small = core(first, second)
        self.labels.unite(_ids(first[small]), _ids(second[small]))

    def gate(self, narrow: Tensor, wide: Tensor) -> None:
        """Note that `narrow` serves every element of `wide` that it meets."""
        small = core(narrow, wide)
        self.gates.append((_ids(narrow[small]), _ids(wide[small])))

    def joined(self, fields: list[Tensor], static: bool = False) -> list[Tensor]:
        """The fields of what several tensors, added or multiplied element by element, make together.

        Fields that vary along the same dims are one; a field that varies along some of another's dims serves it.
        """
        kept: list[Tensor] = []
        for field in fields:
            dims = varying(field)
            for number, other in enumerate(kept):
                others = varying(other)
                if dims == others:
                    self.unite(field, other)
                    kept[number] = (
                        torch.where(other > 0, other, field) if bool((other[core(other)] == 0).any()) else other
                    )
                    break
                if dims < others:
                    self.gate(field, other)
                    break
                if others < dims:
                    self.gate(other, field)
                    kept[number] = field
                    break
            else:
                kept.append(field)
        return kept

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
    """Parameters (tied ones once) and running statistics by name."""
    statistics = [
        (f"{name}.{statistic}", buffer)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for statistic, buffer in module.named_buffers(recurse=False)
        if buffer.ndim
    ]
    return [*model.named_parameters(), *statistics]


def _ids(field: Tensor) -> Ids:
    return field.reshape(-1).numpy()


def _executed(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """Run an operation: for real on real tensors, on meta as soon as one tensor is."""
    name = func._schema.name.removeprefix("aten::")
    if any(tensor.is_meta for tensor in tensors):
        if name in ("_local_scalar_dense", "nonzero", "equal"):
            raise Untraceable(f"its forward branches on computed values ({name})")
        args, kwargs = tree_map(_to_meta, (args, kwargs))
        if "device" in kwargs and name not in REAL_FACTORIES:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if name in REAL_FACTORIES and _is_index(kwargs.get("dtype") or tensors[0].dtype):
            kwargs = {**kwargs, "device": torch.device("cpu")}
    elif _is_meta_device(kwargs) and (tensors or _is_index(kwargs.get("dtype")) or name == "arange"):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return func(*args, **kwargs)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _is_meta_device(kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _is_index(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex
