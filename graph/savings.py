"""What a model would save if channels of its groups were removed: a dry run from shapes alone, no weight is touched.

Removing a channel takes its indices out of every member's dimension; a weight of shape ``(rows, columns)`` that loses
r rows and c columns keeps ``(rows - r) * (columns - c)`` numbers.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, unknown_name
from .structure import CouplingGroup, ModelGraph

Removals = Mapping[str, Sequence[int] | int]
"""Group id -> the channels that go, or how many (the first ones)."""

Gone = dict[tuple[int, int | None], NDArray[np.bool_]]
"""Of one parameter: (dim, expert) -> which indices vanish; expert is None where they vanish for the whole of it."""


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: numbers in the weights, tied ones once; running statistics are none.
        flops: multiplications and additions that the traced forward does with the weights (attention scores are
            not among them); None if the graph does not know.
        key_value_elements: rows of keys and values, all attentions together: in a decoder what one token leaves in
            the key/value cache. None if there is no attention, or its keys cannot be told from its queries.
    """

    parameters: int
    flops: int | None
    key_value_elements: int | None


@dataclass(frozen=True)
class Savings:
    """The result of a dry run.

    Attributes:
        before: cost of the model as it is.
        after: cost without the removed channels. Flops shrink with the weight; of experts this is the average
            over experts, as if each were used alike.
        removed: group id -> sorted channels; with the same heads of partner groups, which are added to what was
            asked for.
        shapes: changed parameters -> their new shape; one expert of a 3-D parameter is named
            ``….gate_up_proj.<expert>``.
    """

    before: Cost
    after: Cost
    removed: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]


def savings(graph: ModelGraph, removals: Removals) -> Savings:
    """Cost before and after `removals`.

    Of attention groups whole heads go, and with them the same heads of their partners (values with queries and
    keys), which need not be named; or every head loses as many channels.

    Raises:
        InputError: for an unknown group, a channel that is not there, part of a head, or a group that would lose
            all its channels. Nothing is computed before all is checked.
    """
    groups = {group.id: group for group in graph.groups}
    removed = _with_partners(groups, _checked(groups, removals))
    gone: dict[str, Gone] = {}
    for name, channels in removed.items():
        merge(gone, vanishing(graph, groups[name], channels))
    kept = {name: remaining(graph.shapes[name], lost) for name, lost in gone.items()}
    parameters, flops = total_parameters(graph), sum(graph.flops.values())
    lost_parameters = sum(math.prod(graph.shapes[name]) - kept[name] for name in kept if name not in graph.buffers)
    lost_flops = sum(
        count - round(count * kept[name] / math.prod(graph.shapes[name]))
        for name, count in graph.flops.items()
        if name in kept
    )
    known = bool(graph.flops)
    before = Cost(parameters, flops if known else None, _key_value_elements(graph, {}))
    after = Cost(
        parameters - lost_parameters,
        flops - lost_flops if known else None,
        _key_value_elements(graph, {name: len(channels) for name, channels in removed.items()}),
    )
    shapes = {name: shape for parameter, lost in gone.items() for name, shape in _shapes(graph, parameter, lost)}
    return Savings(before, after, {name: tuple(channels.tolist()) for name, channels in removed.items()}, shapes)


# ---------------------------------------------------------------------------------------------- arithmetic


def total_parameters(graph: ModelGraph) -> int:
    """Number of parameters of the model, tied ones once, running statistics not."""
    return sum(math.prod(shape) for name, shape in graph.shapes.items() if name not in graph.buffers)


def vanishing(
    graph: ModelGraph, group: CouplingGroup, channels: NDArray[np.int64] | slice = slice(None)
) -> dict[str, Gone]:
    """Parameter -> indices that vanish with `channels` (by default all) of `group`.

    An index of a shared member vanishes only when all channels that list it do.
    """
    gone: dict[str, Gone] = {}
    for member in group.members:
        port = member.port
        size = graph.shapes[port.parameter][port.dim]
        mask = np.zeros(size, dtype=bool)
        mask[member.index.table[channels].reshape(-1)] = True
        if member.shared:
            staying = np.ones(group.size, dtype=bool)
            staying[channels] = False
            mask[member.index.table[staying].reshape(-1)] = False
        merge(gone, {port.parameter: {(port.dim, port.expert): mask}})
    return gone


