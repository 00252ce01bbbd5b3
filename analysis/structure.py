"""The picture of a model's structure: one block as boxes round the residual stream, or groups from left to right.

A box is a weight. Its rows, the outputs, are its right side; its columns, the inputs, are its top. A side has the
colour of the group that its indices belong to, so sides of one colour vanish together. All lengths are in inches.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from ..errors import InputError, unknown_name
from ..graph import CouplingGroup, Member, ModelGraph
from ..graph.naming import block_of
from ..graph.views import folded
from .arrows import KINDS, LETTER, MARGIN, NOTE, PAPER, WIDTH, arrow, polyline
from .boxes import Box, Branch, Side, branches
from .cards import groups_figure
from .drawing import ACCENT, INK, MUTED, save, styled

LARGEST, FITTING, SMALLEST = 1.5, 0.8, 0.12  # the longest side of a box: at most, to fit a line, and of any box
STRIP = 0.07  # thickness of a coloured side
STREAM = 0.62  # right side of the residual stream
GAP = 0.3
FIRST = STREAM + 0.35  # left side of the first box
LINE = 0.145  # height of a line of 8 points
LEGEND_LETTERS = 84  # of a line of the legend
SAMPLES = 120  # places at which the colour of a side is asked
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
        if place := block_of(group.id, counts):
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
            polyline(axes, [(min(ends), y), (max(ends), y)], colour)
        for p in sources:
            polyline(axes, [(p.right - STRIP / 2, y), (p.right - STRIP / 2, p.y)], colour)
        for p in targets:
            arrow(axes, [(p.middle, y), (p.middle, p.top)], colour)


def _draw_reads(axes: Axes, readers: Sequence[Placed], y: float) -> None:
    """From the stream, above everything else, down to each reader."""
    for p in readers:
        polyline(axes, [(p.middle, y + 0.08), (p.middle, p.top - 0.1)], "white", width=4.5)  # what it crosses is below
        arrow(axes, [(p.middle, y), (p.middle, p.top)], ACCENT)
    if readers:
        polyline(axes, [(STREAM, y), (max(p.middle for p in readers), y)], ACCENT)


def _draw_writes(axes: Axes, writers: Sequence[Placed], y: float) -> None:
    """From each writer, below everything else, back to the stream."""
    for p in writers:
        start, beside = p.y + p.height / 2, max(p.right, p.middle + _label_width(p.box) / 2) + 0.12
        arrow(axes, [(p.right, start), (beside, start), (beside, y), (STREAM, y)], ACCENT)


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
