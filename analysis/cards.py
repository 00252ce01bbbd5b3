"""Coupled groups as cards from left to right: models without blocks on a residual stream. Lengths are in inches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import networkx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..errors import InputError
from ..graph import ModelGraph
from ..graph.views import condensed
from .arrows import KINDS, LETTER, MARGIN, NOTE, PAPER, WIDTH, arrow
from .drawing import MUTED, styled

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
        arrow(axes, [(x, y), (to_x, to_y)], MUTED)
        last = re.search(r"[^.]*(\.\d+)*$", names[0])
        label = (last[0] if last else names[0]) + (f" + {len(names) - 1}" if len(names) > 1 else "")
        room = int((BETWEEN - 0.1) / LETTER)
        label = label if len(label) <= room else f"{label[: room - 1]}…"
        axes.text((x + to_x) / 2, (y + to_y) / 2 - 0.08, label, fontsize=7.5, ha="center", color=NOTE)
    elif to_x <= MARGIN + 0.01 and to_y > y:
        between = target[1] - BAND / 2
        arrow(axes, [(x, y), (x + 0.15, y), (x + 0.15, between), (0.06, between), (0.06, to_y), (to_x, to_y)], MUTED)
    else:
        up, down, above = source[0] + CARD[0] / 2, target[0] + CARD[0] / 2, target[1] - 0.17
        arrow(axes, [(up, source[1]), (up, above), (down, above), (down, target[1])], MUTED)
