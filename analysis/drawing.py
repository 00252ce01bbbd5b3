"""How figures are drawn and written: one style, one ink, heat maps of layers by modules, PNG and inline SVG.

Text and lines are drawn in one ink. A PNG shows it on white; in inline SVG it becomes ``currentColor`` on a clear
ground, so that a figure follows the light or dark page around it. A figure's label is its description in words.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from ..records import atomic_path

INK = "#1b1f24"
MUTED = "#8a9099"
ACCENT = "#3b6fb5"
WARM = "#c9702b"
WIDTH = 5.4  # inches; one column of the report
MOST_ANNOTATED = 120  # cells; more numbers than this are a texture, not a text
MOST_TICKS = 24
OUTSIDE = "other"
"""The row of modules outside all layers."""
LOG_TICKS = [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5)]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rowscope",
    "text.parse_math": False,  # a "$" in a module's name is a dollar sign
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


Parameters = ParamSpec("Parameters")


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw with the package's style, and leave the caller's matplotlib settings as they were."""

    @functools.wraps(draw)
    def draw_styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            # Each drawing would lay out anew, a little differently after the last: lay out once and keep it.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return draw_styled


@dataclass(frozen=True)
class Grid:
    """Modules placed in rows (layers) and columns (modules within the layer).

    Attributes:
        rows: the layers, and :data:`OUTSIDE` as the last where modules are outside all of them; of a model without
            layers, what the modules are part of.
        columns: names of modules within a layer, in order of appearance.
        places: module -> (row, column).
    """

    rows: list[str]
    columns: list[str]
    places: dict[str, tuple[int, int]]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return len(self.rows), len(self.columns)


def grid(names: Sequence[str], layers: Sequence[str]) -> Grid:
    """Place modules on a grid of layers by modules within the layer.

    Experts of one layer share a column (``experts.*``), and so do modules of one name outside all layers.
    """
    home = {name: next((layer for layer in layers if name.startswith(f"{layer}.")), None) for name in names}
    inside = [name for name in names if home[name] is not None]
    rows = {layer: number for number, layer in enumerate(layers)} if inside else {}
    columns: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for name in inside:
        suffix = name[len(home[name] or "") + 1 :]
        if "experts" in suffix:
            suffix = re.sub(r"\.\d+(?=\.|$)", ".*", suffix)
        places[name] = (rows[home[name] or ""], columns.setdefault(suffix, len(columns)))
    for name in names:
        if home[name] is None:
            parent, _, last = name.rpartition(".")
            row = OUTSIDE if layers else parent or OUTSIDE
            places[name] = (rows.setdefault(row, len(rows)), columns.setdefault(last, len(columns)))
    return Grid(list(rows), list(columns), places)


def heatmap(values: np.ndarray, layout: Grid, norm: Normalize, label: str, missing: np.ndarray) -> Figure:
    """Draw the cells of `layout` by `norm` with cividis; hatch what is NaN, leave `missing` cells empty."""
    rows, width = values.shape
    cell = 0.27 if rows <= MOST_TICKS else max(0.09, 6.5 / rows)
    figure = Figure(figsize=(WIDTH, 1.75 + cell * max(rows, 2)), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["cividis"]
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="face", linewidth=0.2)
    annotate = values.size <= MOST_ANNOTATED
    for row, column in np.ndindex(*values.shape):
        if missing[row, column]:
            continue
        value = float(values[row, column])
        if not math.isfinite(value):
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0))
        if annotate or not math.isfinite(value):
            cell_text(axes, column, row, value, colours, norm)
    layer_ticks(axes, layout.rows)
    axes.set_xticks(np.arange(width) + 0.5, layout.columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        location="bottom",
        fraction=0.05 if rows > 4 else 0.12,
        aspect=40,
        pad=0.02,
    )
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.minorticks_off()
    if isinstance(norm, LogNorm):
        bar.set_ticks([tick for tick in LOG_TICKS if (norm.vmin or 0) <= tick <= (norm.vmax or 0)])
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def cell_text(
    axes: Axes, column: int, row: int, value: float, colours: Colormap, norm: Normalize, text: str | None = None
) -> None:
    """Write a cell's value, or `text`, into it, in black or white as its colour asks."""
    colour = INK
    if math.isfinite(value):
        red, green, blue, _ = colours(norm(value))
        colour = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#000000"
    text = text or (short(value) if math.isfinite(value) else "NaN")
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7.5, color=colour)


def layer_ticks(axes: Axes, layers: Sequence[str]) -> None:
    """Name the rows of a heat map, every one or every few; what all layers' names start with is left away."""
    parts = [layer.split(".") for layer in layers if layer != OUTSIDE]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    names = [".".join(part[shared:]) for part in parts]
    step = math.ceil(len(names) / MOST_TICKS) if names else 1
    inside = [row for row, layer in enumerate(layers) if layer != OUTSIDE]
    ticks = {row + 0.5: name for row, name in zip(inside[::step], names[::step], strict=True)}
    ticks |= {row + 0.5: OUTSIDE for row, layer in enumerate(layers) if layer == OUTSIDE}
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylabel("layer" if inside else "")


def short(value: float) -> str:
    """A number in at most four characters or so: ``0.04``, ``1.3``, ``12``."""
    if value == 0:
        return "0"
    return (
        f"{value:.0f}"
        if value >= 9.95
        else f"{value:.1f}"
        if value >= 0.95
        else f"{value:.2f}"
        if value >= 0.01
        else "<.01"
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`, atomically."""
    with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
        kind = path.suffix.lstrip(".").lower()
        figure.savefig(
            temporary, format=kind, dpi=160, facecolor="white", metadata={"Date": None} if kind == "svg" else None
        )


def svg(figure: Figure, prefix: str = "figure") -> str:
    """A figure as inline SVG: deterministic, described by the figure's label, its ink the page's text colour.

    Args:
        figure: from one of the functions above.
        prefix: starts every id, with a hash of the content; pages that show one figure twice give each its own.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    unique = f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{unique}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(str(figure.get_label()), quote=True)}"', 1)
