"""From united labels to coupled groups: channels that hang on the same ports alike make one group."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .dispatch import LabelTrace
from .indices import IndexMap
from .labels import Ids
from .naming import block_of, names
from .structure import CouplingGroup, Member, Port


@dataclass(frozen=True)
class Classes:
    """Classes of labels; a class is what exists or vanishes together.

    Attributes:
        of_label: label -> class.
        ports: port -> its labels, in the order of the model's parameters.
        rows, columns: whether a label is written, or read, by its weight.
        heads: pairs (class of an attention head, class of a channel that makes its scores).
        values: pairs (class of an attention head, class of a channel that it weighs).
        served: pairs (class of weights alone that serve many channels, class of such a channel).
        group: class -> number of its group, or -1.
    """

    of_label: Ids
    ports: dict[Port, slice]
    rows: NDArray[np.bool_]
    columns: NDArray[np.bool_]
    heads: NDArray[np.int64]
    values: NDArray[np.int64]
    served: NDArray[np.int64]
    group: NDArray[np.int64]


def coupled_groups(
    trace: LabelTrace, blocks: Sequence[str], ties: dict[str, tuple[str, ...]]
) -> tuple[CouplingGroup, ...]:
    """The groups of a finished trace, in the order of the model's parameters.

    Args:
        trace: after the model has run under it.
        blocks: names of the decoder/encoder blocks.
        ties: name of a parameter -> all its names, where it has several.
    """
    classes = _classes(trace)
    members = _members(classes)
    heads, partners = _heads(trace, classes, len(members))
    kinds = _kinds(trace, classes, members, blocks)
    groups = []
    for number, group_members in enumerate(members):
        tied = tuple(dict.fromkeys(ties[m.port.parameter] for m in group_members if m.port.parameter in ties))
        size = len(group_members[0].index.table)
        groups.append(CouplingGroup("", kinds[number], size, tuple(group_members), heads.get(number), ties=tied))
    named = names(groups, blocks)
    reduced = _groups_of(classes, np.flatnonzero(_marked(trace, classes, "reduced")))
    finished = []
    for number, group in enumerate(groups):
        same_heads = tuple(named[partner] for partner in partners[number])
        rotary = _is_rotary(group, [groups[partner] for partner in partners[number]], trace.shapes)
        is_reduced = number in reduced
        finished.append(replace(group, id=named[number], partners=same_heads, rotary=rotary, reduced=is_reduced))
    return tuple(itertools.chain.from_iterable(_experts(group, trace) for group in finished))


# ---------------------------------------------------------------------------------------------- classes


def _classes(trace: LabelTrace) -> Classes:
    of_label = trace.labels.classes()
    count = int(of_label.max(initial=0)) + 1
    ports = {port: slice(first, first + size) for first, (port, size) in trace.labels.ports.items()}
    marks = {}
    for mark in ("row", "written", "consumed", "fixed"):
        marks[mark] = np.zeros(count, dtype=np.bool_)
        marks[mark][of_label[trace.labels.marked(mark)]] = True
        marks[mark][of_label[0]] = False
    heads = _pairs(of_label, trace.bundles)
    is_head = np.zeros(count, dtype=np.bool_)
    is_head[heads[:, 0]] = True
    channel = (marks["row"] | marks["written"]) & (marks["consumed"] | is_head) & ~marks["fixed"]
    signature = np.zeros(count, dtype=np.uint64)
    lots = np.random.default_rng(0).integers(1, 2**63, size=len(ports), dtype=np.uint64)
    for lot, labels in zip(lots, ports.values(), strict=True):
        np.add.at(signature, of_label[labels], lot)
    signature[~channel] = 0
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    none = signature[first] == 0
    order[np.argsort(np.where(none, -1, first), kind="stable")] = np.arange(len(first)) - int(none.any())
    gates = _pairs(of_label, trace.gates)
    serves = is_head[gates[:, 0]]
    group = order[inverse]
    return Classes(
        of_label=of_label,
        ports=ports,
        rows=trace.labels.marked("row"),
        columns=trace.labels.marked("column"),
        heads=heads,
        values=gates[serves],
        served=gates[~serves & (group[gates[:, 0]] < 0) & (group[gates[:, 1]] >= 0)],
        group=group,
    )


def _pairs(of_label: Ids, records: Iterable[tuple[Ids, Ids]]) -> NDArray[np.int64]:
    """Distinct pairs of classes; pairs with label 0 say nothing."""
    count = int(of_label.max(initial=0)) + 1
    found = [np.zeros(0, dtype=np.int64)]
    for first, second in records:
        first, second = np.broadcast_arrays(first, second)
        known = (first > 0) & (second > 0)
        found.append(np.unique(of_label[first[known]].astype(np.int64) * count + of_label[second[known]]))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), count), axis=1)


# ---------------------------------------------------------------------------------------------- members


def _members(classes: Classes) -> list[list[Member]]:
    """For every group its ports with their index maps, heads in consecutive parts."""
    channel = _channel_numbers(classes)
    members: list[list[Member]] = [[] for _ in range(int(classes.group.max(initial=-1)) + 1)]
    interned: dict[IndexMap, IndexMap] = {}
    for port, labels in classes.ports.items():
        of_index = classes.of_label[labels]
        groups = classes.group[of_index]
        axis = _axis(classes, port, labels)
        for number in np.unique(groups[groups >= 0]):
            indices = np.flatnonzero(groups == number)
            order = np.argsort(channel[of_index[indices]], kind="stable")
            size = int(channel[of_index[indices]].max()) + 1
            index = IndexMap(indices[order].reshape(size, -1))
            members[number].append(Member(port, axis, interned.setdefault(index, index)))
    for number, shared in _shared_members(classes, channel).items():
        members[number] += shared
    return members


def _axis(classes: Classes, port: Port, labels: slice) -> str:
    """What the forward says of a port; of a weight that was merged with others, what its dim says."""
    if classes.columns[labels].any():
        return "column"
    return "row" if classes.rows[labels].any() or port.dim == 0 else "column"


def _channel_numbers(classes: Classes) -> NDArray[np.int64]:
    """Class -> number of the channel in its group: by head, then in the order of the first labels."""
    numbers = np.zeros(len(classes.group), dtype=np.int64)
    chosen = np.flatnonzero(classes.group >= 0)
    head = np.zeros(len(classes.group), dtype=np.int64)
    for pairs in (classes.values, classes.heads):
        head[pairs[::-1, 1]] = pairs[::-1, 0]  # of several heads (grouped queries) the first
    order = chosen[np.lexsort((chosen, head[chosen], classes.group[chosen]))]
    groups = classes.group[order]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    numbers[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return numbers


def _shared_members(classes: Classes, channel: NDArray[np.int64]) -> dict[int, list[Member]]:
    """Weights that serve many channels (per-head norms), as members of the groups of these."""
    found: dict[int, list[Member]] = defaultdict(list)
    if not len(classes.served):
        return found
    narrow = np.unique(classes.served[:, 0])
    groups = classes.group[classes.served[:, 1]]
    for port, labels in classes.ports.items():
        of_index = classes.of_label[labels]
        if not np.isin(of_index[:1], narrow).all() or not np.isin(of_index, narrow).all():
            continue
        index_of = dict(zip(of_index.tolist(), range(len(of_index)), strict=True))
        for number in np.unique(groups[np.isin(classes.served[:, 0], of_index)]).tolist():
            pairs = classes.served[(groups == number) & np.isin(classes.served[:, 0], of_index)]
            table: dict[int, list[int]] = defaultdict(list)
            for serving, served in pairs.tolist():
                table[int(channel[served])].append(index_of[serving])
            rows = [sorted(table[c]) for c in sorted(table)]
            if len({len(row) for row in rows}) == 1:
                found[number].append(Member(port, "row", IndexMap(rows), shared=True))
    return found


# ---------------------------------------------------------------------------------------------- heads


def _heads(trace: LabelTrace, classes: Classes, count: int) -> tuple[dict[int, int], list[list[int]]]:
    """Number of heads of each group, and the attention groups that have heads in common."""
    pairs = np.concatenate([classes.heads, classes.values])
    own = np.unique(classes.heads[:, 0])
    pairs = np.concatenate([pairs, np.stack([own, own], axis=1)])  # what is there once per head
    heads = {n: len(keys) for n, keys in _keys_of_groups(classes, _head_keys(classes, pairs)).items()}
    views = _head_keys(classes, _pairs(classes.of_label, trace.splits))
    for number, keys in _keys_of_groups(classes, views, consecutive=True).items():
        if len(keys) > 1:
            heads.setdefault(number, len(keys))
    partners: list[set[int]] = [set() for _ in range(count)]
    in_groups = pairs[classes.group[pairs[:, 1]] >= 0]
    shared = np.unique(np.stack([in_groups[:, 0], classes.group[in_groups[:, 1]]], axis=1), axis=0)
    for same in {tuple(part.tolist()) for part in np.split(shared[:, 1], np.flatnonzero(np.diff(shared[:, 0])) + 1)}:
        for number in same:
            partners[number].update(same)
    return heads, [sorted(found - {number}) for number, found in enumerate(partners)]


def _head_keys(classes: Classes, pairs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Class -> a number that classes of the same set of heads have in common; 0 for none."""
    lots = np.random.default_rng(1).integers(1, 2**63, size=len(classes.group), dtype=np.uint64)
    keys = np.zeros(len(classes.group), dtype=np.uint64)
    np.add.at(keys, pairs[:, 1], lots[pairs[:, 0]])
    return keys


