"""What the pictures of structure share: a page, colours of kinds of groups, arrows. Lengths are in inches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from .drawing import ACCENT, WARM

WIDTH = 7.5
MARGIN = 0.15
LETTER = 0.068  # width of a letter of 8 points
PAPER, NOTE = "#f4f5f7", "#5b6168"
KINDS = {"residual": ACCENT, "mlp": WARM, "attention-vo": "#2f8f6b", "attention-qk": "#8459a8"}


def polyline(axes: Axes, points: Sequence[tuple[float, float]], colour: str, width: float = 1.3) -> None:
    """A line round corners; a white one under it makes the crossing of two lines legible."""
    cap: Literal["butt", "projecting"] = "butt" if colour == "white" else "projecting"
    axes.plot(*zip(*points, strict=True), color=colour, lw=width, solid_capstyle=cap, solid_joinstyle="miter")


def arrow(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A line round corners with a head at its end."""
    (x, y), (from_x, from_y) = points[-1], points[-2]
    length, half = 0.1, 0.045
    unit = math.hypot(x - from_x, y - from_y)
    along, across = ((x - from_x) / unit, (y - from_y) / unit), ((from_y - y) / unit, (x - from_x) / unit)
    back = (x - length * along[0], y - length * along[1])
    head = [(x, y), *((back[0] + side * across[0], back[1] + side * across[1]) for side in (half, -half))]
    polyline(axes, [*points[:-1], back], colour)
    axes.add_patch(Polygon(head, fc=colour, lw=0, zorder=2.5))
