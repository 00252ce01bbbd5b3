"""The weights of one block as boxes, by the branch of the residual stream that they are in: what a picture shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import networkx
import numpy as np

from ..graph import CouplingGroup, ModelGraph

LONGEST = 16  # letters of a line of a label


@dataclass(frozen=True)
class Side:
    """Rows or columns of a weight: for each index the group it belongs to, and where one channel of each is."""

    groups: tuple[str | None, ...]  # by index
    marks: tuple[tuple[str, int], ...]  # (group, index) of one channel

    @property
    def size(self) -> int:
        """How many indices."""
        return len(self.groups)

    @property
    def ids(self) -> set[str]:
        """The groups that have an index here."""
        return {group for group in self.groups if group}


@dataclass(frozen=True)
class Box:
    """A weight of the block, or one expert of it.

    Attributes:
        name: relative to the block.
        label: its name in the picture, in lines.
        notes: what stands under that: its shape, and how many experts there are.
        rows, columns: its sides.
        experts: how many there are of it; 1 unless it is an expert.
    """

    name: str
    label: tuple[str, ...]
    notes: tuple[str, ...]
    rows: Side
    columns: Side
    experts: int = 1


def boxes(graph: ModelGraph, block: str) -> list[Box]:
    """The weight matrices of a block, in the order of the model; of several experts the first."""
    found: dict[str, list[tuple[CouplingGroup, int]]] = {}
    for group in graph.groups:
        for number, member in enumerate(group.members):
            found.setdefault(member.port.parameter, []).append((group, number))
    names = [name for name, shape in graph.shapes.items() if name.startswith(f"{block}.") and len(shape) > 1]
    return [_box(graph, name, name.removeprefix(f"{block}."), found.get(name, [])) for name in names]


def _box(graph: ModelGraph, parameter: str, name: str, parts: Sequence[tuple[CouplingGroup, int]]) -> Box:
    shape = graph.shapes[parameter]
    members = [(group, group.members[number]) for group, number in parts]
    experts = [member.port.expert for _, member in members if member.port.expert is not None]
    axes = {member.port.dim: member.axis for _, member in members}
    first = 1 if experts or (len(shape) == 3 and axes and set(axes) <= {1, 2}) else 0
    row, column = _row_and_column(range(first, len(shape)), axes)
    shown = [(group, m) for group, m in members if m.port.expert in (None, min(experts, default=0))]
    rows, columns = (
        _side(shape[dim], [(group, m.index.table) for group, m in shown if m.port.dim == dim]) for dim in (row, column)
    )
    kernel = [str(shape[dim]) for dim in range(first, len(shape)) if dim not in (row, column)]
    size = f"{shape[row]} × {shape[column]}" + (f" × {'×'.join(kernel)}" if kernel else "")
    count = shape[0] if first else 1
    notes = (size, f"× {count} experts") if count > 1 else (size,)
    return Box(name, _wrapped(name.removesuffix(".weight").rpartition(".")[2]), notes, rows, columns, count)


def _row_and_column(dims: Sequence[int], axes: dict[int, str]) -> tuple[int, int]:
    """The dims of rows and columns, where one of them may belong to no group."""
    row = next((dim for dim in dims if axes.get(dim) == "row"), None)
    column = next((dim for dim in dims if axes.get(dim) == "column" and dim != row), None)
    row = next(dim for dim in dims if dim != column) if row is None else row
    return row, next(dim for dim in dims if dim != row) if column is None else column


def _wrapped(label: str) -> tuple[str, ...]:
    """A name in lines, broken after a dot or an underscore."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]?", label):
        if lines[-1] and len(lines[-1] + part) > LONGEST:
            lines.append("")
        lines[-1] += part
    return tuple(lines)


def _side(size: int, members: Iterable[tuple[CouplingGroup, np.ndarray]]) -> Side:
    owners: list[str | None] = [None] * size
    marks = []
    for group, table in members:
        for index in table.reshape(-1).tolist():
            owners[index] = group.id
        marks += [(group.id, index) for index in table[len(table) // 3].tolist()]
    return Side(tuple(owners), tuple(marks))


@dataclass(frozen=True)
class Branch:
    """Boxes that are connected to each other other than by the residual stream: an attention, a feed-forward part."""

    title: str
    boxes: tuple[Box, ...]


def branches(graph: ModelGraph, block: str, stream: CouplingGroup) -> list[Branch]:
    """The boxes of a block by branch, in the order of the model; those that write to the stream last."""
    found = boxes(graph, block)
    joined = networkx.Graph()
    joined.add_nodes_from(range(len(found)))
    kinds = {group.id: group.kind for group in graph.groups}
    partners = {group.id: set(group.partners) for group in graph.groups}
    for first, second in ((a, b) for b in range(len(found)) for a in range(b)):
        one, other = (_inner(found[number], kinds) for number in (first, second))
        if one & other or any(partners[group] & other or _siblings(group, other, kinds) for group in one):
            joined.add_edge(first, second)
    for number, box in enumerate(found):
        if not _inner(box, kinds) and (near := _nearest(number, found)) is not None:
            joined.add_edge(number, near)
    parts = sorted(sorted(part) for part in networkx.connected_components(joined))
    ordered = [sorted((found[n] for n in part), key=lambda box: stream.id in box.rows.ids) for part in parts]
    return [Branch(_title(part, kinds), tuple(_labelled(part))) for part in ordered]


def _labelled(part: Sequence[Box]) -> list[Box]:
    """Boxes of one branch with labels that tell them apart."""
    labels = _short_names([box.name.removesuffix(".weight") for box in part])
    return [replace(box, label=_wrapped(label)) for box, label in zip(part, labels, strict=True)]


def _short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name, or as many as tell it from the others (``output.dense``)."""
    for parts in range(1, 9):
        short = [".".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(short) and not any(name.isdecimal() for name in short):
            break
    plain = [name.rpartition(".")[2] for name in names]
    return [
        last if plain.count(last) == 1 and not last.isdecimal() else name
        for last, name in zip(plain, short, strict=True)
    ]


def _inner(box: Box, kinds: dict[str, str]) -> set[str]:
    return {group for group in box.rows.ids | box.columns.ids if kinds[group] != "residual"}


def _siblings(group: str, others: set[str], kinds: dict[str, str]) -> bool:
    """Whether values and queries of one attention are among them: ``….self_attn.vo`` with ``….self_attn.qk``."""
    stem = group.rpartition(".")[0]
    return kinds[group].startswith("attention") and any(
        kinds[other].startswith("attention") and other.rpartition(".")[0] == stem for other in others
    )


def _nearest(number: int, found: Sequence[Box]) -> int | None:
    """The box whose name begins alike, for one that has no group of its own: a router goes with its experts."""
    common = [len(_common([found[number].name, box.name])) for box in found]
    common[number] = 0
    best = max(range(len(found)), key=lambda other: common[other])
    return best if common[best] else None


def _common(names: Sequence[str]) -> list[str]:
    parts = [name.removesuffix(".weight").split(".")[:-1] for name in names]
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    return parts[0][: same.index(False) if False in same else len(same)]


def _title(part: Sequence[Box], kinds: dict[str, str]) -> str:
    inner = {kinds[group] for box in part for group in _inner(box, kinds)}
    word = "attention" if any(kind.startswith("attention") for kind in inner) else "feed-forward"
    word = word if inner & {"mlp", *(kind for kind in inner if kind.startswith("attention"))} else ""
    return " · ".join(filter(None, [word, ".".join(_common([box.name for box in part]))]))
