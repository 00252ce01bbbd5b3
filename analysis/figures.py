"""The figures: each function draws one and returns it, with no global state."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..errors import InputError
from ..records import LayerScores, ScoreTable, Selection
from .drawing import ACCENT, INK, MUTED, OUTSIDE, WARM, WIDTH, Grid, cell_text, grid, heatmap, save, styled, svg

__all__ = [
    "agreement_matrix",
    "fidelity_curves",
    "importance_heatmap",
    "layer_bars",
    "loss_curves",
    "memory_bars",
    "save",
    "selection_map",
    "svg",
]

MOST_CAPS = 40  # more error bars than this go without caps
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a9099")
LINE_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)))
LINE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CEILING_DASHES: tuple[Any, ...] = ((0, (8, 4)), (0, (2, 3)), (0, (8, 3, 2, 3)))
COMPONENTS = ("base_weights", "adapter", "gradients", "optimizer", "activations")


@styled
def importance_heatmap(table: ScoreTable, axis: str) -> Figure:
    """Mean score of each module's rows (or columns), relative to the mean over the whole grid, on a log scale.

    A module with a score that is not finite is shown as NaN.
    """
    modules = [module for module in table.provenance.shapes if axis in table.scores.get(module, {})]
    layout = grid(modules, table.provenance.layers)
    total, count = np.zeros(layout.shape), np.zeros(layout.shape)
    for module, place in layout.places.items():
        total[place] += float(table.scores[module][axis].double().sum())
        count[place] += table.scores[module][axis].numel()
    finite = np.isfinite(total)
    mean = total[finite].sum() / max(1.0, count[finite].sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(np.isfinite(total), total, np.nan) / count / (mean or 1.0)
    figure = heatmap(
        relative,
        layout,
        _log_norm(relative),
        f"mean score of a {axis}, times the model's average {axis} (log scale)",
        missing=count == 0,
    )
    figure.axes[0].set_title(f"Importance of {axis}s\n{table.provenance.criterion}")
    figure.set_label(_describe_heatmap(table.provenance.criterion, axis, relative, layout))
    return figure


def _log_norm(values: np.ndarray) -> LogNorm:
    positive = values[np.isfinite(values) & (values > 0)]
    high = float(positive.max(initial=1.0))
    # Below a ten-thousandth of the average there is nothing to tell apart.
    low = max(float(positive.min(initial=1.0)), 1e-4)
    return LogNorm(min(low, 0.5), max(high, 2.0), clip=True)


def _describe_heatmap(criterion: str, axis: str, relative: np.ndarray, layout: Grid) -> str:
    text = f"Heat map: importance of {axis}s by {criterion}, layers by modules."
    if np.isfinite(relative).any():
        row, column = np.unravel_index(np.nanargmax(relative), relative.shape)
        where = layout.columns[column] if layout.rows[row] == OUTSIDE else f"{layout.columns[column]} of layer {row}"
        text += f" Highest in {where}: {relative[row, column]:.2g} times the average {axis}."
    return text


@styled
def selection_map(selection: Selection, layers: Sequence[str]) -> Figure:
    """Share of each module's weight that is trained, in percent, layers by modules; untrained modules stay blank.

    With one axis selected this is the share of rows, or of columns. With both, the weights in either.
    """
    modules = [module for module in selection.shapes if module in selection.indices]
    layout = grid(modules, layers)
    trained, size = np.zeros(layout.shape), np.zeros(layout.shape)
    for module, place in layout.places.items():
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
    figure = heatmap(share, layout, norm, "share of the weight trained, %", missing=size == 0)
    figure.axes[0].set_title("Trained rows and columns")
    mean = 100 * trained.sum() / max(1.0, size.sum())
    figure.set_label(
        f"Heat map: share of each module's weight that is trained, layers by modules; {mean:.2g} percent of the "
        f"{len(layout.places)} selected modules."
    )
    return figure


@styled
def layer_bars(layer_scores: LayerScores) -> Figure:
    """One bar per layer, in the model's order, with two standard errors either way where they are known."""
    scores, noise = layer_scores.scores, layer_scores.noise
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(scores)), list(scores.values()), width=0.72, color=ACCENT)
    if noise:
        errors = [2 * noise.get(layer, math.nan) for layer in scores]
        caps = 2.5 if len(scores) <= MOST_CAPS else 0.0
        axes.errorbar(
            range(len(scores)), list(scores.values()), errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=caps
        )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("score ± 2 standard errors" if noise else "score")
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"Importance of layers\n{layer_scores.criterion}")
    highest = max(scores, key=scores.__getitem__)
    mean = sum(scores.values()) / len(scores)
    figure.set_label(
        f"Bar chart: importance of {len(scores)} layers by {layer_scores.criterion}. Highest in {highest}: "
        f"{scores[highest] / (mean or 1.0):.2g} times the average layer."
    )
    return figure


