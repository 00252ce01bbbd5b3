"""The picture of a model's structure: one block as boxes round the residual stream, or groups from left to right.

A box is a weight. Its rows, the outputs, are its right side; its columns, the inputs, are its top. A side has the
colour of the group that its indices belong to, so sides of one colour vanish together. All lengths are in inches.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import networkx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from ..errors import InputError, unknown_name
from ..graph import CouplingGroup, Member, ModelGraph
from ..graph.views import block_of, condensed, folded
from .drawing import ACCENT, INK, MUTED, WARM, save, styled

WIDTH = 7.5
LARGEST, FITTING, SMALLEST = 1.5, 0.8, 0.12  # the longest side of a box: at most, to fit a line, and of any box
STRIP = 0.07  # thickness of a coloured side
MARGIN = 0.15
STREAM = 0.62  # right side of the residual stream
GAP = 0.3
FIRST = STREAM + 0.35  # left side of the first box
LETTER, LINE = 0.068, 0.145  # width and height of a letter of 8 points
LONGEST, LEGEND_LETTERS = 16, 84  # letters of a line of a label, and of the legend
SAMPLES = 120  # places at which the colour of a side is asked
PAPER, NOTE = "#f4f5f7", "#5b6168"
KINDS = {"residual": ACCENT, "mlp": WARM, "attention-vo": "#2f8f6b", "attention-qk": "#8459a8"}
OTHERS = ("#b8405e", "#a3862a", "#2f8f9d", "#7a5c4a", "#5d7a1f", "#c06fb0")
BARE = "#c9cdd3"  # a side that belongs to no group


def block_picture(graph: ModelGraph, path: Path, block: str | None = None) -> None:
    """Write the picture of one block as PNG or SVG, by the suffix of `path`, atomically.

    Args:
        graph: of the model.
        path: of the picture.
        block: name of the block; by default the first of those with most groups. A model without blocks on a residual
            stream is drawn as its groups, from left to right.

    Raises:
        InputError: if there is no such block, or the graph has no groups.
    """
    save(structure_figure(graph, block), path)


def structure_figure(graph: ModelGraph, block: str | None = None) -> Figure:
    """The figure that :func:`block_picture` writes."""
    if not graph.groups:
        raise InputError("the model has no coupled groups: there is nothing to draw")
    if block is not None and block not in graph.blocks:
        raise unknown_name("block", block, graph.blocks)
    counts = dict.fromkeys(graph.blocks, 0)
    for group in graph.groups:
        if place := block_of(graph, group.id):
            counts[place] += 1
    name = block or max(counts, key=lambda place: counts[place], default="")
    stream = _stream(graph, name)
    if stream is None:
        return groups_figure(graph)
    return block_figure(graph, name, stream)


def _stream(graph: ModelGraph, block: str) -> CouplingGroup | None:
    """The residual group with most members in the block."""
    found = [
        (sum(member.module.startswith(f"{block}.") for member in group.members), group)
        for group in graph.groups
        if block and group.kind == "residual"
    ]
    most, group = max(found, key=lambda pair: pair[0], default=(0, None))
    return group if most else None


# ---------------------------------------------------------------------------------------------- what is drawn


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


# ---------------------------------------------------------------------------------------------- a block


@dataclass(frozen=True)
class Placed:
    """A box in the picture: its left and upper side, width and height."""

    box: Box
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Right side, with its coloured strip."""
        return self.x + self.width + STRIP

    @property
    def top(self) -> float:
        """Upper side, with its coloured strip."""
        return self.y - STRIP

    @property
    def middle(self) -> float:
        """Where arrows enter from above."""
        return self.x + self.width / 2


@dataclass(frozen=True)
class Palette:
    """Groups of the picture: the id of the stream, a colour for each, those that some matrix of the model writes."""

    stream: str
    colours: dict[str, str]
    written: frozenset[str]


