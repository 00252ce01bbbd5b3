"""The command line: parse, call, print. What the commands do lives in the rooms; heavy imports happen inside them."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from . import console
from ._version import VERSION
from .errors import TOLD, ElsewhereError, InputError, unknown_name
from .options import command
from .records import (
    AXES,
    LayerScores,
    ScoreTable,
    Selection,
    checked_output,
    read_json,
    read_yaml,
    tensor_file_kind,
    write_json,
)
from .runs import RunFolder
from .settings import SEEDS, CalibrationSettings, SelectionSettings, TrainingSettings

if TYPE_CHECKING:
    from .data import Batch
    from .graph import ModelGraph
    from .models import LoadedModel
    from .scoring import Criterion

PROGRAM = "rowscope"
INTERRUPTED = 130
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

app = typer.Typer(
    name=PROGRAM,
    help="See which rows of a network matter, then tune only those.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
finetune_app = typer.Typer(help="Train a selection of a model's weights.", no_args_is_help=True)
app.add_typer(finetune_app, name="finetune")


# ---------------------------------------------------------------------------------------------- shared options


def _config_option(context: typer.Context, path: Path | None) -> Path | None:
    """Make the YAML's values the defaults of the command's options: flags still win."""
    if path is not None:
        names = {parameter.name for parameter in context.command.params}
        values = {str(name): value for name, value in read_yaml(path).items()}
        for name in values:
            if name.replace("-", "_") not in names:
                raise unknown_name(f"setting in {path}", name, [str(known).replace("_", "-") for known in names])
        context.default_map = {name.replace("-", "_"): value for name, value in values.items()}
    return path


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'demo'.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(help="Hub id, file, folder, 'demo' or 'demo-text'; by default 'demo' where MODEL is 'demo'."),
]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS - 1, help="Governs everything random.")]
Device = Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's own): what the model computes in.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse an adapter that was trained on other weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of option names and values; flags win.", is_eager=True, callback=_config_option),
]
CriterionName = Annotated[str, typer.Option(help="Name and settings, e.g. taylor or zo-taylor:passes=128.")]


def _data_source(data: str | None, model: str) -> str:
    if data == "" or (data is None and model != "demo"):
        raise InputError("no data: name a file, a folder or a hub id with --data")
    return data or "demo"


# ---------------------------------------------------------------------------------------------- commands


@command(app)
def graph(
    model: Model,
    format: Annotated[str, typer.Option(help="table, json, graphml, png or svg (a picture of one block).")] = "table",
    view: Annotated[
        str, typer.Option(help="What GraphML shows: groups, ports or dataflow.", show_default=False)
    ] = "groups",
    block: Annotated[
        str | None, typer.Option(help="The block to draw; by default the first with most groups.")
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP=CHANNELS",
            help="What removing channels would save: how many (residual=64) or which (model.layers.*.mlp=0-63,70).",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the coupled groups: rows and columns that exist or vanish together. Reads the configuration alone."""
    from . import models
    from .graph import write_groups

    format = _graph_format(format, out, as_json, remove)
    _check_graph_options(format, view, block, remove)
    traced = _traced(models.empty(model))
    if remove:
        from .graph.savings import parse_removals, savings

        console.print_savings(model, savings(traced, parse_removals(traced, remove)), format == "json")
    elif out is None:
        if format == "json":
            console.print_json({"model": model, "groups": [group.to_json() for group in traced.groups]})
        else:
            console.print_graph(model, traced)
    else:
        if format == "json":
            write_groups(out, model, traced.groups)
        elif format == "graphml":
            from .graph.views import condensed, port_graph, write_graphml

            views = {"groups": condensed, "ports": port_graph, "dataflow": lambda graph: graph.dataflow}
            write_graphml(out, views[view](traced))
        else:
            from .analysis.structure import block_picture

            block_picture(traced, out, block)
        summary = {"groups": len(traced.groups), "graph": str(out)}
        console.print_json(summary) if as_json else print(f"{len(traced.groups)} coupled groups: {out}")


GRAPH_FORMATS = ("table", "json", "graphml", "png", "svg")


