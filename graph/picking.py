"""What picking, joining, reducing and moving elements along a dim does to labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .labels import Entry, Untraceable, first_of, vary_along, varying
from .rules import join, keep, pointwise, rule, same_everywhere

if TYPE_CHECKING:
    from .dispatch import LabelTrace

SUMS = {"sum", "mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"}
"""Reductions to which a channel of zeros adds nothing, but for the number of channels."""


# ---------------------------------------------------------------------------------------------- picking and joining


@rule("embedding")
def embedding(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A table's columns are channels; its rows are looked up."""
    table = trace.entry(args[0])
    fields = [field for field in table.fields if varying(field) == {1}]
    for field in fields if table.static else ():
        trace.mark("column", field)
        trace.mark("row", field)
    trace.set(out, [field[0].expand(out.shape) for field in fields])


@rule("index", "_unsafe_index")
def index(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``tensor[..., indices, ...]``."""
    source = trace.entry(args[0])
    indices = list(args[1])
    picked = [dim for dim, picks in enumerate(indices) if picks is not None]
    if source.static and picked == [0]:
        trace.experts.update(dict.fromkeys(source.weights, args[0].shape[0]))
    if not source.static and all(picks is None or not picks.is_meta for picks in indices):
        keep(trace, source, out, [func(field, indices) for field in source.fields])
        return
    fields = _without(trace, source, picked)
    new_dims = out.ndim - (args[0].ndim - len(picked))
    at = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    shaped = []
    for field in fields:
        rest = field[tuple(0 if dim in picked else slice(None) for dim in range(field.ndim))]
        shaped.append(rest[(slice(None),) * at + (None,) * new_dims].expand(out.shape))
    if new_dims == len(picked) == 1:
        shaped += _disordered(trace, source, at, out)
    keep(trace, source, out, shaped)


@rule("index_select", "gather", "topk", "sort", "cummax", "cumsum", "cumprod", "median", "kthvalue", "logcumsumexp")
def picked_along(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Elements along one dim are picked, ranked or accumulated: channels along it compete or are looked up."""
    source = trace.entry(args[0])
    name = func._schema.name.removeprefix("aten::")
    position = 2 if name in ("topk", "kthvalue") else 1
    dim = args[position] if len(args) > position and not isinstance(args[position], Tensor) else kwargs.get("dim", -1)
    dim %= max(args[0].ndim, 1)
    result = out if isinstance(out, Tensor) else out[0]
    fields = [first_of(field, [dim], result.shape) for field in _without(trace, source, [dim])]
    keep(trace, source, result, [*fields, *_disordered(trace, source, dim, result)])


def _without(trace: LabelTrace, source: Entry, dims: Iterable[int]) -> list[Tensor]:
    """Fields that do not vary along `dims`; labels of the others, unless of a weight, cannot vanish."""
    kept = []
    for field in source.fields if source.static else map(trace.standing, source.fields):
        if varying(field).isdisjoint(dims):
            kept.append(field)
        elif not source.static:
            trace.mark("fixed", field)
    return kept


def _disordered(trace: LabelTrace, source: Entry, dim: int, out: Tensor) -> list[Tensor]:
    """A field that says of `out` that its channels along `dim` cannot vanish, where the source's were picked from."""
    picked = any(dim in varying(field) for field in source.fields) and not source.static
    return [trace.unknown(out.shape, dim)] if picked and out.ndim > dim and out.shape[dim] > 1 else []


@rule("index_add", "scatter", "scatter_add", "index_copy", "scatter_reduce")
def written_along(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Elements are added or written at places along one dim."""
    target, dim, source = args[0], args[1] % args[0].ndim, args[3]
    if not isinstance(source, Tensor):
        source = target
    entry = trace.entry(source)
    fields = tuple(first_of(field, [dim], out.shape) for field in _without(trace, entry, [dim]))
    join(trace, out, [(target, trace.entry(target)), (source, Entry(fields, entry.static, entry.weights))])


@rule("index_put")
def put(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Elements are written at places along the first dims."""
    target, indices, values = args[:3]
    entry = trace.entry(values)
    rest = out.ndim - len(indices)
    if any(picks is None for picks in indices):
        raise Untraceable("it writes at computed places of inner dims")
    fields = []
    for field in entry.fields:
        outer = range(field.ndim - rest)
        if not varying(field).isdisjoint(outer):
            raise Untraceable("it writes channels at computed places")
        fields.append(field[(0,) * len(outer)].expand(out.shape))
    join(trace, out, [(target, trace.entry(target)), (values, Entry(tuple(fields), entry.static, entry.weights))])


@rule("cat")
def cat(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Along the dim channels follow one another; along the others they must stay as many, so they are one."""
    tensors = [tensor for tensor in args[0] if tensor.ndim == out.ndim]  # an empty cache may be one-dimensional
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    entries = [trace.entry(tensor) for tensor in tensors]
    for field in itertools.chain.from_iterable(entry.fields for entry in entries if entry.static):
        trace.mark("row", field)
    leading = [entry for entry in entries if entry.fields and not entry.static] or entries  # positions are no channels
    if any(dim in varying(field) for entry in leading for field in entry.fields):
        trace.set(out, [torch.cat([_piece(*part) for part in zip(tensors, entries, strict=True)], dim)])
    else:
        parts = zip(tensors, entries, strict=True)
        across = [
            [first_of(field, [dim], out.shape) for field in entry.fields if dim not in varying(field)]
            for tensor, entry in parts
            if tensor.numel()
        ]
        trace.set(out, trace.joined(across))


def _piece(tensor: Tensor, entry: Entry) -> Tensor:
    """One field for a tensor that is joined to others along its channels: its innermost one."""
    if not entry.fields:
        return torch.zeros(1, dtype=torch.int32).expand(tensor.shape)
    return max(entry.fields, key=lambda field: max(varying(field), default=-1))


@rule("stack")
def stack(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A concatenation along a new dim."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    tensors = []
    for tensor in args[0]:
        entry = trace.entry(tensor)
        tensors.append(torch.empty(tensor.shape, device="meta").unsqueeze(dim))
        keep(trace, entry, tensors[-1], [field.unsqueeze(dim) for field in entry.fields])
    cat(trace, func, (tensors, dim), {}, out)


# ---------------------------------------------------------------------------------------------- along a dim


@rule("argmax", "argmin")
def ranked(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Which channel is largest cannot be said without all of them."""
    for field in trace.entry(args[0]).fields:
        trace.mark("fixed", field)


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Channels that compete in a softmax cannot vanish without changing the others."""
    source = trace.entry(args[0])
    dim = args[1] % args[0].ndim
    for field in source.fields:
        if dim in varying(trace.standing(field)):
            trace.mark("fixed", field)
    keep(trace, source, out, source.fields)


@rule(
    "sum", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "prod",
    "linalg_vector_norm", "any", "all", "logsumexp",
)  # fmt: skip
def reduced(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Channels along reduced dims end here (the mean of a norm); those along others go on."""
    tensor, source = args[0], trace.entry(args[0])
    name = func._schema.name.removeprefix("aten::")
    given = [argument.name for argument in func._schema.arguments]
    dims = args[given.index("dim")] if "dim" in given and len(args) > given.index("dim") else kwargs.get("dim")
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        pointwise(trace, func, args, kwargs, out)
        return
    dims = range(tensor.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % tensor.ndim for dim in dims}
    for result in out if isinstance(out, tuple) else (out,):
        fields = []
        for field in map(trace.standing, source.fields):
            if varying(field).isdisjoint(gone):
                index = tuple(0 if dim in gone else slice(None) for dim in range(field.ndim))
                keepdim = result.ndim == field.ndim
                fields.append(first_of(field, gone, result.shape) if keepdim else field[index])
            elif not source.static:
                trace.mark("reduced" if name in SUMS else "fixed", field)
        keep(trace, source, result, fields)


# ---------------------------------------------------------------------------------------------- space


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_bilinear2d",
    "upsample_nearest2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_nearest1d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "reflection_pad1d", "reflection_pad2d",
    "replication_pad2d", "grid_sampler_2d", "grid_sampler_3d",
)  # fmt: skip
def resampled(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Places are pooled, resized or padded; channels stay."""
    result = out if isinstance(out, Tensor) else out[0]
    source = trace.entry(args[0])
    dims = [dim for dim in range(result.ndim) if result.shape[dim] != args[0].shape[dim] or dim >= 2]
    fields = [same_everywhere(trace, field, dims) for field in source.fields]
    keep(trace, source, result, [field.expand(result.shape) for field in fields])


@rule("constant_pad_nd")
def padded(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Padding of places keeps channels; padded channels are nobody's."""
    source = trace.entry(args[0])
    changed = [dim for dim in range(out.ndim) if out.shape[dim] != args[0].shape[dim]]
    fields = []
    for field in source.fields:
        if varying(field).isdisjoint(changed):
            index = tuple(slice(0, 1) if dim in changed else slice(None) for dim in range(field.ndim))
            fields.append(field[index].expand(out.shape))
        else:
            fields.append(torch.constant_pad_nd(field, args[1], 0))
    keep(trace, source, out, fields)


@rule("im2col")
def unfolded(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``(batch, channels, height, width)`` to ``(batch, channels × kernel, places)``."""
    source = trace.entry(args[0])
    repeat = out.shape[1] // args[0].shape[1]
    channels = [same_everywhere(trace, field, (0, 2, 3)).reshape(-1) for field in source.fields]
    keep(trace, source, out, [vary_along(ids.repeat_interleave(repeat), out.shape, 1) for ids in channels])