@styled
def block_figure(graph: ModelGraph, block: str, stream: CouplingGroup) -> Figure:
    """One block: branches under each other, beside the residual stream that they read from and write to."""
    parts = branches(graph, block, stream)
    shown = [box for part in parts for box in part.boxes]
    palette = _palette(graph, stream, shown)
    scale = _scale(parts)
    lines = [(part.title, line) for part in parts for line in _lines(part.boxes, scale)]
    legend = _legend(graph, block, palette.colours)
    figure = Figure(figsize=(WIDTH, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    y = top = _heading(axes, graph, block)
    for title, line in lines:
        y = _draw_line(axes, title, line, y, scale, palette)
    _draw_stream(axes, stream, top, y)
    height = _draw_legend(axes, legend, y + 0.5) + 0.1
    figure.set_size_inches(WIDTH, height)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    names = ", ".join(dict.fromkeys(title for title, _ in lines))
    figure.set_label(f"Diagram: weights of {block} ({names}) as boxes; sides of one coupled group have one colour.")
    return figure


def _palette(graph: ModelGraph, stream: CouplingGroup, shown: Sequence[Box]) -> Palette:
    """A colour for each group that is drawn, the stream's first: by kind, and another for the second of a kind."""
    ids = {group for box in shown for group in box.rows.ids | box.columns.ids}
    colours, others = {stream.id: ACCENT}, iter(OTHERS * (1 + len(ids)))
    for group in graph.groups:
        if group.id in ids and group.id not in colours:
            own = KINDS.get(group.kind)
            colours[group.id] = own if own and own not in colours.values() else next(others)
    drawn = [group for group in graph.groups if group.id in colours]
    written = {group.id for group in drawn if any(_is_written(graph, member) for member in group.members)}
    return Palette(stream.id, colours, frozenset(written))


def _is_written(graph: ModelGraph, member: Member) -> bool:
    """Whether the member is the rows of a matrix; the table of a lookup is read at its columns and written nowhere."""
    return member.axis == "row" and len(graph.shapes[member.port.parameter]) > 1


def _scale(parts: Sequence[Branch]) -> float:
    """Inches per square root of a size: as large as lets every branch stand in one line."""
    largest = math.sqrt(max(side.size for part in parts for box in part.boxes for side in (box.rows, box.columns)))
    longest = np.arange(LARGEST, FITTING, -0.05)
    fitting = (size for size in longest if all(len(list(_lines(part.boxes, size / largest))) == 1 for part in parts))
    return float(next(fitting, 1.0)) / largest


def _size(box: Box, scale: float) -> tuple[float, float]:
    """Width and height, both as the square root of how many."""
    width, height = (max(SMALLEST, scale * math.sqrt(side.size)) for side in (box.columns, box.rows))
    return width, height


def _label_width(box: Box) -> float:
    return LETTER * max(map(len, (*box.label, *box.notes)))


def _slot(box: Box, scale: float) -> float:
    """Width that a box takes, with its label."""
    return max(_size(box, scale)[0] + STRIP, _label_width(box))


def _lines(shown: Sequence[Box], scale: float) -> Iterator[tuple[Box, ...]]:
    """Boxes that fit beside each other."""
    line: list[Box] = []
    for box in shown:
        if line and sum(_slot(b, scale) + GAP for b in [*line, box]) > WIDTH - FIRST - MARGIN:
            yield tuple(line)
            line = []
        line.append(box)
    yield tuple(line)


def _heading(axes: Axes, graph: ModelGraph, block: str) -> float:
    alike = next((fold for fold in folded(graph) if block in fold.blocks), None)
    others = f", one of {len(alike.blocks)} identical blocks" if alike and len(alike.blocks) > 1 else ""
    axes.text(MARGIN, 0.27, f"{block}{others}", fontsize=11, va="center", weight="bold")
    return 0.5


def _draw_line(axes: Axes, title: str, line: Sequence[Box], y: float, scale: float, palette: Palette) -> float:
    """Draw boxes beside each other with their arrows; returns where the next line begins."""
    axes.text(FIRST - 0.1, y + 0.12, title, fontsize=9, va="center", weight="bold")
    read, link, top = y + 0.36, y + 0.56, y + 0.86
    x, placed = FIRST, []
    for box in line:
        width, height = _size(box, scale)
        slot = _slot(box, scale)
        placed.append(Placed(box, x + (slot - width - STRIP) / 2, top, width, height))
        x += slot + GAP
    bottom = max(_below(p) + LINE * len(p.box.label + p.box.notes) for p in placed) + 0.12
    _draw_links(axes, placed, link, palette)
    _draw_reads(axes, [p for p in placed if palette.stream in p.box.columns.ids], read)
    _draw_writes(axes, [p for p in placed if palette.stream in p.box.rows.ids], bottom)
    for p in placed:
        _draw_box(axes, p, palette.colours)
    return bottom + 0.25


def _below(p: Placed) -> float:
    """Where the label of a box begins."""
    return p.y + p.height + 0.06 + (0.1 if p.box.experts > 1 else 0)


def _draw_box(axes: Axes, p: Placed, colours: dict[str, str]) -> None:
    for shift in (0.1, 0.05, 0) if p.box.experts > 1 else (0,):
        axes.add_patch(Rectangle((p.x - shift, p.y + shift), p.width, p.height, fc=PAPER, ec=MUTED, lw=0.6))
    for start, stop, group in _runs(p.box.columns):
        place = (p.x + start * p.width, p.top)
        axes.add_patch(Rectangle(place, (stop - start) * p.width, STRIP, fc=colours.get(group, BARE), lw=0))
    for start, stop, group in _runs(p.box.rows):
        place = (p.x + p.width, p.y + start * p.height)
        axes.add_patch(Rectangle(place, STRIP, (stop - start) * p.height, fc=colours.get(group, BARE), lw=0))
    for group, index in p.box.columns.marks:
        x = p.x + (index + 0.5) / p.box.columns.size * p.width
        axes.plot([x, x], [p.y, p.y + p.height], color=colours[group], lw=0.9, alpha=0.7, solid_capstyle="butt")
    for group, index in p.box.rows.marks:
        y = p.y + (index + 0.5) / p.box.rows.size * p.height
        axes.plot([p.x, p.x + p.width], [y, y], color=colours[group], lw=0.9, alpha=0.7, solid_capstyle="butt")
    for number, text in enumerate(p.box.label + p.box.notes):
        size, colour = (8, INK) if number < len(p.box.label) else (7.5, NOTE)
        axes.text(p.middle, _below(p) + LINE * number, text, fontsize=size, ha="center", va="top", color=colour)


def _runs(side: Side) -> Iterator[tuple[float, float, str]]:
    """(start, stop, group) of consecutive indices of one group, as shares of the side; an empty id is no group."""
    places = [side.groups[int((sample + 0.5) / SAMPLES * side.size)] or "" for sample in range(SAMPLES)]
    start = 0
    for stop in range(1, SAMPLES + 1):
        if stop == SAMPLES or places[stop] != places[start]:
            yield start / SAMPLES, stop / SAMPLES, places[start]
            start = stop


def _draw_links(axes: Axes, placed: Sequence[Placed], y: float, palette: Palette) -> None:
    """From the rows of a group to its columns, above the boxes; a short arrow where the rows are elsewhere."""
    for group, colour in palette.colours.items():
        sources = [p for p in placed if group in p.box.rows.ids]
        targets = [p for p in placed if group in p.box.columns.ids]
        if group == palette.stream or group not in palette.written or not targets:
            continue
        ends = [p.right - STRIP / 2 for p in sources] + [p.middle for p in targets]
        if sources:
            _path(axes, [(min(ends), y), (max(ends), y)], colour)
        for p in sources:
            _path(axes, [(p.right - STRIP / 2, y), (p.right - STRIP / 2, p.y)], colour)
        for p in targets:
            _arrow(axes, [(p.middle, y), (p.middle, p.top)], colour)


def _draw_reads(axes: Axes, readers: Sequence[Placed], y: float) -> None:
    """From the stream, above everything else, down to each reader."""
    for p in readers:
        _path(axes, [(p.middle, y + 0.08), (p.middle, p.top - 0.1)], "white", width=4.5)  # what it crosses is below
        _arrow(axes, [(p.middle, y), (p.middle, p.top)], ACCENT)
    if readers:
        _path(axes, [(STREAM, y), (max(p.middle for p in readers), y)], ACCENT)


def _draw_writes(axes: Axes, writers: Sequence[Placed], y: float) -> None:
    """From each writer, below everything else, back to the stream."""
    for p in writers:
        start, beside = p.y + p.height / 2, max(p.right, p.middle + _label_width(p.box) / 2) + 0.12
        _arrow(axes, [(p.right, start), (beside, start), (beside, y), (STREAM, y)], ACCENT)


def _path(axes: Axes, points: Sequence[tuple[float, float]], colour: str, width: float = 1.3) -> None:
    cap: Literal["butt", "projecting"] = "butt" if colour == "white" else "projecting"
    axes.plot(*zip(*points, strict=True), color=colour, lw=width, solid_capstyle=cap, solid_joinstyle="miter")


def _arrow(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A line round corners with a head at its end."""
    (x, y), (from_x, from_y) = points[-1], points[-2]
    length, half = 0.1, 0.045
    unit = math.hypot(x - from_x, y - from_y)
    along, across = ((x - from_x) / unit, (y - from_y) / unit), ((from_y - y) / unit, (x - from_x) / unit)
    back = (x - length * along[0], y - length * along[1])
    head = [(x, y), *((back[0] + side * across[0], back[1] + side * across[1]) for side in (half, -half))]
    _path(axes, [*points[:-1], back], colour)
    axes.add_patch(Polygon(head, fc=colour, lw=0, zorder=2.5))


def _draw_stream(axes: Axes, stream: CouplingGroup, top: float, bottom: float) -> None:
    left, middle = STREAM - 0.16, STREAM - 0.08
    tip, wings = bottom + 0.22, (left - 0.09, STREAM + 0.09)
    outline = [(left, top), (STREAM, top), (STREAM, bottom), (wings[1], bottom), (middle, tip)]
    axes.add_patch(Polygon([*outline, (wings[0], bottom), (left, bottom)], fc=ACCENT, lw=0))
    text = f"residual stream, {stream.size} channels"
    axes.text(left - 0.12, (top + bottom) / 2, text, rotation=90, ha="center", va="center", fontsize=9)


# ---------------------------------------------------------------------------------------------- words


def _legend(graph: ModelGraph, block: str, colours: dict[str, str]) -> list[tuple[str, str]]:
    """(colour, words) of each group that is drawn; with its name where words alone do not tell it from another."""
    groups = {group.id: group for group in graph.groups}
    words = {name: in_words(groups[name]) for name in colours}
    common = Counter(words.values())
    legend = []
    for name, colour in colours.items():
        text = words[name] + (f" of {name.removeprefix(f'{block}.')}" if common[words[name]] > 1 else "")
        norms = _norms(graph, groups[name], block)
        legend.append((colour, text + (f"; also {', '.join(norms)}" if norms else "")))
    return legend


def in_words(group: CouplingGroup) -> str:
    """What a group is, for people who meet the word for the first time."""
    if group.kind == "attention-heads":
        return f"one per head ({group.size})"
    names = {
        "mlp": "feed-forward channels",
        "attention-vo": "value/output channels",
        "attention-qk": "query/key pairs" if group.rotary else "query/key channels",
        "residual": "residual stream",
    }
    text = names.get(group.kind, "channels")
    if not group.heads:
        return f"{text} ({group.size})"
    return f"{text}, {group.heads} head{'s' if group.heads > 1 else ''} × {group.size // group.heads}"


def _norms(graph: ModelGraph, group: CouplingGroup, block: str) -> list[str]:
    """Layers of the block with channels of the group and no matrix: they are not drawn."""
    dims: dict[str, int] = {}
    for member in group.members:
        if member.module.startswith(f"{block}."):
            name = member.module.removeprefix(f"{block}.")
            dims[name] = max(dims.get(name, 0), len(graph.shapes[member.port.parameter]))
    return [name for name, most in dims.items() if most == 1]


def _draw_legend(axes: Axes, legend: Sequence[tuple[str, str]], y: float) -> float:
    """Draw what the colours mean; returns where it ends."""
    for colour, words in legend:
        axes.add_patch(Rectangle((MARGIN, y - 0.06), 0.3, 0.12, fc=colour, lw=0))
        for line in textwrap.wrap(words, LEGEND_LETTERS):
            axes.text(MARGIN + 0.4, y, line, va="center", fontsize=9)
            y += 0.19
        y += 0.03
    explained = (
        "A box is a weight: its inputs (columns) along the top, its outputs (rows) down the right side.",
        "Sides of one colour exist or vanish together; the thin lines of a colour are one channel.",
    )
    for line in explained:
        axes.text(MARGIN, y + 0.03, line, va="center", fontsize=8, color=NOTE)
        y += 0.17
    return y


# ---------------------------------------------------------------------------------------------- groups


MOST_GROUPS = 60
CARD, BETWEEN, BAND = (1.2, 0.5), 0.82, 0.55  # a card; the gap beside it; the gap below the cards of a band
ACROSS = 1 + int((WIDTH - 2 * MARGIN - CARD[0]) // (CARD[0] + BETWEEN))  # cards beside each other


@styled
def groups_figure(graph: ModelGraph) -> Figure:
    """Groups as cards from left to right, in the order of the model; arrows are the weights between them.

    Raises:
        InputError: if there are too many to be read.
    """
    view = condensed(graph)
    if len(view) > MOST_GROUPS:
        raise InputError(f"the model has {len(view)} groups and no blocks: draw it with --format graphml")
    places, bottom = _card_places(view)
    figure = Figure(figsize=(WIDTH, bottom + 0.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(bottom + 0.3, 0))
    axes.axis("off")
    axes.text(MARGIN, 0.27, f"{len(view)} coupled groups", fontsize=11, va="center", weight="bold")
    for source, target, names in view.edges(data="parameters"):
        _card_arrow(axes, places[source], places[target], [name.removesuffix(".weight") for name in names])
    for group, place in places.items():
        _card(axes, place, group, view.nodes[group])
    explained = (
        "A card is a group of channels that exist or vanish together; an arrow is a weight from one to the next."
    )
    axes.text(MARGIN, bottom, explained, fontsize=8, va="center", color=NOTE)
    figure.set_label(f"Diagram: {len(view)} coupled groups, joined by the weights that lead from one to the next.")
    return figure


def _card_places(view: networkx.DiGraph) -> tuple[dict[str, tuple[float, float]], float]:
    """Left upper corner of each group's card, and where they end. A group stands right of all that come before it in
    the model and lead to it; where a line is full, the next begins below."""
    levels: dict[str, int] = {}
    for group in view:
        levels[group] = 1 + max(
            (levels[before] for before in view.predecessors(group) if before in levels), default=-1
        )
    places, y = {}, 0.75
    for first in range(0, 1 + max(levels.values()), ACROSS):
        columns = [[g for g in view if levels[g] == level] for level in range(first, first + ACROSS)]
        for column, groups in enumerate(columns):
            for row, group in enumerate(groups):
                places[group] = (MARGIN + column * (CARD[0] + BETWEEN), y + row * (CARD[1] + 0.25))
        y += max(map(len, columns)) * (CARD[1] + 0.25) - 0.25 + BAND
    return places, y


def _card(axes: Axes, place: tuple[float, float], name: str, group: dict[str, Any]) -> None:
    axes.add_patch(Rectangle(place, *CARD, fc=PAPER, ec=KINDS.get(group["kind"], MUTED), lw=1.3, zorder=3))
    letters = int((CARD[0] - 0.1) / LETTER)
    short = name if len(name) <= letters else f"…{name[1 - letters :]}"
    axes.text(place[0] + 0.07, place[1] + 0.16, short, fontsize=8, va="center", zorder=4)
    text = f"{group['size']} channels"
    axes.text(place[0] + 0.07, place[1] + 0.36, text, fontsize=7.5, va="center", color=NOTE, zorder=4)


def _card_arrow(axes: Axes, source: tuple[float, float], target: tuple[float, float], names: Sequence[str]) -> None:
    """Straight to a card further right, with the weight's name to the next; to a lower line between the lines; to one
    further left or beyond the next (a shortcut) above the cards."""
    (x, y), (to_x, to_y) = (source[0] + CARD[0], source[1] + CARD[1] / 2), (target[0], target[1] + CARD[1] / 2)
    if source == target:
        return
    if to_x > x and abs(to_x - x - BETWEEN) < 0.01:
        _arrow(axes, [(x, y), (to_x, to_y)], MUTED)
        last = re.search(r"[^.]*(\.\d+)*$", names[0])
        label = (last[0] if last else names[0]) + (f" + {len(names) - 1}" if len(names) > 1 else "")
        room = int((BETWEEN - 0.1) / LETTER)
        label = label if len(label) <= room else f"{label[: room - 1]}…"
        axes.text((x + to_x) / 2, (y + to_y) / 2 - 0.08, label, fontsize=7.5, ha="center", color=NOTE)
    elif to_x <= MARGIN + 0.01 and to_y > y:
        between = target[1] - BAND / 2
        _arrow(axes, [(x, y), (x + 0.15, y), (x + 0.15, between), (0.06, between), (0.06, to_y), (to_x, to_y)], MUTED)
    else:
        up, down, above = source[0] + CARD[0] / 2, target[0] + CARD[0] / 2, target[1] - 0.17
        _arrow(axes, [(up, source[1]), (up, above), (down, above), (down, target[1])], MUTED)