def _graph_format(format: str, out: Path | None, as_json: bool, remove: list[str] | None) -> str:
    """The format that was asked for, or that the file's name tells."""
    if format not in GRAPH_FORMATS:
        raise unknown_name("format", format, GRAPH_FORMATS)
    if out is not None:
        checked_output(out)
        told = out.suffix.lstrip(".").lower()
        if format == "table" and told in GRAPH_FORMATS[1:]:
            format = told
        if remove:
            raise InputError("--remove prints: leave --out away")
        if format == "table":
            raise InputError(f"--out {out}: name a .json, .graphml, .png or .svg file, or give its --format")
        if format != told:
            raise InputError(f"--out {out} with --format {format}: name a .{format} file")
    elif format in ("graphml", "png", "svg"):
        raise InputError(f"--format {format} needs a file: give --out")
    return "json" if as_json and format == "table" else format


def _check_graph_options(format: str, view: str, block: str | None, remove: list[str] | None) -> None:
    views = ("groups", "ports", "dataflow")
    if view not in views:
        raise unknown_name("view", view, views)
    if view != "groups" and format != "graphml":
        raise InputError("--view is for --format graphml")
    if block is not None and format not in ("png", "svg"):
        raise InputError("--block is for --format png or svg")
    if remove and format not in ("table", "json"):
        raise InputError(f"--remove prints a table or JSON: leave --format {format} away")


def _traced(model: Any) -> ModelGraph:
    """The model's graph; weights that it does not reach are named on stderr."""
    import warnings

    from .graph import trace

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = trace(model)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return traced


