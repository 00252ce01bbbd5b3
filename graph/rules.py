"""What each operation does to labels: the registry, and what keeps or joins elements.

An operation that has no rule here, in ``products`` or in ``picking`` is refused by name when it meets a label.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .labels import Entry, Untraceable, compressed, reshaped, vary_along, varying

if TYPE_CHECKING:
    from .dispatch import LabelTrace

Rule = Callable[["LabelTrace", Any, Any, Any, Any], None]
RULES: dict[str, Rule] = {}
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


def keep(trace: LabelTrace, source: Entry, out: Tensor, fields: Iterable[Tensor]) -> None:
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
        keep(trace, source, out, moved)
    else:
        for number, part in enumerate(out):
            keep(trace, source, part, [parts[number] for parts in moved])


@rule("view", "_unsafe_view", "reshape")
def same_elements(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Another shape of as many elements (or another dtype of the same)."""
    source = trace.entry(args[0])
    fields = [compressed(reshaped(field, out.shape)) for field in source.fields]
    for before, after in zip(source.fields, fields, strict=True):
        if not source.static:
            trace.split(before, after)
    keep(trace, source, out, fields)


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "tril", "triu", "_conj")
def same_tensor(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A copy."""
    source = trace.entry(args[0])
    keep(trace, source, out, source.fields)


@rule("as_strided")
def restrided(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """The same elements in another order in memory, as some pooling layers do in place."""
    source = trace.entry(args[0])
    if any(tuple(args[1]) != field.shape for field in source.fields):
        raise Untraceable("it makes overlapping views (as_strided)")
    keep(trace, source, out, source.fields)


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
    keep(trace, source, out, [first for first, _ in halves])


@rule("view_as_complex")
def complex_pairs(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """The two halves of a complex number are one channel from now on."""
    source = trace.entry(args[0])
    for field in source.fields:
        trace.unite(field.select(-1, 0), field.select(-1, 1))
    keep(trace, source, out, [field.select(-1, 0) for field in source.fields])


@rule("view_as_real")
def real_pairs(trace: LabelTrace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A complex channel is both its halves."""
    source = trace.entry(args[0])
    keep(trace, source, out, [field.unsqueeze(-1).expand(out.shape) for field in source.fields])


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
    join(trace, result, zip(operands, sources, strict=True))


def join(trace: LabelTrace, out: Tensor, parts: Iterable[tuple[Tensor, Entry]]) -> None:
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
    join(trace, result, [(t, trace.entry(t)) for t in args if isinstance(t, Tensor)])


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
            fields = tuple(along_channels(field, out[0].shape) for field in entry.fields)
            parts.append((tensor, Entry(fields, entry.static, entry.weights)))
    join(trace, out[0], parts)


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


def along_channels(field: Tensor, shape: Iterable[int]) -> Tensor:
    return vary_along(field.contiguous(), list(shape), 1)


def same_everywhere(trace: LabelTrace, field: Tensor, dims: Iterable[int]) -> Tensor:
    """Unite what differs from place to place, because places are mixed; one place of it, dims kept."""
    first = field[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(field.ndim))]
    if not varying(field).isdisjoint(dims):
        trace.unite(field, first.expand(field.shape))
    return first
