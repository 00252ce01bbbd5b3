"""What each operation does to labels. An operation that is not here is refused by name when it meets a label."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .labels import Entry, Untraceable, compressed, core, first_of, reshaped, vary_along, varying

if TYPE_CHECKING:
    from .dispatch import LabelTrace

Rule = Callable[["LabelTrace", Any, Any, Any, Any], None]
RULES: dict[str, Rule] = {}
SUMS = {"sum", "mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"}
"""Reductions to which a channel of zeros adds nothing, but for the number of channels."""
ACTIVATIONS = {
    "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "selu", "sigmoid",
    "silu", "softplus", "tanh", "_prelu_kernel",
}  # fmt: skip


def propagate(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Give `out` the labels that `func` passes on. Raises Untraceable for an unknown operation."""
    name = func._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and _is_pointwise(name.removesuffix("_")):
        rule = pointwise
    if rule is None and func.is_view:
        rule = same_view
    if rule is None:
        raise Untraceable(f"what the operation {name} does to channels is not known")
    rule(trace, func, args, kwargs, out)


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch says of the operation that it works element by element; operations in place do not say."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operations, in place or not."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def _keep(trace: LabelTrace, source: Entry, out: Tensor, fields: Iterable[Tensor]) -> None:
    trace.set(out, fields, source)


# ---------------------------------------------------------------------------------------------- same elements