@command(app)
def score(
    model: Model,
    data: Data = None,
    criterion: CriterionName = "taylor",
    axis: Annotated[str, typer.Option(help="row, column or both.")] = "both",
    granularity: Annotated[str, typer.Option(help="row: rows and columns; layer: each block as a whole.")] = "row",
    target_modules: Annotated[
        str | None,
        typer.Option(help="Comma-separated endings of module names, or regular expressions: down_proj,lm_head."),
    ] = None,
    calibration: CalibrationSettings = CalibrationSettings(),  # noqa: B008 (frozen)
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default scores.safetensors, of layers layer_scores.json.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a heatmap, of layers bars (.png or .svg).")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Score every row and column of the linear weights, or every block; torchrun's processes share the work."""
    from . import models, ranks, scoring

    if axis not in (*AXES, "both"):
        raise unknown_name("axis", axis, (*AXES, "both"))
    targets = [target.strip() for target in target_modules.split(",")] if target_modules is not None else []
    if not all(targets):
        raise InputError(f"--target-modules {target_modules!r} has an empty name: write endings such as q_proj,v_proj")
    _check_plot(plot)
    out = _score_file(out, granularity)
    rule = scoring.criterion(criterion)
    source = _data_source(data, model) if rule.needs_data else ""
    axes = AXES if axis == "both" else (axis,)
    with ranks.launched(device) as own_device, ranks.together():
        loaded = models.load(model, dtype=dtype, device=own_device)
        found: ScoreTable | LayerScores
        if granularity == "layer":
            found = _score_layers(loaded, rule, source, calibration, seed, axes, targets)
        else:
            found = _score(loaded, rule, source, calibration, seed, axes, targets)
        if ranks.world()[0] > 0:  # the first process has the same, and writes it
            return
    found.save(out)
    if plot is not None:
        _plot_scores(found, axes[0], plot)
    if isinstance(found, ScoreTable):
        console.print_scores(found, out, as_json)
    else:
        console.print_layer_scores(found, out, as_json)


SCORE_FILES = {"row": Path("scores.safetensors"), "layer": Path("layer_scores.json")}


def _score_file(out: Path | None, granularity: str) -> Path:
    if granularity not in SCORE_FILES:
        raise unknown_name("granularity", granularity, SCORE_FILES)
    default = SCORE_FILES[granularity]
    if out is not None and out.suffix != default.suffix:
        raise InputError(f"--out {out}: name a {default.suffix} file for scores of {granularity}s")
    return checked_output(out or default)


def _plot_scores(found: ScoreTable | LayerScores, axis: str, plot: Path) -> None:
    from .analysis import figures

    if isinstance(found, ScoreTable):
        figures.save(figures.importance_heatmap(found, axis), plot)
    else:
        figures.save(figures.layer_bars(found), plot)


def _check_plot(plot: Path | None) -> None:
    if plot is not None:
        if plot.suffix not in (".png", ".svg"):
            raise InputError(f"--plot {plot}: name a .png or .svg file")
        checked_output(plot)


def _score(
    loaded: LoadedModel,
    rule: Criterion,
    source: str,
    calibration: CalibrationSettings,
    seed: int,
    axes: tuple[str, ...] = AXES,
    target_modules: Sequence[str] = (),
) -> ScoreTable:
    from . import scoring

    return scoring.score(
        loaded.model,
        rule,
        _calibration_batches(loaded, rule, source, calibration, seed),
        target_modules=target_modules,
        axes=axes,
        seed=seed,
        model_source=loaded.source,
        model_fingerprint=loaded.fingerprint,
        data_source=source,
    )


def _calibration_batches(
    loaded: LoadedModel, rule: Criterion, source: str, calibration: CalibrationSettings, seed: int
) -> list[Batch]:
    from . import data

    if not rule.needs_data:
        return []
    return data.calibration_batches(data.load(source)["train"], loaded.tokenizer, calibration, seed)


def _score_layers(
    loaded: LoadedModel,
    rule: Criterion,
    source: str,
    calibration: CalibrationSettings,
    seed: int,
    axes: tuple[str, ...],
    target_modules: Sequence[str],
) -> LayerScores:
    """By forward passes alone where the criterion is zero order; else the layer's rows (or columns) summed."""
    from .scoring import zo_taylor
    from .scoring.layer_scores import from_rows, zero_order

    if not isinstance(rule, zo_taylor.ZerothOrderTaylor):
        return from_rows(_score(loaded, rule, source, calibration, seed, axes[:1], target_modules), axes[0])
    if target_modules or len(axes) == 1:
        raise InputError("zo-taylor scores layers as a whole, without rows: leave --axis and --target-modules away")
    return zero_order(
        loaded.model,
        _calibration_batches(loaded, rule, source, calibration, seed),
        passes=rule.passes,
        epsilon=rule.epsilon,
        seed=seed,
        model_source=loaded.source,
        model_fingerprint=loaded.fingerprint,
        data_source=source,
    )


@command(app)
def compare(
    scores: Annotated[
        list[Path],
        typer.Argument(metavar="SCORES...", help="Files that 'rowscope score' wrote.", show_default=False),
    ],
    axis: Annotated[
        str | None, typer.Option(help="row or column; by default what all files have, rows before columns.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the matrix of agreements (.png or .svg).")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write: .json, every module of every pair.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how far rankings agree, and how far to trust each; one alone is compared with the weight norm."""
    from .scoring import trust

    if axis not in (None, *AXES):
        raise unknown_name("axis", axis, AXES)
    _check_plot(plot)
    if out is not None and checked_output(out).suffix != ".json":
        raise InputError(f"--out {out}: name a .json file")
    for path in scores:
        if scores.count(path) > 1:
            raise InputError(f"{path} is named twice: name each file once")
    tables = [ScoreTable.load(path) for path in scores]
    value = trust.compare(trust.labels(tables, [str(path) for path in scores]), axis)
    if plot is not None:
        from .analysis import figures

        figures.save(figures.agreement_matrix(value), plot)
    if out is not None:
        write_json(out, value)
    console.print_comparison(value, [path for path in (out, plot) if path], as_json)


@command(app)
def select(
    scores: Annotated[
        Path,
        typer.Argument(
            metavar="SCORES",
            help="A file that 'rowscope score' wrote; or a selection, to write it in the other format.",
            show_default=False,
        ),
    ],
    choice: SelectionSettings = SelectionSettings(),  # noqa: B008 (frozen)
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .yaml to edit.")] = Path(
        "selection.safetensors"
    ),
    seed: Seed = 0,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Pick what to train from scores, under a budget."""
    from . import models, scoring

    scoring.Budget.parse(choice.budget)
    if out.suffix not in (".safetensors", ".yaml", ".yml"):
        raise InputError(f"--out {out}: name a .safetensors or .yaml file")
    checked_output(out)
    if scores.suffix in (".yaml", ".yml") or (scores.is_file() and tensor_file_kind(scores) == "selection"):
        selection = _converted(scores, choice)
    else:
        layer_scores = _layer_scores(choice)
        table = ScoreTable.load(scores)
        loaded = models.load(table.provenance.model_source) if _needs_model(choice) else None
        selection = _select(table, choice, seed, layer_scores, loaded)
    selection.save(out)
    console.print_selection(selection, out, as_json)


def _converted(path: Path, choice: SelectionSettings) -> Selection:
    if choice != SelectionSettings():
        raise InputError(f"{path} is a selection already, it is only written again: leave --budget and the like away")
    return Selection.load(path)


def _needs_model(choice: SelectionSettings) -> bool:
    return choice.scope.startswith("coupled") or choice.pick == "diverse"


def _layer_scores(choice: SelectionSettings) -> LayerScores | None:
    """Those that --layer-scores names; a table of scores is summed."""
    if choice.layer_scores is None:
        return None
    path = Path(choice.layer_scores)
    if path.suffix != ".safetensors":
        return LayerScores.load(path)
    from .scoring.layer_scores import from_rows

    table = ScoreTable.load(path)
    return from_rows(table, next(axis for axis in AXES if axis in next(iter(table.scores.values()))))


def _select(
    table: ScoreTable,
    choice: SelectionSettings,
    seed: int,
    layer_scores: LayerScores | None,
    loaded: LoadedModel | None,
) -> Selection:
    from . import scoring
    from .scoring.vectors import weight_matrices

    if loaded is not None and loaded.fingerprint != table.provenance.model_fingerprint:
        raise InputError(f"the scores are of another model than {loaded.source}: score it again")
    return scoring.select(
        table,
        scoring.Budget.parse(choice.budget),
        scope=choice.scope,
        axis=choice.axis or AXES[0],
        pick=choice.pick,
        groups=_traced(loaded.model).groups if loaded is not None and choice.scope.startswith("coupled") else (),
        heads=choice.heads,
        group_reduction=choice.group_reduction,
        normalizer=choice.normalizer,
        layer_scores=layer_scores,
        layer_floor=choice.layer_floor,
        layer_cap=choice.layer_cap,
        vectors=weight_matrices(loaded.model) if loaded is not None else None,
        seed=seed,
    )


@finetune_app.callback()
def _finetune() -> None:
    """Train a selection of a model's weights."""


@command(finetune_app, "rows")
def finetune_rows(
    model: Model,
    data: Data = None,
    selection: Annotated[
        Path | None, typer.Option(help="What to train; without it rows are scored and selected.")
    ] = None,
    criterion: CriterionName = "taylor",
    choice: SelectionSettings = SelectionSettings(),  # noqa: B008 (frozen)
    calibration: CalibrationSettings = CalibrationSettings(),  # noqa: B008 (frozen)
    training: TrainingSettings = TrainingSettings(),  # noqa: B008 (frozen)
    dtype: Dtype = "float32",
    output_dir: Annotated[Path | None, typer.Option(help="Run folder; by default runs/rows-MODEL-N.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output-dir.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Train selected rows and columns, everything else frozen; the result is a PEFT adapter in a run folder.

    Processes that torchrun or accelerate launch has started train together.
    """
    from . import ranks, scoring

    with ranks.launched(training.device) as own_device, ExitStack() as run_lock:
        with ranks.together():
            if resume and output_dir is None:
                raise InputError("--resume needs --output-dir: name the run folder to continue")
            rule = scoring.criterion(criterion)
            scoring.Budget.parse(choice.budget)
            source = _data_source(data, model)
            layer_scores = _layer_scores(choice)
            given = Selection.load(selection) if selection is not None else None
        what = {"model": model, "data": source, "selection": str(selection) if selection else None}
        how = {"criterion": criterion, "dtype": dtype} | asdict(choice) | asdict(calibration) | asdict(training)
        run, is_new = ranks.from_first(lambda: _opened(output_dir, model, what | how, resume))
        run = replace(run, writes=ranks.world()[0] == 0)
        run_lock.enter_context(run.removed_if_refused(is_new))
        if not ranks.from_first(run.is_finished):
            with ranks.together():
                recorded = run.recorded([PROGRAM, *sys.argv[1:]], "rows", training.seed, training.device)
                record = run_lock.enter_context(recorded)
                loaded = _load_recorded(record, model, dtype, own_device)
            if given is None:  # an interrupted run has already selected
                given = ranks.from_first(lambda: Selection.load(run.selection) if run.selection.is_file() else None)
            if given is None:
                started = time.perf_counter()
                with ranks.together():
                    table = _score(loaded, rule, source, calibration, training.seed)
                given = ranks.from_first(lambda: _selected(run, table, choice, training.seed, layer_scores, loaded))
                record["timings"]["score"] = time.perf_counter() - started
            with ranks.together():
                _check_selection(given, loaded)
                if run.writes:
                    given.save(run.selection)
            record["selection"] = given.origin
            _train_rows(run, record, loaded, source, given, training)
    if run.writes:
        console.print_run(run, as_json)


def _opened(output_dir: Path | None, model: str, settings: dict[str, Any], resume: bool) -> tuple[RunFolder, bool]:
    """The run folder with its configuration, and whether it is new."""
    run = RunFolder.create(output_dir, resume=resume) if output_dir else RunFolder.next_free("rows", model)
    is_new = not any(run.root.iterdir())
    if resume and is_new:
        print(f"nothing to resume in {run.root}: starting afresh", file=sys.stderr)
    run.keep_config(settings)
    return run, is_new


def _selected(
    run: RunFolder,
    table: ScoreTable,
    choice: SelectionSettings,
    seed: int,
    layer_scores: LayerScores | None,
    loaded: LoadedModel,
) -> Selection:
    table.save(run.scores)
    return _select(table, choice, seed, layer_scores, loaded)


def _check_selection(selection: Selection, loaded: LoadedModel) -> None:
    """Refuse a selection made on other weights, or edited until it fits no module."""
    from . import experts
    from .scoring.weights import view

    if selection.model_fingerprint and selection.model_fingerprint != loaded.fingerprint:
        raise InputError(f"the selection is of another model than {loaded.source}: score and select again")
    for name in selection.indices:
        try:
            weight = view(name, experts.submodule(loaded.model, name))
        except AttributeError:
            weight = None
        if weight is None:
            raise InputError(f"selection: {loaded.source} has no module {name!r} with rows and columns: leave it out")
        shape = (weight.out_features, weight.in_features)
        if selection.shapes[name] != shape:
            raise InputError(f"selection: {name!r} has shape {shape}, not {selection.shapes[name]}: select again")


def _load_recorded(record: dict[str, Any], model: str, dtype: str, device: str) -> LoadedModel:
    from . import models

    loaded = models.load(model, dtype=dtype, device=device)
    record["model"] = {"source": model, "fingerprint": loaded.fingerprint}
    return loaded


def _train_rows(
    run: RunFolder,
    record: dict[str, Any],
    loaded: LoadedModel,
    source: str,
    selection: Selection,
    training: TrainingSettings,
) -> None:
    from . import data, ranks
    from .analysis.memory import MemoryCallback
    from .finetune import RowsConfig, train

    with ranks.together():
        splits = data.load(source)
        held_out = splits.held_out()
        rows = RowsConfig.from_selection(selection, base_model_name_or_path=loaded.source)
    record["data"] = {"source": source}
    result = train(
        loaded.model,
        loaded.tokenizer,
        splits["train"],
        held_out,
        rows,
        training,
        run,
        resume=True,
        callbacks=[MemoryCallback(run.memory)],
    )
    found = asdict(result)
    record["timings"]["train"] = found.pop("seconds")
    for name in ("trainable_parameters", "total_parameters"):
        record[name] = found.pop(name)
    record["result"] = found


@command(app)
def evaluate(
    model: Model,
    adapter: Annotated[Path | None, typer.Option(help="Run folder or adapter folder.")] = None,
    data: Data = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated: perplexity, exact-match.")] = "perplexity",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "test",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example; longer ones are cut.")] = 512,
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default evaluation.json of the run folder.")
    ] = None,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure a model, and with --adapter the same model after tuning."""
    from . import data as datasets
    from . import models
    from .analysis.evaluate import TASKS, UNITS
    from .analysis.evaluate import evaluate as run_task

    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
    source = _data_source(data, model)
    folder = _adapter_folder(adapter) if adapter else None
    rows = datasets.load(source)[split]
    if out is None and adapter is not None and (adapter / "run.json").is_file():
        out = RunFolder(adapter).evaluation
    if out is not None:
        checked_output(out)
    loaded = models.load(model, dtype=dtype, device=device)
    started = time.perf_counter()
    before = {name: run_task(name, loaded.model, loaded.tokenizer, rows, max_length=max_length) for name in names}
    after = {}
    if folder is not None:
        from .finetune import load_adapter

        _check_base(adapter or folder, loaded, strict)
        adapted = load_adapter(loaded.model, folder)
        after = {name: run_task(name, adapted, loaded.tokenizer, rows, max_length=max_length) for name in names}
    results = [
        {
            "task": name,
            "unit": UNITS[name],
            "before": asdict(before[name]),
            "after": asdict(after[name]) if after else None,
        }
        for name in names
    ]
    value = {
        "model": model,
        "data": source,
        "split": split,
        "seconds": time.perf_counter() - started,
        "results": results,
    }
    if out is not None:
        write_json(out, value)
    console.print_evaluation(value, out, as_json)


def _check_base(adapter: Path, loaded: LoadedModel, strict: bool) -> None:
    """Say, or with `strict` refuse, that an adapter was trained on other weights than those that are loaded."""
    import warnings

    from .finetune.base import OtherBaseWarning

    record = read_json(adapter / "run.json") if (adapter / "run.json").is_file() else {}
    trained_on = (record.get("model") or {}).get("fingerprint")
    trained_on = trained_on or read_json(_adapter_folder(adapter) / "adapter_config.json").get("base_fingerprint")
    if trained_on not in (None, loaded.fingerprint):
        message = f"{adapter} was trained on other weights than those of {loaded.source}"
        if strict:
            raise InputError(f"{message}: name its own base model, or leave --strict away")
        print(f"note: {message}", file=sys.stderr)
    warnings.simplefilter("ignore", OtherBaseWarning)  # it has been said


def _adapter_folder(path: Path) -> Path:
    folder = path / "adapter" if (path / "run.json").is_file() else path
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{path} holds no adapter: name a finished run folder or an adapter folder")
    return folder


@command(app)
def merge(
    model: Model,
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Run folders or adapter folders.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.", show_default=False)],
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="Write a LoRA adapter, for engines that serve LoRA, not a whole model.")
    ] = False,
    strict: Strict = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Merge adapters into a plain checkpoint, or write one of rows and columns as a LoRA, exactly."""
    from . import models
    from .finetune import load_adapter, merge_adapters
    from .finetune.export import save_as_lora

    if as_lora and len(adapters) > 1:
        raise InputError("--as-lora writes one adapter: name one, or merge them all into a checkpoint")
    folders = [_adapter_folder(adapter) for adapter in adapters]
    checked_output(out / "config.json")
    loaded = models.load(model, dtype=dtype)
    for adapter in adapters:
        _check_base(adapter, loaded, strict)
    if as_lora:
        config = save_as_lora(load_adapter(loaded.model, folders[0]), out)
        summary = {"lora": str(out), "largest_rank": config.r}
    else:
        models.save(merge_adapters(loaded.model, folders), loaded.tokenizer, out)
        summary = {"model": str(out), "adapters": len(folders)}
    console.print_json(summary) if as_json else print(f"{'LoRA adapter' if as_lora else 'merged model'}: {out}")


@command(app)
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Run folders, scores, selections, memory files.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write; by default report.html in the first run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about runs, scores and selections."""
    from .analysis.report import render

    if out is None:
        out = RunFolder(paths[0]).report if paths[0].is_dir() else Path("report.html")
    render(paths, out)
    console.print_json({"report": str(out)}) if as_json else print(f"report: {out}")


DEMO_ZERO_ORDERS = {"zo-taylor": "zo-taylor:passes=128", "zo-spsa": "zo-taylor:estimator=spsa,passes=128"}


@command(app)
def demo(
    output_dir: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue, or show, the run in --output-dir.")] = False,
    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    seed: Seed = 0,
) -> None:
    """Run the whole chain on the embedded model and data: graph, score, select, finetune, evaluate, report."""
    run = RunFolder.create(output_dir, resume=resume)
    if run.config.is_file() and read_yaml(run.config).get("model") != "demo":
        raise InputError(f"{output_dir} holds another run than the demo: name another --output-dir")
    ours, published = (run.root / f"scores-{name}.safetensors" for name in DEMO_ZERO_ORDERS)
    zero_orders = zip((ours, published), DEMO_ZERO_ORDERS.values(), ("", ", as published"), strict=True)
    comparison = run.root / "comparison.json"
    steps: list[tuple[str, Path | None, Callable[[], None]]] = [
        ("graph", run.graph, lambda: graph("demo", out=run.graph)),
        ("score, exact gradients", run.scores, lambda: score("demo", out=run.scores, seed=seed)),
        *(
            (
                f"score, forward passes only{how}",
                path,
                lambda path=path, criterion=criterion: score("demo", criterion=criterion, out=path, seed=seed),
            )
            for path, criterion, how in zero_orders
        ),
        ("compare the rankings", comparison, lambda: compare([run.scores, ours, published], out=comparison)),
        (
            "select coupled channels",
            run.selection,
            lambda: select(run.scores, SelectionSettings(), out=run.selection),
        ),
        (
            "finetune the selection",
            None,  # resumes by itself
            lambda: finetune_rows(
                "demo",
                selection=run.selection,
                output_dir=run.root,
                resume=True,
                training=TrainingSettings(max_steps=max_steps, per_device_train_batch_size=16, seed=seed),
            ),
        ),
        (
            "evaluate before and after",
            run.evaluation,
            lambda: evaluate("demo", adapter=run.root, tasks="exact-match,perplexity"),
        ),
        ("report", run.report, lambda: report([run.root])),
    ]
    for number, (title, result, step) in enumerate(steps, 1):
        print(f"\n{number}/{len(steps)} {title}")
        if result is not None and result.exists():
            print(f"already there: {result}")
        else:
            step()
    console.print_demo(run)


# ---------------------------------------------------------------------------------------------- entry point


def _show_version(value: bool) -> None:
    if value:
        print(f"{PROGRAM} {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """See which rows of a network matter, then tune only those."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the input is wrong (one line), 1 a bug (traceback), 130 interrupted."""
    # DDP says at every start that it has looked for unused parameters, and found none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Where other programs compete for the cores, OpenMP's waiting threads spin most of the time away: let them yield.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # bitsandbytes, which PEFT imports, warns of a missing accelerator of its own at every start
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        status = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        if status == INTERRUPTED:  # Typer has caught it
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except InputError as error:
        _fail(str(error), error)
    except TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group of commands was named without a command: this is its help
            print(message, file=sys.stderr)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        _fail(f"{message.rstrip('.')}; see {context.command_path if context else PROGRAM} --help")
    except BrokenPipeError:  # who read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno not in NO_SPACE:
            raise
        mend = "free some space" if error.errno in NO_SPACE else "check that the path exists and may be written"
        _fail(f"{error.strerror or error} ({error.filename or 'output'}): {mend}", error)
    except (KeyboardInterrupt, typer.Abort):
        named = (sys.argv[1:] if arguments is None else arguments)[:1]
        resumable = named in (["finetune"], ["demo"])
        print(f"{PROGRAM}: interrupted{'; --resume continues' if resumable else ''}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(message: str, error: Exception | None = None) -> None:
    # Of several processes one says it: who has failed where, or the first, if that was before they had met.
    is_first = os.environ.get("RANK", "0") == "0"
    if not isinstance(error, ElsewhereError) and (is_first or hasattr(error, TOLD)):
        print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
