"""What sums over channels does to labels: matrix products and convolutions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .labels import Entry, core, vary_along, varying
from .rules import along_channels, join, rule, same_everywhere

if TYPE_CHECKING:
    from .dispatch import LabelTrace


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
    join(trace, out, [(out, trace.entry(out)), (bias, trace.entry(bias))])


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
    inputs = [same_everywhere(trace, field, places).reshape(-1) for field in channels]
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
        spread = tuple(along_channels(field, out.shape) for field in entry.fields)
        join(trace, out, [(out, trace.entry(out)), (bias, Entry(spread, entry.static, entry.weights))])


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
