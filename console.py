"""What the commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import AXES, LayerScores, ScoreTable, Selection, read_json
from .runs import RunFolder

if TYPE_CHECKING:
    from .graph import ModelGraph
    from .graph.savings import Savings


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; the first column to the left, the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1

    table = Table(box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    # In a file or a pipe nothing says how wide a line may be: rich would take 80, and fold.
    console = Screen(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False, soft_wrap=True)
    console.print(table)


def print_graph(model: str, graph: ModelGraph) -> None:
    """Print coupled groups; identical blocks, and identical groups in a block (experts), are said once."""
    from .graph.savings import total_parameters
    from .graph.views import folded

    rows: list[list[str]] = []
    for block in folded(graph):
        if block.name:
            count = len(block.blocks)
            rows.append([f"{block.name} ({count} ×)" if count > 1 else block.name, "", "", "", ""])
        for line in block.groups:
            name = f"{'  ' if block.name else ''}{line.name}{f' ({line.times} ×)' if line.times > 1 else ''}"
            heads = f"{line.group.heads} heads × " if line.group.heads else ""
            channels = f"{heads}{line.group.size // (line.group.heads or 1)}"
            share = f"{line.statistics.share:.2%}"
            rows.append([name, line.group.kind, channels, f"{line.statistics.parameters:,}", share])
    print_table(f"Coupled groups of {model}", ["group", "kind", "channels", "parameters", "share"], rows)
    print(f"{len(graph.groups)} groups, {total_parameters(graph):,} parameters")


def print_savings(model: str, savings: Savings, as_json: bool) -> None:
    """Print what removing channels would save; nothing is removed."""
    before, after = asdict(savings.before), asdict(savings.after)
    if as_json:
        removed = {group: len(channels) for group, channels in savings.removed.items()}
        return print_json({"model": model, "removed": removed, "before": before, "after": after})
    names = {
        "parameters": "parameters",
        "flops": "operations with weights",
        "key_value_elements": "keys and values per token",
    }
    rows = [
        [label, f"{before[name]:,}", f"{after[name]:,}", f"{after[name] / max(1, before[name]) - 1:+.1%}"]
        for name, label in names.items()
        if before[name] is not None
    ]
    count = sum(map(len, savings.removed.values()))
    title = f"{model} without {count:,} channels of {len(savings.removed)} groups (a dry run, partners included)"
    print_table(title, ["", "before", "after", "change"], rows)


def print_scores(table: ScoreTable, out: Path, as_json: bool) -> None:
    """Print the modules of largest mean score, and how far to trust the ranking."""
    from .scoring.trust import trust

    found = trust(table)
    if as_json:
        return print_json({**asdict(found), "modules": len(table.scores), "scores": str(out)})
    axis = found.axis
    means = sorted(((float(entry[axis].mean()), module) for module, entry in table.scores.items()), reverse=True)
    rows = [[module, len(table.scores[module][axis]), f"{mean:.3g}"] for mean, module in means[:10]]
    title = f"{found.criterion}: the {len(rows)} modules of largest mean {axis} score"
    print_table(title, ["module", f"{axis}s", "mean score"], rows)
    print(f"trust: {found.verdict}")
    print(f"scores of {len(table.scores)} modules: {out}")


def print_layer_scores(layer_scores: LayerScores, out: Path, as_json: bool) -> None:
    """Print every layer's score, its standard error where that is known, and its share of all."""
    from .scoring.layer_scores import rows

    if as_json:
        return print_json({**asdict(layer_scores), "layer_scores": str(out)})
    print_table(f"{layer_scores.criterion}: {len(layer_scores.scores)} layers", *rows(layer_scores))
    print(f"layer scores: {out}")


def print_comparison(value: Mapping[str, Any], written: Sequence[Path], as_json: bool) -> None:
    """Print what each score table says of itself, how far pairs of them agree, and a verdict on each."""
    from .analysis import comparison

    if as_json:
        return print_json(value)
    title = f"{value['model']['source']}: how far to trust each ranking of {value['axis']}s"
    print_table(title, *comparison.trust_rows(value))
    modules = max(len(pair["modules"]) for pair in value["pairs"])
    title = f"Agreement: median of {modules} modules / all their {value['axis']}s as one ranking"
    print_table(title, *comparison.pair_rows(value))
    for line in comparison.notes(value):
        print(line)
    for path in written:
        print(f"{'comparison' if path.suffix == '.json' else 'figure'}: {path}")


