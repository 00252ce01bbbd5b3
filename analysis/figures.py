"""The figures: each function draws one and returns it, with no global state."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..records import ScoreTable, Selection
from ..scoring.agreement import agreement
from .drawing import ACCENT, MUTED, WARM, WIDTH, cell_text, grid, heatmap, save, styled, svg

__all__ = ["agreement_matrix", "importance_heatmap", "loss_curves", "memory_bars", "save", "selection_map", "svg"]

COMPONENTS = ("base_weights", "adapter", "gradients", "optimizer", "activations")


@styled
def importance_heatmap(table: ScoreTable, axis: str) -> Figure:
    """Mean score of each module's rows (or columns), relative to the mean over the whole grid, on a log scale.

    A module with a score that is not finite is shown as NaN.
    """
    modules = [module for module in table.provenance.shapes if axis in table.scores.get(module, {})]
    columns, places = grid(modules, table.provenance.layers)
    shape = (len(table.provenance.layers), len(columns))
    total, count = np.zeros(shape), np.zeros(shape)
    for module, place in places.items():
        total[place] += float(table.scores[module][axis].double().sum())
        count[place] += table.scores[module][axis].numel()
    finite = np.isfinite(total)
    mean = total[finite].sum() / max(1.0, count[finite].sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(np.isfinite(total), total, np.nan) / count / (mean or 1.0)
    figure = heatmap(
        relative,
        table.provenance.layers,
        columns,
        _log_norm(relative),
        f"mean score of a {axis}, times the model's average {axis} (log scale)",
        missing=count == 0,
    )
    figure.axes[0].set_title(f"Importance of {axis}s\n{table.provenance.criterion}")
    figure.set_label(_describe_heatmap(table.provenance.criterion, axis, relative, columns))
    return figure


def _log_norm(values: np.ndarray) -> LogNorm:
    positive = values[np.isfinite(values) & (values > 0)]
    high = float(positive.max(initial=1.0))
    # Below a ten-thousandth of the average there is nothing to tell apart.
    low = max(float(positive.min(initial=1.0)), 1e-4)
    return LogNorm(min(low, 0.5), max(high, 2.0), clip=True)


def _describe_heatmap(criterion: str, axis: str, relative: np.ndarray, columns: list[str]) -> str:
    text = f"Heat map: importance of {axis}s by {criterion}, layers by modules."
    if np.isfinite(relative).any():
        layer, column = np.unravel_index(np.nanargmax(relative), relative.shape)
        text += (
            f" Highest in {columns[column]} of layer {layer}: {relative[layer, column]:.2g} times the average {axis}."
        )
    return text


@styled
def selection_map(selection: Selection, layers: Sequence[str]) -> Figure:
    """Share of each module's weight that is trained, in percent, layers by modules; untrained modules stay blank.

    With one axis selected this is the share of rows, or of columns. With both, the weights in either.
    """
    modules = [module for module in selection.shapes if module in selection.indices]
    columns, places = grid(modules, layers)
    trained, size = np.zeros((len(layers), len(columns))), np.zeros((len(layers), len(columns)))
    for module, place in places.items():
        out_features, in_features = selection.shapes[module]
        rows, cols = (
            index.numel() if (index := selection.indices[module].get(axis)) is not None else 0
            for axis in ("row", "column")
        )
        trained[place] += rows * in_features + cols * out_features - rows * cols
        size[place] += out_features * in_features
    with np.errstate(invalid="ignore"):
        share = 100 * trained / size
    norm = Normalize(0, max(1e-9, float(np.nanmax(share, initial=0.0))))
    figure = heatmap(share, layers, columns, norm, "share of the weight trained, %", missing=size == 0)
    figure.axes[0].set_title("Trained rows and columns")
    mean = 100 * trained.sum() / max(1.0, size.sum())
    figure.set_label(
        f"Heat map: share of each module's weight that is trained, layers by modules; {mean:.2g} percent of the "
        f"{len(places)} selected modules."
    )
    return figure


@styled
def agreement_matrix(tables: Sequence[ScoreTable], axis: str) -> Figure:
    """Criteria by criteria: median Spearman above the diagonal, below it the same with the weight norm partialled out.

    Raises:
        InputError: if two tables belong to different models or have nothing in common along `axis`.
    """
    size = len(tables)
    values = np.full((size, size), np.nan)
    for first in range(size):
        for second in range(first + 1, size):
            pair = agreement(tables[first], tables[second], axis)
            values[first, second] = pair.median_spearman
            values[second, first] = pair.median_partial
    names = [re.sub(r"([:,])", "\\1\n", table.provenance.criterion) for table in tables]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.55 * size), layout="constrained")
    axes = figure.add_subplot()
    colours, norm = matplotlib.colormaps["cividis"], Normalize(min(0.0, float(np.nanmin(values, initial=0.0))), 1)
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="face", linewidth=0.2)
    for row, column in np.ndindex(size, size):
        if row != column:
            cell_text(axes, column, row, float(values[row, column]), colours, norm)
    axes.set_xticks(np.arange(size) + 0.5, names)
    axes.set_yticks(np.arange(size) + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_title(f"Agreement of criteria, {axis}s")
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, location="bottom", fraction=0.06, aspect=40, pad=0.02
    )
    bar.outline.set_visible(False)
    bar.set_label("above the diagonal: Spearman; below: weight norm partialled out")
    figure.set_label(f"Matrix: rank agreement of {size} criteria over {axis}s, median over modules.")
    return figure


@styled
def loss_curves(log_lines: Sequence[dict[str, Any]]) -> Figure:
    """Training loss by step (light), its smoothed course, and held-out losses as markers; other lines are skipped."""
    train = [(line["step"], line["loss"]) for line in log_lines if "step" in line and line.get("loss") is not None]
    held_out = [
        (line["step"], line["validation_loss"])
        for line in log_lines
        if "step" in line and line.get("validation_loss") is not None
    ]
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = (np.array(values, dtype=float) for values in zip(*train, strict=True))
        axes.plot(steps, losses, color=ACCENT, alpha=0.35, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=ACCENT, linewidth=1.8, label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=WARM, markersize=4.5, linewidth=1, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
    if train or held_out:
        axes.legend(loc="upper right")
    axes.set_title("Loss")
    course = f"held-out loss {held_out[0][1]:.4g} to {held_out[-1][1]:.4g}" if held_out else "training loss only"
    figure.set_label(f"Line chart: loss by step over {len(train)} logged steps, {course}.")
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Bias-corrected exponential mean over about a twentieth of the `values`; what is not finite is passed over."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    course, weight, smoothed = 0.0, 0.0, np.empty(len(values))
    for step, value in enumerate(values):
        if math.isfinite(value):
            course, weight = decay * course + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed[step] = course / weight if weight else math.nan
    return smoothed


@styled
def memory_bars(memory: dict[str, Any]) -> Figure:
    """One bar per component of ``memory.json``, in MiB."""
    sizes = {name: size / 2**20 for name, size in memory["components"].items()}
    names = [name for name in COMPONENTS if name in sizes] + sorted(set(sizes) - set(COMPONENTS))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    colours = [MUTED if name == "base_weights" else ACCENT for name in names]
    bars = axes.barh(
        [name.replace("_", " ") for name in names], [sizes[name] for name in names], color=colours, height=0.62
    )
    axes.bar_label(bars, [f"{sizes[name]:,.1f}" for name in names], padding=4)
    axes.margins(x=0.14)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("MiB")
    axes.spines["left"].set_visible(False)
    axes.set_title("Memory at the first step")
    figure.set_label(
        "Bar chart: " + ", ".join(f"{name.replace('_', ' ')} {sizes[name]:.1f} MiB" for name in names) + "."
    )
    return figure