def _keys_of_groups(
    classes: Classes, keys: NDArray[np.uint64], consecutive: bool = False
) -> dict[int, NDArray[np.uint64]]:
    """The keys of those groups in which every channel has one and every key as many channels."""
    found = {}
    chosen = np.flatnonzero((classes.group >= 0) & (keys > 0))
    chosen = chosen[np.argsort(classes.group[chosen], kind="stable")]
    starts = np.flatnonzero(np.diff(classes.group[chosen], prepend=-1))
    totals = np.bincount(classes.group[classes.group >= 0])
    for part in np.split(chosen, starts[1:]) if len(chosen) else ():
        number = int(classes.group[part[0]])
        of_group, sizes = np.unique(keys[part], return_counts=True)
        runs = 1 + np.count_nonzero(np.diff(keys[part]))
        if (
            len(part) == totals[number]
            and len(set(sizes.tolist())) == 1
            and (not consecutive or runs == len(of_group))
        ):
            found[number] = of_group
    return found


def _is_rotary(group: CouplingGroup, partners: Sequence[CouplingGroup], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a query/key channel has several rows of each head: those that the rotary embedding turns."""
    if group.kind != "attention-qk":
        return False
    weights = [m for m in group.members if m.axis == "row" and len(shapes[m.port.parameter]) > 1]
    rows = {m.port.parameter: m.index.table.shape[1] for m in weights}
    if len(rows) > 1:
        return math.gcd(*rows.values()) > 1
    value = next((partner for partner in partners if partner.kind == "attention-vo"), None)
    heads = sum(m.index.table.shape[1] for m in value.members if m.axis == "column") if value else 1
    return sum(rows.values()) > 1 + heads  # a fused projection: its query heads and the key


# ---------------------------------------------------------------------------------------------- kinds and experts


def _kinds(
    trace: LabelTrace, classes: Classes, members: Sequence[Sequence[Member]], blocks: Sequence[str]
) -> list[str]:
    activated, added = (_marked(trace, classes, mark) for mark in ("activated", "added"))
    activated &= ~_marked(trace, classes, "convolved")
    is_of = {
        "attention-vo": _groups_of(classes, classes.values[:, 1]),
        "attention-qk": _groups_of(classes, classes.heads[:, 1]),
    }
    of_heads, of_mlp = _groups_of(classes, classes.heads[:, 0]), _groups_of(classes, np.flatnonzero(activated))
    of_sums = _groups_of(classes, np.flatnonzero(added))
    kinds = []
    for number, group_members in enumerate(members):
        homes = {block_of(member.module, blocks) for member in group_members}
        attention = next((kind for kind, groups in is_of.items() if number in groups), None)
        if number in of_heads:
            kinds.append("attention-heads")
        elif attention is not None and len(homes) == 1:
            kinds.append(attention)
        elif len(homes) > 1 or not blocks:
            is_stream = number in of_sums and {member.axis for member in group_members} == {"row", "column"}
            kinds.append("residual" if is_stream else "channels")
        else:
            kinds.append("mlp" if number in of_mlp and homes != {None} else "channels")
    return kinds


def _marked(trace: LabelTrace, classes: Classes, mark: str) -> NDArray[np.bool_]:
    flags = np.zeros(len(classes.group), dtype=np.bool_)
    flags[classes.of_label[trace.labels.marked(mark)]] = True
    return flags


def _groups_of(classes: Classes, chosen: NDArray[np.int64]) -> set[int]:
    return set(np.unique(classes.group[chosen]).tolist())


def _experts(group: CouplingGroup, trace: LabelTrace) -> list[CouplingGroup]:
    """One group per expert where all members are independent copies in one weight."""
    ports = [member.port for member in group.members]
    if not all(port.parameter in trace.experts and port.dim for port in ports) or group.kind == "residual":
        return [group]
    copies = {trace.experts[port.parameter] for port in ports}
    if len(copies) != 1 or not any(port.dim > 1 for port in ports):
        return [group]
    return [
        replace(
            group,
            id=f"{group.id}.{expert}",
            members=tuple(replace(m, port=replace(m.port, expert=expert)) for m in group.members),
        )
        for expert in range(copies.pop())
    ]
