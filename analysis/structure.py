"""The picture of a model's structure: one block as boxes round the residual stream, or groups from left to right.

A box is a weight. Its rows, the outputs, are its right side; its columns, the inputs, are its top. A side has the
colour of the group that its indices belong to, so sides of one colour vanish together. All lengths are in inches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..errors import InputError, unknown_name
from ..graph import CouplingGroup, ModelGraph
from ..graph.views import block_of, condensed, folded
from .drawing import ACCENT, MUTED, WARM, save, styled

WIDTH = 7.5
LARGEST, SMALLEST = 1.15, 0.12  # sides of a box
STRIP = 0.07  # thickness of a coloured side
MARGIN = 0.15
STREAM = 0.62  # right side of the residual stream
GAP = 0.3
FIRST = STREAM + 0.35  # left side of the first box
LETTER = 0.068  # width of a letter of 8 points
SAMPLES = 120  # places at which the colour of a side is asked
PAPER = "#f4f5f7"
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
        label: what stands under it, in lines.
        rows, columns: its sides.
        experts: how many there are of it; 1 unless it is an expert.
    """

    name: str
    label: tuple[str, ...]
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
    experts = {member.port.expert for _, member in members if member.port.expert is not None}
    axes = {member.port.dim: member.axis for _, member in members}
    dims = (
        list(range(1, len(shape))) if experts or (len(shape) == 3 and set(axes) <= {1, 2}) else list(range(len(shape)))
    )
    row = next((dim for dim in dims if axes.get(dim) == "row"), None)
    column = next((dim for dim in dims if axes.get(dim) == "column"), None)
    row = next(dim for dim in dims if dim != column) if row is None else row
    column = next(dim for dim in dims if dim != row) if column is None else column
    shown = [(group, m) for group, m in members if m.port.expert in (None, min(experts, default=0))]
    sides = [
        _side(shape[dim], [(group, m.index.table) for group, m in shown if m.port.dim == dim]) for dim in (row, column)
    ]
    kernel = [str(shape[dim]) for dim in dims if dim not in (row, column)]
    size = f"{shape[row]} × {shape[column]}" + (f" × {'×'.join(kernel)}" if kernel else "")
    count = shape[0] if 0 not in dims else 1
    lines = [name.removesuffix(".weight").rpartition(".")[2], size]
    return Box(name, tuple([*lines, f"1 of {count} experts"] if count > 1 else lines), sides[0], sides[1], count)


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
    return [Branch(_title(part, kinds), tuple(part)) for part in ordered]


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