def merge(gone: dict[str, Gone], more: dict[str, Gone]) -> None:
    """Add `more` to `gone`, in place."""
    for parameter, lost in more.items():
        found = gone.setdefault(parameter, {})
        for place, mask in lost.items():
            found[place] = found[place] | mask if place in found else mask


def remaining(shape: tuple[int, ...], gone: Gone) -> int:
    """How many numbers of a parameter of `shape` are left."""
    experts = {expert for _, expert in gone if expert is not None}
    whole = _left(shape, gone, None)
    if not experts:
        return math.prod(whole)
    staying = experts - set(np.flatnonzero(gone[0, None]).tolist()) if (0, None) in gone else experts
    others = (whole[0] - len(staying)) * math.prod(whole[1:])
    return others + sum(math.prod(_left(shape, gone, expert)[1:]) for expert in staying)


def _left(shape: tuple[int, ...], gone: Gone, expert: int | None) -> tuple[int, ...]:
    """What is left of each dim, for one expert or for all of which no expert is named."""
    sizes = []
    for dim, size in enumerate(shape):
        masks = [gone[place] for place in {(dim, None), (dim, expert)} if place in gone]
        sizes.append(size - int(np.count_nonzero(np.logical_or.reduce(masks))) if masks else size)
    return tuple(sizes)


def _shapes(graph: ModelGraph, parameter: str, gone: Gone) -> list[tuple[str, tuple[int, ...]]]:
    """New shapes of a changed parameter: one, or one per expert that is named."""
    shape = graph.shapes[parameter]
    experts = sorted({expert for _, expert in gone if expert is not None})
    if experts and any(expert is None for _, expert in gone):
        experts = list(range(shape[0]))  # all of them change
    if experts:
        return [(f"{parameter}.{expert}", _left(shape, gone, expert)[1:]) for expert in experts]
    left = _left(shape, gone, None)
    return [(parameter, left)] if left != shape else []


def _key_value_elements(graph: ModelGraph, removed: Mapping[str, int]) -> int | None:
    """Rows of keys and values that are left, over all attentions; None if they cannot be told from other rows."""
    groups = {group.id: group for group in graph.groups}
    per_channel: dict[str, int] = {}
    for group in graph.groups:
        if group.kind != "attention-vo":
            continue
        value_rows = sum(_widths(graph, group, "row").values())
        columns = max(_widths(graph, group, "column").values(), default=0)
        keys = [groups[name] for name in group.partners if name in groups and groups[name].kind == "attention-qk"]
        if not keys or not value_rows or not columns or columns % value_rows:
            return None
        repeat = columns // value_rows  # query heads that share a key/value head
        per_channel[group.id] = value_rows
        for partner in keys:
            key_rows = 2 if partner.rotary else 1
            if sum(_widths(graph, partner, "row").values()) != key_rows * (repeat + 1):  # a key and its queries
                return None
            per_channel[partner.id] = key_rows
    if not per_channel:
        return None
    return sum(count * (groups[name].size - removed.get(name, 0)) for name, count in per_channel.items())


def _widths(graph: ModelGraph, group: CouplingGroup, axis: str) -> dict[str, int]:
    """Indices per channel of each weight matrix of the group along `axis`; biases and norms are no matrices."""
    widths: dict[str, int] = {}
    for member in group.members:
        name = member.port.parameter
        if member.axis == axis and len(graph.shapes[name]) > 1:
            widths[name] = widths.get(name, 0) + member.index.table.shape[1]
    return widths


# ---------------------------------------------------------------------------------------------- what is removed