@styled
def agreement_matrix(comparison: Mapping[str, Any]) -> Figure:
    """Score tables by score tables, medians over modules: Spearman above the diagonal, below it the same with the
    weight norm partialled out, on it how stable each table is (split half), where that is known.

    Args:
        comparison: what :func:`rowscope.scoring.trust.compare` returns, the value of ``comparison.json``.
    """
    pairs, tables = comparison["pairs"], comparison["tables"]
    names = list(dict.fromkeys([table["name"] for table in tables] + [pair["second"] for pair in pairs]))
    size = len(names)
    values = np.full((size, size), np.nan)
    for number, table in enumerate(tables):
        values[number, number] = np.nan if table["split_half"] is None else table["split_half"]
    for pair in pairs:
        first, second = names.index(pair["first"]), names.index(pair["second"])
        values[first, second], values[second, first] = pair["median"]["spearman"], pair["median"]["partial"]
    figure = Figure(figsize=(WIDTH, 1.7 + 0.5 * size), layout="constrained")
    axes = figure.add_subplot()
    colours, norm = matplotlib.colormaps["cividis"], Normalize(min(0.0, float(np.nanmin(values, initial=0.0))), 1)
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="face", linewidth=0.2)
    for row, column in np.ndindex(size, size):
        if math.isfinite(values[row, column]):
            value = float(values[row, column])
            cell_text(axes, column, row, value, colours, norm, f"{value:z.2f}")
        if row == column:
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=0.8))
    labels = [re.sub(r"([:,]| (?=\())", "\\1\n", name) for name in names]
    axes.set_xticks(np.arange(size) + 0.5, labels)
    axes.set_yticks(np.arange(size) + 0.5, labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_title(f"Agreement of rankings, {comparison['axis']}s")
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, location="bottom", fraction=0.06, aspect=40, pad=0.02
    )
    bar.outline.set_visible(False)
    bar.set_label("above the diagonal: Spearman; below: beyond the weight norm\nframed: stability (split half)")
    figure.set_label(
        f"Matrix: rank agreement of {size} rankings of {comparison['axis']}s, median over modules; "
        + "; ".join(f"{pair['first']} and {pair['second']} {pair['median']['spearman']:z.2f}" for pair in pairs[:6])
        + "."
    )
    return figure


@styled
def fidelity_curves(points: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float] | None = None) -> Figure:
    """Fidelity of each criterion against the passes it spent, with a band of two standard errors either way.

    Lines differ in colour (Okabe and Ito's, for the colour-blind), in dashes and in markers, so they can be told
    apart in grey.

    Args:
        points: ``criterion``, ``passes`` (at least 1), ``mean`` (of the partial Spearman with exact Taylor over seeds)
            and ``standard_error``; one mapping per criterion and number of passes.
        ceilings: label -> the fidelity that can be reached at most, drawn across.

    Raises:
        InputError: if there is no point, or one has less than one pass.
    """
    if not points:
        raise InputError("there is no fidelity to draw: measure some")
    if free := [point["criterion"] for point in points if point["passes"] < 1]:
        raise InputError(f"{free[0]} spends no pass, which has no place on a log axis: give it among the ceilings")
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    criteria = list(dict.fromkeys(point["criterion"] for point in points))
    for number, criterion in enumerate(criteria):
        line = sorted((p["passes"], p["mean"], p["standard_error"]) for p in points if p["criterion"] == criterion)
        passes, mean, error = np.array(line, dtype=float).T
        error = 2 * np.nan_to_num(error)  # one seed has no standard error
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        dashes, marker = LINE_DASHES[number % len(LINE_DASHES)], LINE_MARKERS[number % len(LINE_MARKERS)]
        if len(line) > 1:
            axes.fill_between(passes, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
        else:
            axes.errorbar(passes, mean, error, color=colour, capsize=3, linewidth=1)
        axes.plot(passes, mean, color=colour, linestyle=dashes, marker=marker, markersize=5, label=criterion)
    for number, (label, value) in enumerate((ceilings or {}).items()):
        axes.axhline(
            value, color=INK, linewidth=0.9, linestyle=CEILING_DASHES[number % len(CEILING_DASHES)], label=label
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("passes, forward and backward (log scale)")
    axes.set_ylabel("partial Spearman with exact taylor")
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
    axes.set_title("Fidelity against passes")
    figure.legend(loc="outside lower center", ncols=2, handlelength=3.4)
    best = max(points, key=lambda point: point["mean"])
    figure.set_label(
        f"Line chart: fidelity by passes of {', '.join(criteria)}; highest {best['mean']:.2f} by {best['criterion']} "
        f"at {best['passes']} passes."
    )
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