@rule(
    "roll", "flip", "repeat", "rot90", "unfold", "_reshape_alias", "squeeze", "unsqueeze", "transpose", "t",
    "pixel_shuffle", "pixel_unshuffle", "unsafe_split", "unsafe_split_with_sizes",
)  # fmt: skip
def same_view(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The operation only moves elements: so it does with labels."""
    source = trace.entry(args[0])
    name = func._schema.name.removeprefix("aten::")
    move = getattr(torch.ops.aten, name.removesuffix("_")) if name.endswith("_") else func  # a field is not written to
    moved = [move(field, *args[1:], **kwargs) for field in source.fields]
    if isinstance(out, Tensor):
        _keep(trace, source, out, moved)
    else:
        for number, part in enumerate(out):
            _keep(trace, source, part, [parts[number] for parts in moved])


@rule("view", "_unsafe_view", "reshape")
def same_elements(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Another shape of as many elements (or another dtype of the same)."""
    source = trace.entry(args[0])
    fields = [compressed(reshaped(field, out.shape)) for field in source.fields]
    for before, after in zip(source.fields, fields, strict=True):
        if not source.static:
            trace.split(before, after)
    _keep(trace, source, out, fields)


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "tril", "triu", "_conj")
def same_tensor(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A copy."""
    source = trace.entry(args[0])
    _keep(trace, source, out, source.fields)


@rule("as_strided")
def restrided(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """The same elements in another order in memory, as some pooling layers do in place."""
    source = trace.entry(args[0])
    if any(tuple(args[1]) != field.shape for field in source.fields):
        raise Untraceable("it makes overlapping views (as_strided)")
    _keep(trace, source, out, source.fields)


@rule(
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "bernoulli", "fill", "zero", "isin",
    "bucketize", "searchsorted",
)  # fmt: skip
def nothing(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Shapes or ranks alone are taken from the tensor, no channel."""


@rule("copy")
def copied(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Writing a whole tensor, or a part of one in place."""
    source = trace.entry(args[1])
    fields = [field.expand(out.shape) for field in source.fields]
    trace.set(out, fields, source)
    if not out._is_view() or out._base is None:
        return
    base, known = out._base, trace.entry(out._base).fields
    if len(fields) > 1 or len(known) > 1 or not base.is_contiguous():
        raise Untraceable("it writes several kinds of channels into a part of a tensor in place")
    whole = known[0].contiguous() if known else torch.zeros(base.shape, dtype=torch.int32)
    part = whole.as_strided(out.shape, out.stride(), out.storage_offset() - base.storage_offset())
    part.copy_(fields[0] if fields else torch.zeros((), dtype=torch.int32))
    trace.set(base, [whole])


@rule("glu")
def gated_halves(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """One half gates the other."""
    source = trace.entry(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % out.ndim
    halves = [field.chunk(2, dim) for field in source.fields]
    for first, second in halves:
        trace.unite(first, second)
        trace.mark("activated", first)
    _keep(trace, source, out, [first for first, _ in halves])


@rule("view_as_complex")
def complex_pairs(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """The two halves of a complex number are one channel from now on."""
    source = trace.entry(args[0])
    for field in source.fields:
        trace.unite(field.select(-1, 0), field.select(-1, 1))
    _keep(trace, source, out, [field.select(-1, 0) for field in source.fields])


@rule("view_as_real")
def real_pairs(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A complex channel is both its halves."""
    source = trace.entry(args[0])
    _keep(trace, source, out, [field.unsqueeze(-1).expand(out.shape) for field in source.fields])


# ---------------------------------------------------------------------------------------------- element by element


@rule("polar", "complex", "real", "imag", "native_dropout", "hardswish", "_prelu_kernel")
def pointwise(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Every operand gives its channel to the result: channels that meet are one."""
    result = out if isinstance(out, Tensor) else out[0]
    sources = [trace.entry(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    dynamic = [source.fields for source in sources if source.fields and not source.static]
    if name in ACTIVATIONS or (name == "add" and len(dynamic) > 1):
        for field in itertools.chain.from_iterable(dynamic):
            trace.mark("activated" if name in ACTIVATIONS else "added", field)
    _join(trace, result, zip(operands, sources, strict=True))


def _join(trace: LabelTrace, out: Tensor, parts: Iterable[tuple[Tensor, Entry]]) -> None:
    """The labels of an element-wise result, broadcast to its shape.

    A weight that meets a computed tensor only says something along the dims in which that one has channels: a
    position embedding is no row per position.
    """
    labelled = [(tensor, entry) for tensor, entry in parts if entry.fields]
    dynamic: list[list[Tensor]] = []
    static: list[list[Tensor]] = []
    for _, entry in labelled:
        fields = [field.expand(out.shape) for field in entry.fields]
        (static if entry.static else dynamic).append(fields)
    joined = trace.joined(dynamic)
    if joined:
        channels = [varying(field) for field in joined]
        static = [[field for field in part if any(varying(field) <= dims for dims in channels)] for part in static]
    is_static = bool(labelled) and not dynamic
    of_weights = all(entry.static or entry.merged for _, entry in labelled)
    for field in itertools.chain.from_iterable(static):
        trace.mark("written" if of_weights else "row", field)
    weights = frozenset().union(*(entry.weights for _, entry in labelled)) if is_static else frozenset()
    like = Entry((), is_static, weights, merged=of_weights and not is_static)
    trace.set(out, trace.joined([joined, *static] if joined else static), like)


@rule("native_layer_norm", "_fused_rms_norm", "_weight_norm_interface")
def layer_norm(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Each channel is scaled and shifted by its own weight and bias."""
    result = out if isinstance(out, Tensor) else out[0]
    for field in trace.entry(args[0]).fields:
        trace.mark("reduced", field)
    _join(trace, result, [(t, trace.entry(t)) for t in args if isinstance(t, Tensor)])


@rule(
    "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
)  # fmt: skip
def batch_norm(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Each channel (dim 1) has its own weight, bias and running statistics."""
    parts = [(args[0], trace.entry(args[0]))]
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            entry = trace.entry(tensor)
            fields = tuple(_along_channels(field, out[0].shape) for field in entry.fields)
            parts.append((tensor, Entry(fields, entry.static, entry.weights)))
    _join(trace, out[0], parts)


@rule("native_group_norm")
def group_norm(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """As batch norm; the norm's groups must stay of equal size, so they lose channels at the same places."""
    batch_norm(trace, func, args[:3], kwargs, out)
    groups = args[7] if len(args) > 7 else kwargs["group"]
    for field in trace.entry(out[0]).fields:
        trace.mark("reduced", field)
        if groups > 1 and 1 in varying(field):
            parts = field.unflatten(1, (groups, -1))
            trace.unite(parts, parts[:, :1].expand(parts.shape))


def _along_channels(field: Tensor, shape: Iterable[int]) -> Tensor:
    return vary_along(field.contiguous(), list(shape), 1)


# ---------------------------------------------------------------------------------------------- products


@rule("mm")
def mm(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``(n, k) @ (k, m)``."""
    _product(trace, out, args[0], args[1], lambda a: a.unsqueeze(1), lambda b: b.t().unsqueeze(0))


@rule("bmm")
def bmm(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``(b, n, k) @ (b, k, m)``."""
    _product(trace, out, args[0], args[1], lambda a: a.unsqueeze(2), lambda b: b.transpose(1, 2).unsqueeze(1))


@rule("mv")
def mv(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``(n, k) @ (k,)``."""
    _product(trace, out, args[0], args[1], lambda a: a, lambda b: b.unsqueeze(0))


@rule("addmm", "baddbmm")
def product_and_bias(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A product plus a bias, added element by element."""
    bias, first, second = args[:3]
    (mm if first.ndim == 2 else bmm)(trace, func, (first, second), {}, out)
    _join(trace, out, [(out, trace.entry(out)), (bias, trace.entry(bias))])


def _product(trace: LabelTrace, out: Tensor, a: Tensor, b: Tensor, spread_a: Any, spread_b: Any) -> None:
    """A sum over the last dim of a common space, the others being `out`'s.

    Channels of both operands that meet in the sum are one. Channels along the other dims stay. Where none stays but
    what was summed up differs along other dims (queries with keys, head by head), each of these makes a new label.
    """
    entry_a, entry_b = trace.entry(a), trace.entry(b)
    space = (*out.shape, a.shape[-1])
    last = out.ndim
    both = []
    for entry, spread in ((entry_a, spread_a), (entry_b, spread_b)):
        fields = [spread(field).expand(space) for field in entry.fields]
        both.append(([f for f in fields if last in varying(f)], [f for f in fields if last not in varying(f)]))
        if entry.static:
            trace.flops.update({w: trace.flops.get(w, 0) + 2 * math.prod(space) for w in entry.weights})
    (summed_a, kept_a), (summed_b, kept_b) = both
    of_weights = (entry_a.static or entry_a.merged) and (entry_b.static or entry_b.merged)
    merged = of_weights and not _is_table(trace, summed_a, summed_b)
    if of_weights and not merged:
        kept_a = []  # its positions are no channels
    for entry, summed, kept in ((entry_a, summed_a, kept_a), (entry_b, summed_b, kept_b)):
        if entry.static or entry.merged:
            _mark_weight(trace, summed, kept, says_axes=not (of_weights or entry.merged))
    if entry_b.static and not merged and out.shape[-1] > 1 and not any(last - 1 in varying(f) for f in kept_b):
        kept_b = [*kept_b, trace.unknown(space, last - 1)]  # a weight whose rows were picked or sorted
    trace.matched(summed_a, summed_b)
    summed = [*summed_a, *summed_b]
    for field in summed:
        trace.mark("consumed", field)
    kept = trace.joined([[field.select(last, 0) for field in fields] for fields in (kept_a, kept_b)])
    if not kept and summed_a and summed_b:
        kept = [_bundled(trace, summed, last).select(last, 0)]
    trace.set(out, kept, merged=merged)


def _mark_weight(trace: LabelTrace, summed: list[Tensor], kept: list[Tensor], says_axes: bool) -> None:
    """Note what of a weight is read and written; a product of weights alone does not say which is which."""
    for field in summed:
        trace.mark("column" if says_axes else "written", field)
    for field in kept:
        trace.mark("row" if says_axes else "written", field)


def _is_table(trace: LabelTrace, summed_a: list[Tensor], summed_b: list[Tensor]) -> bool:
    """Whether a product of two weights reads the first as data: learned queries, or a table of positions.

    A linear layer sums over the second dim of its weight, a low-rank update over the first of its right factor.
    """
    if not summed_a or not summed_b:
        return False
    return trace.labels.dim_of(int(summed_b[0][core(summed_b[0])].reshape(-1)[0])) > 0


def _bundled(trace: LabelTrace, summed: list[Tensor], last: int) -> Tensor:
    """A field of new labels, one for each different set of channels that was summed up (a head)."""
    fields = [trace.standing(field) for field in summed]
    dims = sorted(frozenset().union(*(varying(field) for field in fields)) - {last})
    small = tuple(slice(None) if d in (*dims, last) else slice(0, 1) for d in range(last + 1))
    shape = fields[0][small].shape
    channels = fields[0][small].reshape(-1, shape[last]).numpy()
    _, heads = np.unique(channels, axis=0, return_inverse=True)
    heads = heads.reshape(-1)
    ids = trace.labels.new(int(heads.max()) + 1)[heads]
    for field in summed:
        own = field[small].reshape(-1).numpy()
        trace.bundles.append((np.repeat(ids, shape[last]), own))
    return torch.from_numpy(ids).view(*shape[:last], 1).expand(fields[0].shape)


@rule("convolution")
def convolution(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Weight ``(out, in / groups, …)``, transposed ``(in, out / groups, …)``; groups stay of equal size."""
    image, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    weights, in_dim = trace.entry(weight), 0 if transposed else 1
    uses = out.numel() * weight.shape[1] if not transposed else image.numel() * weight.shape[1]
    for name in weights.weights:
        trace.flops[name] = trace.flops.get(name, 0) + 2 * uses * math.prod(weight.shape[2:])
    places = [dim for dim in range(image.ndim) if dim != 1]
    channels = [f for f in trace.entry(image).fields if 1 in varying(f)]
    inputs = [_same_everywhere(trace, field, places).reshape(-1) for field in channels]
    readers = _labels_along(weights, in_dim, 1 if transposed else groups)
    writers = _labels_along(weights, 1 - in_dim, groups if transposed else 1)
    trace.matched(inputs, readers)
    for ids in (*inputs, *readers, *writers):
        trace.mark("convolved", ids)
    for ids in readers:
        trace.mark("column", ids)
        trace.mark("consumed", ids)
    for ids in writers:
        trace.mark("row", ids)
        if groups > 1:
            _keep_groups_equal(trace, ids.view(groups, -1), inputs if image.shape[1] == groups else [])
    trace.set(out, [vary_along(ids, out.shape, 1) for ids in writers])
    if isinstance(bias, Tensor):
        entry = trace.entry(bias)
        spread = tuple(_along_channels(field, out.shape) for field in entry.fields)
        _join(trace, out, [(out, trace.entry(out)), (bias, Entry(spread, entry.static, entry.weights))])


def _labels_along(weights: Entry, dim: int, groups: int) -> list[Tensor]:
    """Labels along a dim of a weight, over all its conv groups."""
    found = [field for field in weights.fields if varying(field) == {dim}]
    return [field.select(1 - dim, 0).reshape(field.shape[dim], -1)[:, 0].repeat(groups) for field in found]


def _keep_groups_equal(trace: LabelTrace, writers: Tensor, inputs: list[Tensor]) -> None:
    """Conv groups lose output channels at the same places; where a group is one input channel, they go with it."""
    if not inputs:
        trace.unite(writers, writers[:1].expand(writers.shape))
    for ids in inputs:
        trace.unite(writers, ids.unsqueeze(1).expand(writers.shape))


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
        _keep(trace, source, out, [func(field, indices) for field in source.fields])
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
    _keep(trace, source, out, shaped)


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
    _keep(trace, source, result, [*fields, *_disordered(trace, source, dim, result)])


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
    _join(trace, out, [(target, trace.entry(target)), (source, Entry(fields, entry.static, entry.weights))])


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
    _join(trace, out, [(target, trace.entry(target)), (values, Entry(tuple(fields), entry.static, entry.weights))])


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
        _keep(trace, entry, tensors[-1], [field.unsqueeze(dim) for field in entry.fields])
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
    _keep(trace, source, out, source.fields)


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
        _keep(trace, source, result, fields)


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
    fields = [_same_everywhere(trace, field, dims) for field in source.fields]
    _keep(trace, source, result, [field.expand(result.shape) for field in fields])


def _same_everywhere(trace: LabelTrace, field: Tensor, dims: Iterable[int]) -> Tensor:
    """Unite what differs from place to place, because places are mixed; one place of it, dims kept."""
    first = field[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(field.ndim))]
    if not varying(field).isdisjoint(dims):
        trace.unite(field, first.expand(field.shape))
    return first


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
    _keep(trace, source, out, fields)


@rule("im2col")
def unfolded(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``(batch, channels, height, width)`` to ``(batch, channels × kernel, places)``."""
    source = trace.entry(args[0])
    repeat = out.shape[1] // args[0].shape[1]
    channels = [_same_everywhere(trace, field, (0, 2, 3)).reshape(-1) for field in source.fields]
    _keep(trace, source, out, [vary_along(ids.repeat_interleave(repeat), out.shape, 1) for ids in channels])