def parse_removals(graph: ModelGraph, texts: Iterable[str]) -> dict[str, list[int] | int]:
    """Read ``GROUP=CHANNELS``: GROUP is an id or a pattern such as ``model.layers.*.mlp``; CHANNELS is how many
    (``128``), or which: ranges and numbers with a dash or a comma in them (``0-127``, ``3,7,64-95``, ``5-5``).

    Raises:
        InputError: if a text is no such pair, a pattern matches nothing, a group is named twice, or a channel is not
            there.
    """
    sizes = {group.id: group.size for group in graph.groups}
    removals: dict[str, list[int] | int] = {}
    for text in texts:
        pattern, _, amount = text.rpartition("=")
        if not pattern or not re.fullmatch(r"[0-9]{1,12}(-[0-9]{1,12})?(,[0-9]{1,12}(-[0-9]{1,12})?)*", amount):
            raise InputError(f"--remove {text}: write GROUP=CHANNELS, e.g. model.layers.0.mlp=128 or =0-127,200")
        for name in _matching(pattern, sizes):
            if name in removals:
                raise InputError(f"--remove {text}: {name} is named twice: give all its channels at once")
            removals[name] = int(amount) if amount.isdigit() else _listed(name, sizes[name], amount)
    return removals


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    if not any(sign in pattern for sign in "*?["):
        if pattern not in names:
            raise unknown_name("group", pattern, names)
        return [pattern]
    matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matching:
        raise InputError(f"--remove {pattern}: no group is called so: 'rowscope graph MODEL' lists them")
    return matching


def _listed(name: str, size: int, amount: str) -> list[int]:
    channels: list[int] = []
    for part in amount.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first)
        if not start <= stop < size:  # before a range is spelled out: it may be absurdly long
            raise InputError(f"group {name} has channels 0 to {size - 1}: {part} is none of them")
        channels.extend(range(start, stop + 1))
    return channels


def _checked(groups: Mapping[str, CouplingGroup], removals: Removals) -> dict[str, NDArray[np.int64]]:
    """Sorted channels of each group that loses any."""
    checked = {}
    for name, wanted in removals.items():
        if name not in groups:
            raise unknown_name("group", name, groups)
        size = groups[name].size
        listed = [wanted] if isinstance(wanted, int | np.integer) else wanted
        if isinstance(listed, str) or not all(isinstance(n, int | np.integer) and n is not True for n in listed):
            raise InputError(f"channels of {name}: give how many, or a list of whole numbers")
        if isinstance(wanted, int | np.integer):
            if not 0 <= wanted <= size:
                raise InputError(f"group {name} has {size} channels: {wanted} cannot be removed")
            wanted = range(wanted)
        channels = np.unique(np.array(list(wanted), dtype=np.int64))
        if len(channels) and not 0 <= channels[0] <= channels[-1] < size:
            odd = int(channels[0] if channels[0] < 0 else channels[-1])
            raise InputError(f"group {name} has channels 0 to {size - 1}: {odd} is none of them")
        if len(channels):
            checked[name] = channels
    return checked


def _with_partners(
    groups: Mapping[str, CouplingGroup], removed: dict[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    """Add the same heads of all partners, of their partners too, and check that something is left everywhere."""
    removed, waiting = dict(removed), list(removed)
    while waiting:
        group = groups[waiting.pop()]
        heads = _whole_heads(group, removed[group.id])
        for partner in (groups[name] for name in group.partners if len(heads)):
            if partner.heads != group.heads:
                raise InputError(f"no head of {group.id} can go alone: {partner.id} serves all its heads at once")
            part = partner.size // (partner.heads or partner.size)
            more = np.add.outer(heads * part, np.arange(part)).reshape(-1)
            before = removed.get(partner.id, np.array([], dtype=np.int64))
            removed[partner.id] = np.union1d(before, more)
            if len(removed[partner.id]) > len(before):
                waiting.append(partner.id)
    for name, channels in removed.items():
        if len(channels) == groups[name].size:
            raise InputError(f"group {name} would lose all its {len(channels)} channels: leave it at least one")
    return {group.id: removed[group.id] for group in groups.values() if group.id in removed}


def _whole_heads(group: CouplingGroup, channels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Heads that go as a whole. Raises InputError if the others do not all lose alike."""
    if group.heads is None:
        return np.array([], dtype=np.int64)
    flat = np.zeros(group.size, dtype=bool)
    flat[channels] = True
    gone = flat.reshape(group.heads, -1)
    others = gone[~gone.all(axis=1)]
    alike = others == others[:1] if group.rotary else others.sum(axis=1) == others[:1].sum()
    if not np.all(alike):
        part, how = gone.shape[1], "the same" if group.rotary else "as many"
        raise InputError(
            f"group {group.id} has {group.heads} heads of {part} channels (0-{part - 1} is the first): "
            f"remove whole heads, or {how} channels of every head"
        )
    return np.flatnonzero(gone.all(axis=1))