def print_selection(selection: Selection, out: Path, as_json: bool) -> None:
    """Print how many rows and columns of which modules are trained; alike modules of all blocks in one line."""
    trained = selection.trainable_parameters()
    if as_json:
        modules = {
            name: {axis: len(index) for axis, index in axes.items()} for name, axes in selection.indices.items()
        }
        return print_json(
            {**selection.origin, "trainable_parameters": trained, "modules": modules, "selection": str(out)}
        )
    folded: dict[tuple[str, str, int], list[int]] = {}
    for module, axes in selection.indices.items():
        for axis, index in axes.items():
            size = selection.shapes[module][AXES.index(axis)]
            folded.setdefault((".".join(module.split(".")[-2:]), axis, size), []).append(len(index))
    rows = []
    for (name, axis, size), counts in folded.items():
        least, most = min(counts), max(counts)
        rows.append([name, axis, f"{least}" if least == most else f"{least} to {most}", size, len(counts)])
    title = ", ".join(f"{key} {value}" for key, value in selection.origin.items())
    print_table(title, ["module", "axis", "trained", "of", "layers"], rows)
    print(f"{trained:,} trainable parameters: {out}")


def print_run(run: RunFolder, as_json: bool) -> None:
    """Print the result of a finished run."""
    record = read_json(run.run)
    result = record["result"]
    if as_json:
        return print_json({**record, "adapter": str(run.adapter)})
    rows = [["steps", result["steps"]], _trainable(record), ["training loss, mean", f"{result['train_loss']:.4f}"]]
    if result["validation_loss"] is not None:
        rows.append(["held-out loss before", f"{result['validation_loss_before']:.4f}"])
        rows.append([f"held-out loss at step {result['best_step']}", f"{result['validation_loss']:.4f}"])
    print_table(f"finetune {record['method']} on {record['model']['source']}", ["", "value"], rows)
    if result["validation_loss"] is not None and result["validation_loss"] >= result["validation_loss_before"]:
        print("note: the held-out loss has not fallen: the base model is no worse; try another --learning-rate")
    print(f"adapter: {run.adapter}")


def _trainable(record: dict[str, Any]) -> list[str]:
    trained, base = record["trainable_parameters"], record["total_parameters"] - record["trainable_parameters"]
    return ["trainable parameters", f"{trained:,} ({trained / base:.1%} of the model's)"]


def _with_error(result: dict[str, Any] | None, unit: str) -> str:
    if result is None:
        return "-"
    form = ".1%" if unit == "fraction" else ".3f"
    return f"{result['value']:{form}} ± {result['standard_error']:{form}}"


def _evaluation_rows(value: dict[str, Any]) -> list[list[str]]:
    return [
        [result["task"], _with_error(result["before"], result["unit"]), _with_error(result["after"], result["unit"])]
        for result in value["results"]
    ]


def print_evaluation(value: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Print each task's result before and after tuning."""
    if as_json:
        return print_json({**value, "evaluation": str(out) if out else None})
    samples = value["results"][0]["before"]["samples"]
    title = f"{value['model']} on {value['data']} ({value['split']}, {samples} examples, ± standard error)"
    print_table(title, ["task", "before", "after"], _evaluation_rows(value))
    if out is not None:
        print(f"evaluation: {out}")


def print_demo(run: RunFolder) -> None:
    """Print what the demo found, in one table."""
    record = read_json(run.run)
    rows = _evaluation_rows(read_json(run.evaluation))
    result = record["result"]
    rows.append(["held-out loss", f"{result['validation_loss_before']:.3f}", f"{result['validation_loss']:.3f}"])
    rows.append([*_trainable(record)[:1], "", _trainable(record)[1]])
    rows.append(["training time", "", f"{record['timings']['train']:.0f} s"])
    print()
    print_table("rowscope demo", ["", "before", "after"], rows)
    print(f"report: {run.report}")