@styled
def block_figure(graph: ModelGraph, block: str, stream: CouplingGroup) -> Figure:
    """One block: branches under each other, beside the residual stream that they read from and write to."""
    parts = branches(graph, block, stream)
    shown = [box for part in parts for box in part.boxes]
    colours = _colours(graph, stream, shown)
    scale = LARGEST / math.sqrt(max(side.size for box in shown for side in (box.rows, box.columns)))
    lines = [(part.title, line) for part in parts for line in _lines(part.boxes, scale)]
    legend = _legend(graph, block, colours)
    figure = Figure(figsize=(WIDTH, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    y = top = _heading(axes, graph, block)
    for title, line in lines:
        y = _draw_line(axes, title, line, y, scale, stream.id, colours)
    _draw_stream(axes, stream, top, y)
    _draw_legend(axes, legend, y + 0.35)
    height = y + 0.35 + 0.22 * len(legend) + 0.55
    figure.set_size_inches(WIDTH, height)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    names = ", ".join(title for title, _ in lines)
    figure.set_label(f"Diagram: weights of {block} ({names}) as boxes; sides of one coupled group have one colour.")
    return figure


def _colours(graph: ModelGraph, stream: CouplingGroup, shown: Sequence[Box]) -> dict[str, str]:
    """A colour for each group that is drawn: by kind, and another for the second of a kind."""
    ids = {group for box in shown for group in box.rows.ids | box.columns.ids}
    colours, others = {stream.id: ACCENT}, iter(OTHERS * (1 + len(ids)))
    for group in graph.groups:
        if group.id in ids and group.id not in colours:
            own = KINDS.get(group.kind)
            colours[group.id] = own if own and own not in colours.values() else next(others)
    return colours


def _size(box: Box, scale: float) -> tuple[float, float]:
    """Width and height, both as the square root of how many."""
    return tuple(max(SMALLEST, scale * math.sqrt(side.size)) for side in (box.columns, box.rows))  # type: ignore[return-value]


def _slot(box: Box, scale: float) -> float:
    return max(_size(box, scale)[0] + STRIP, LETTER * max(map(len, box.label)))


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


def _draw_line(
    axes: Axes, title: str, line: Sequence[Box], y: float, scale: float, stream: str, colours: dict[str, str]
) -> float:
    """Draw boxes beside each other with their arrows; returns where the next line begins."""
    axes.text(FIRST - 0.1, y + 0.12, title, fontsize=9, va="center", weight="bold")
    read, link, top = y + 0.36, y + 0.56, y + 0.86
    x, placed = FIRST, []
    for box in line:
        width, height = _size(box, scale)
        slot = _slot(box, scale)
        placed.append(Placed(box, x + (slot - width - STRIP) / 2, top, width, height))
        x += slot + GAP
    bottom = max(p.y + p.height for p in placed) + 0.15 * max(len(p.box.label) for p in placed) + 0.2
    for p in placed:
        _draw_box(axes, p, colours)
    _draw_links(axes, placed, link, stream, colours)
    _draw_reads(axes, [p for p in placed if stream in p.box.columns.ids], read)
    _draw_writes(axes, [p for p in placed if stream in p.box.rows.ids], bottom)
    return bottom + 0.25


def _draw_box(axes: Axes, p: Placed, colours: dict[str, str]) -> None:
    for shift in (0.1, 0.05) if p.box.experts > 1 else ():
        axes.add_patch(Rectangle((p.x - shift, p.y + shift), p.width, p.height, fc=PAPER, ec=MUTED, lw=0.6))
    axes.add_patch(Rectangle((p.x, p.y), p.width, p.height, fc=PAPER, ec=MUTED, lw=0.6))
    for start, stop, group in _runs(p.box.columns):
        place = (p.x + start * p.width, p.top)
        axes.add_patch(Rectangle(place, (stop - start) * p.width, STRIP, fc=colours.get(group, BARE), lw=0))
    for start, stop, group in _runs(p.box.rows):
        place = (p.x + p.width, p.y + start * p.height)
        axes.add_patch(Rectangle(place, STRIP, (stop - start) * p.height, fc=colours.get(group, BARE), lw=0))
    for group, index in p.box.columns.marks:
        x = p.x + (index + 0.5) / p.box.columns.size * p.width
        axes.plot([x, x], [p.y, p.y + p.height], color=colours[group], lw=0.9, alpha=0.7)
    for group, index in p.box.rows.marks:
        y = p.y + (index + 0.5) / p.box.rows.size * p.height
        axes.plot([p.x, p.x + p.width], [y, y], color=colours[group], lw=0.9, alpha=0.7)
    low = p.y + p.height + 0.06 + (0.1 if p.box.experts > 1 else 0)
    name, *rest = p.box.label
    axes.text(p.middle, low, name, fontsize=8, ha="center", va="top")
    axes.text(p.middle, low + 0.145, "\n".join(rest), fontsize=7.5, ha="center", va="top", color="#5b6168")


def _runs(side: Side) -> Iterator[tuple[float, float, str]]:
    """(start, stop, group) of consecutive indices of one group, as shares of the side; an empty id is no group."""
    places = [side.groups[int((sample + 0.5) / SAMPLES * side.size)] or "" for sample in range(SAMPLES)]
    start = 0
    for stop in range(1, SAMPLES + 1):
        if stop == SAMPLES or places[stop] != places[start]:
            yield start / SAMPLES, stop / SAMPLES, places[start]
            start = stop


def _draw_links(axes: Axes, placed: Sequence[Placed], y: float, stream: str, colours: dict[str, str]) -> None:
    """From the rows of a group to its columns, above the boxes."""
    for group in colours:
        sources = [p for p in placed if group in p.box.rows.ids]
        targets = [p for p in placed if group in p.box.columns.ids]
        if group == stream or not targets or not sources:
            continue
        for p in sources:
            x = p.right - STRIP / 2
            _path(axes, [(x, p.y), (x, y), (targets[-1].middle, y)], colours[group])
        for p in targets:
            _path(axes, [(p.middle, y), (p.middle, p.top)], colours[group], arrow=True)


def _draw_reads(axes: Axes, readers: Sequence[Placed], y: float) -> None:
    for p in readers:
        _path(axes, [(STREAM, y), (p.middle, y), (p.middle, p.top)], ACCENT, arrow=True)


def _draw_writes(axes: Axes, writers: Sequence[Placed], y: float) -> None:
    for p in writers:
        start = (p.right, p.y + p.height / 2)
        _path(axes, [start, (p.right + 0.15, start[1]), (p.right + 0.15, y), (STREAM, y)], ACCENT, arrow=True)


def _path(axes: Axes, points: Sequence[tuple[float, float]], colour: str, arrow: bool = False) -> None:
    """A line round corners; where it crosses another it is the upper one."""
    halo = [withStroke(linewidth=3.4, foreground="white")]
    axes.plot(*zip(*points, strict=True), color=colour, lw=1.3, path_effects=halo, solid_capstyle="butt")
    if arrow:
        axes.annotate(
            "", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkB": 0}
        )


def _draw_stream(axes: Axes, stream: CouplingGroup, top: float, bottom: float) -> None:
    width = 0.16
    axes.add_patch(Rectangle((STREAM - width, top), width, bottom - top, fc=ACCENT, lw=0))
    axes.annotate(
        "",
        (STREAM - width / 2, bottom + 0.2),
        (STREAM - width / 2, bottom - 0.05),
        arrowprops={"arrowstyle": "-|>", "color": ACCENT, "lw": 3, "mutation_scale": 18},
    )
    text = f"residual stream, {stream.size} channels"
    axes.text(STREAM - width - 0.12, (top + bottom) / 2, text, rotation=90, ha="center", va="center", fontsize=9)


# ---------------------------------------------------------------------------------------------- words


def _legend(graph: ModelGraph, block: str, colours: dict[str, str]) -> list[tuple[str, str]]:
    """(colour, words) of each group that is drawn."""
    return [(colours[group.id], in_words(graph, group, block)) for group in graph.groups if group.id in colours]


def in_words(graph: ModelGraph, group: CouplingGroup, block: str) -> str:
    """What a group is, for people who meet the word for the first time."""
    names = {
        "mlp": "feed-forward channels",
        "attention-vo": "value/output channels",
        "attention-qk": "query/key pairs" if group.rotary else "query/key channels",
        "attention-heads": "once per head",
        "residual": "residual stream",
    }
    text = names.get(group.kind, f"channels of {group.id.removeprefix(f'{block}.')}")
    if group.heads:
        text += f", {group.heads} heads × {group.size // group.heads}"
    else:
        text += f" ({group.size})"
    vectors = [
        member.module.removeprefix(f"{block}.")
        for member in group.members
        if member.module.startswith(f"{block}.") and len(graph.shapes[member.port.parameter]) == 1
    ]
    matrices = {m.module for m in group.members if len(graph.shapes[m.port.parameter]) > 1}
    norms = [name for name in dict.fromkeys(vectors) if f"{block}.{name}" not in matrices]
    return text + (f"; also {', '.join(norms)}" if norms else "")


def _draw_legend(axes: Axes, legend: Sequence[tuple[str, str]], y: float) -> None:
    for number, (colour, words) in enumerate(legend):
        place = y + 0.22 * number
        axes.add_patch(Rectangle((MARGIN, place - 0.06), 0.3, 0.12, fc=colour, lw=0))
        axes.text(MARGIN + 0.4, place, words, va="center", fontsize=9)
    explained = (
        "A box is a weight: its inputs (columns) along the top, its outputs (rows) down the right side.\n"
        "Sides of one colour exist or vanish together; the thin lines of a colour are one channel."
    )
    axes.text(MARGIN, y + 0.22 * len(legend) + 0.02, explained, va="top", fontsize=8, color="#5b6168", linespacing=1.4)


# ---------------------------------------------------------------------------------------------- groups


MOST_GROUPS = 60
COLUMN, ROW, CARD = 1.9, 0.62, (1.5, 0.42)


@styled
def groups_figure(graph: ModelGraph) -> Figure:
    """Groups as cards from left to right, in the order of the computation; arrows are the weights between them."""
    view = condensed(graph)
    if len(view) > MOST_GROUPS:
        raise InputError(f"the model has {len(view)} groups and no blocks: draw it with --format graphml")
    order = networkx.condensation(view)
    generations = [
        [group for part in parts for group in sorted(order.nodes[part]["members"])]
        for parts in networkx.topological_generations(order)
    ]
    rows = max(len(groups) for groups in generations)
    width, height = max(WIDTH, MARGIN * 2 + COLUMN * len(generations)), ROW * rows + 1.0
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(MARGIN, 0.27, f"{len(view)} coupled groups", fontsize=11, va="center", weight="bold")
    places = {
        group: (MARGIN + COLUMN * column, 0.6 + ROW * (row + (rows - len(groups)) / 2))
        for column, groups in enumerate(generations)
        for row, group in enumerate(groups)
    }
    for source, target in view.edges:
        _card_arrow(axes, places[source], places[target])
    for group, place in places.items():
        _card(axes, place, group, view.nodes[group])
    explained = (
        "A card is a group of channels that exist or vanish together; an arrow is a weight from one to the next."
    )
    axes.text(MARGIN, height - 0.2, explained, fontsize=8, va="center", color="#5b6168")
    figure.set_label(f"Diagram: {len(view)} coupled groups, joined by the weights that lead from one to the next.")
    return figure


def _card(axes: Axes, place: tuple[float, float], name: str, group: dict[str, Any]) -> None:
    colour = KINDS.get(group["kind"], MUTED)
    axes.add_patch(Rectangle(place, *CARD, fc=PAPER, ec=colour, lw=1.3))
    letters = int(CARD[0] / LETTER)
    short = name if len(name) <= letters else f"…{name[1 - letters :]}"
    axes.text(place[0] + 0.06, place[1] + 0.14, short, fontsize=8, va="center")
    axes.text(place[0] + 0.06, place[1] + 0.3, f"{group['size']} channels", fontsize=7.5, va="center", color="#5b6168")


def _card_arrow(axes: Axes, source: tuple[float, float], target: tuple[float, float]) -> None:
    if source == target:
        return
    start = (source[0] + CARD[0], source[1] + CARD[1] / 2)
    style = {"arrowstyle": "-|>", "color": MUTED, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (target[0], target[1] + CARD[1] / 2), start, arrowprops=style)
