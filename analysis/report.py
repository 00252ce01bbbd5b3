"""One self-contained HTML page about runs and score tables, made from files alone: no model, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from .._version import VERSION
from ..errors import InputError
from ..records import (
    AXES,
    LayerScores,
    ScoreTable,
    Selection,
    checked_output,
    read_json,
    read_yaml,
    tensor_file_kind,
    write_text,
)
from ..runs import RunFolder
from ..scoring import layer_scores
from ..scoring.trust import compare, labels
from . import comparison, figures


@dataclass(frozen=True)
class Picture:
    """A figure on the page: inline SVG and the sentence below it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    """A table on the page; the first column names the rows."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Section:
    """A titled part of a chapter, shown in the order text, tables, pictures; left out if all are empty."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass
class Contents:
    """What one path holds, as far as it is there."""

    name: str
    run: RunFolder | None = None
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tables: list[ScoreTable] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # the file of each table
    comparison: dict[str, Any] = field(default_factory=dict)
    layer_scores: LayerScores | None = None
    selection: Selection | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def render(paths: Sequence[Path], out: Path) -> Path:
    """Write the page about run folders and files of one: scores, selections, comparisons, memory, …, in any mix.

    Score files of one model share a chapter. The figures of a run folder are also written there as PNG.

    Raises:
        InputError: if a path does not exist, is none of these, or is damaged; nothing is written then.
    """
    checked_output(out)
    contents = _joined([_read(path) for path in dict.fromkeys(paths)])
    writer = FigureWriter()
    chapters = [(entry.name, _chapter(entry, writer)) for entry in contents]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    title = contents[0].name if len(contents) == 1 else f"{len(contents)} results"
    results = _results(contents) if len(contents) > 1 and any(entry.record for entry in contents) else None
    page = environment.get_template("report.html.j2").render(
        title=title, chapters=chapters, results=results, version=VERSION
    )
    for entry in contents:
        if entry.run is not None:
            writer.save(entry.name, entry.run.figures)
    write_text(out, page)
    return out


def _chapter(entry: Contents, writer: FigureWriter) -> list[Section]:
    try:
        return list(_sections(entry, writer))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise InputError(f"{entry.name} holds a damaged file ({reason}): make it again") from error


class FigureWriter:
    """Turns figures into pictures of the page, and remembers them to be saved as files."""

    def __init__(self) -> None:
        self._figures: dict[str, dict[str, Figure]] = {}
        self._number = 0

    def picture(self, entry: Contents, name: str, figure: Figure, caption: str) -> Picture:
        """The figure as inline SVG, every id on the page its own."""
        self._number += 1
        self._figures.setdefault(entry.name, {})[name] = figure
        return Picture(Markup(figures.svg(figure, f"f{self._number}")), caption)

    def save(self, entry_name: str, folder: Path) -> None:
        """Write the figures of one entry as PNG."""
        for name, figure in self._figures.get(entry_name, {}).items():
            figures.save(figure, folder / f"{name}.png")


# ---------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> Contents:
    if path.is_dir():
        return _read_run(RunFolder(path))
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a run folder or a file that rowscope wrote")
    if path.suffix == ".safetensors" and tensor_file_kind(path) == "scores":
        return Contents(str(path), tables=[ScoreTable.load(path)], sources=[str(path)])
    if path.suffix in (".safetensors", ".yaml", ".yml"):
        return Contents(str(path), selection=Selection.load(path))
    value = read_json(path)
    if "components" in value:
        return Contents(str(path), memory=value)
    if "results" in value:
        return Contents(str(path), evaluation=value)
    if "pairs" in value:
        return Contents(str(path), comparison=value)
    if value.get("kind") == "layer_scores":
        return Contents(str(path), layer_scores=LayerScores.load(path))
    raise InputError(f"{path} holds nothing that rowscope measured: name a run folder or a file of one")


def _joined(contents: list[Contents]) -> list[Contents]:
    """Bare score files of one model become one entry, in the place of the first."""
    joined: dict[str, Contents] = {}
    for entry in contents:
        bare = entry.run is None and entry.tables
        home = joined.setdefault(entry.tables[0].provenance.model_fingerprint if bare else entry.name, entry)
        if home is not entry:
            home.tables += entry.tables
            home.sources += entry.sources
            home.name = f"{len(home.tables)} score tables of {home.tables[0].provenance.model_source}"
    return list(joined.values())


def _read_run(run: RunFolder) -> Contents:
    files = run.score_tables()
    tables = [ScoreTable.load(path) for path in files]
    if not run.run.is_file() and not tables:
        raise InputError(f"{run.root} is no run folder: it holds neither run.json nor scores.safetensors")
    return Contents(
        name=str(run.root),
        run=run,
        record=read_json(run.run) if run.run.is_file() else {},
        config=read_yaml(run.config) if run.config.is_file() else {},
        tables=tables,
        sources=[path.name for path in files],
        selection=Selection.load(run.selection) if run.selection.is_file() else None,
        log=run.read_log(),
        memory=read_json(run.memory) if run.memory.is_file() else {},
        evaluation=read_json(run.evaluation) if run.evaluation.is_file() else {},
    )


# ---------------------------------------------------------------------------------------------- sections


def _sections(entry: Contents, writer: FigureWriter) -> Iterator[Section]:
    """The sections in the order a reader asks, those without content left out."""
    makers = (_trained, _gained, _cost, _scores, _layers, _trust, _reproduce)
    for make in makers:
        section = make(entry, writer)
        if section.text or section.tables or section.pictures:
            yield section


def _trained(entry: Contents, writer: FigureWriter) -> Section:
    section = Section("What was trained, and why these rows")
    record, selection = entry.record, entry.selection
    if record.get("status", "finished") != "finished":
        section.text.append(f"This run is {record['status']}: what follows is what it left.")
    if selection is None:
        return section
    origin, trained = selection.origin, selection.trainable_parameters()
    base = record.get("total_parameters", 0) - trained
    share = f", as many as {trained / base:.1%} of the model's {base:,}" if base > 0 else ""
    axes = sorted({axis for module in selection.indices.values() for axis in module})
    section.text.append(
        f"{trained:,} weights are trained{share}: {' and '.join(f'{axis}s' for axis in axes)} of "
        f"{len(selection.indices)} modules, everything else is frozen."
    )
    if origin:
        how = {"layer": "within each module", "coupled": "as whole channels of coupled groups"}
        scope = how.get(origin.get("scope", ""), origin.get("scope", ""))
        section.text.append(
            f"They have the largest {origin.get('criterion', 'given')} scores {scope}, "
            f"under the budget {origin.get('budget', 'given')}."
        )
    layers = entry.tables[0].provenance.layers if entry.tables else _layer_names(selection)
    figure = figures.selection_map(selection, layers)
    section.pictures.append(
        writer.picture(entry, "selection", figure, "Share of each module's weights that is trained.")
    )
    return section


def _layer_names(selection: Selection) -> list[str]:
    """Block names as far as module names tell them: everything up to the first number."""
    names = []
    for module in selection.indices:
        parts = module.split(".")
        position = next((number for number, part in enumerate(parts) if part.isdigit()), None)
        if position is not None:
            names.append(".".join(parts[: position + 1]))
    return list(dict.fromkeys(names))


def _gained(entry: Contents, writer: FigureWriter) -> Section:
    section = Section("What it gained")
    results = entry.evaluation.get("results", [])
    if results:
        rows = [[_task(result), _value(result, "before"), _value(result, "after")] for result in results]
        where = f"{entry.evaluation.get('data', '')}, split {entry.evaluation.get('split', '')}"
        section.tables.append(Table(["task", "before", "after"], rows, f"On {where}; ± is one standard error."))
    if entry.log:
        figure = figures.loss_curves(entry.log)
        section.pictures.append(writer.picture(entry, "loss", figure, "Loss in nats per token, by optimizer step."))
    return section


def _task(result: dict[str, Any]) -> str:
    samples = result["before"].get("samples")
    return f"{result['task']} ({samples} examples)" if samples else str(result["task"])


def _value(result: dict[str, Any], side: str) -> str:
    found = result.get(side)
    if not found:
        return "not measured"
    form = ".1%" if result.get("unit") == "fraction" else ".4g"
    return f"{found['value']:{form}} ± {found['standard_error']:{form if form == '.1%' else '.2g'}}"


def _cost(entry: Contents, writer: FigureWriter) -> Section:
    section = Section("What it cost")
    record = entry.record
    rows = []
    if "trainable_parameters" in record:
        rows.append(["trainable parameters", f"{record['trainable_parameters']:,}"])
    if "result" in record:
        rows.append(["optimizer steps", f"{record['result'].get('steps')}"])
    rows += [[f"time to {name}", f"{seconds:.1f} s"] for name, seconds in record.get("timings", {}).items()]
    weights = entry.run.adapter / "adapter_model.safetensors" if entry.run else None
    if weights is not None and weights.is_file():
        rows.append(["adapter file", f"{weights.stat().st_size / 2**20:.2f} MiB"])
    if entry.memory.get("peak_rss"):
        rows.append(["peak of the process, libraries included", f"{entry.memory['peak_rss'] / 2**20:,.0f} MiB"])
    if rows:
        section.tables.append(Table(["", "value"], rows))
    if entry.memory:
        batch = " × ".join(str(size) for size in entry.memory.get("batch", []))
        caption = f"Measured at the first step, batch of {batch} tokens. Activations are what the forward pass keeps."
        section.pictures.append(writer.picture(entry, "memory", figures.memory_bars(entry.memory), caption))
    return section


def _scores(entry: Contents, writer: FigureWriter) -> Section:
    section = Section("Which rows matter")
    for number, table in enumerate(entry.tables):
        bad = sum(int((~v.isfinite()).sum()) for axes in table.scores.values() for v in axes.values())
        if bad:
            section.text.append(f"{table.provenance.criterion}: {bad:,} scores are not finite (NaN or infinity).")
        for axis in AXES:
            if any(axis in axes for axes in table.scores.values()):
                figure = figures.importance_heatmap(table, axis)
                caption = f"Importance of {axis}s by {table.provenance.criterion}, blocks by modules."
                section.pictures.append(writer.picture(entry, f"importance-{number}-{axis}", figure, caption))
    return section


def _layers(entry: Contents, writer: FigureWriter) -> Section:
    section = Section("Which layers matter")
    found = entry.layer_scores
    if found is not None:
        passes = f"{found.forward_passes} forward and {found.backward_passes} backward passes"
        caption = f"By {found.criterion}, {passes} on {found.data_source or 'no data'}."
        section.tables.append(Table(*layer_scores.rows(found), caption))
        section.pictures.append(writer.picture(entry, "layers", figures.layer_bars(found), "Importance of blocks."))
    return section


def _trust(entry: Contents, writer: FigureWriter) -> Section:
    section = Section("How far to trust the scores")
    value = entry.comparison
    if entry.tables:
        try:
            value = compare(labels(entry.tables, entry.sources))
        except InputError as error:
            section.text.append(f"The scores are not compared: {error}.")
    if not value:
        return section
    section.text += [*comparison.notes(value), *comparison.pair_sentences(value)]
    caption = (
        f"Of the {value['axis']}s; medians over modules. Passes: forward + backward. Memory: peak above the state "
        "before. Stability: would other data give the same ranking? Beyond ‖w‖: the same with the weight norm "
        "partialled out. Like ‖w‖: near 1, the ranking says little that the norm does not say for free."
    )
    section.tables.append(Table(*comparison.trust_rows(value), caption))
    caption = (
        f"Agreement: median over modules / of all their {value['axis']}s as one ranking. Spearman, Kendall's tau, "
        "Spearman with the weight norm partialled out, and the share of one's top tenth that is in the other's."
    )
    section.tables.append(Table(*comparison.pair_rows(value), caption))
    if len(value["tables"]) > 1:
        figure = figures.agreement_matrix(value)
        caption = f"Rank agreement of {value['axis']} scores, median over modules; framed: each ranking's stability."
        section.pictures.append(writer.picture(entry, "agreement", figure, caption))
    return section


def _reproduce(entry: Contents, _: FigureWriter) -> Section:
    section = Section("How to reproduce it")
    record = entry.record
    rows = []
    if record.get("command"):
        rows.append(["command", " ".join(record["command"])])
    model = record.get("model") or _identity(entry)
    rows += [[f"model {name}", str(value)] for name, value in model.items()]
    rows += [[f"{name} version", str(value)] for name, value in record.get("versions", {}).items()]
    rows += [[name.replace("_", " "), str(value)] for name, value in entry.config.items() if value is not None]
    if rows:
        section.tables.append(Table(["", "value"], rows))
    if entry.tables:
        rows = [_origin(table, source) for table, source in zip(entry.tables, entry.sources, strict=True)]
        columns = ["scores", "file", "modules", "weights", "data", "data fingerprint", "seed"]
        section.tables.append(Table(columns, rows, "Where the scores come from."))
    return section


def _origin(table: ScoreTable, source: str) -> list[str]:
    provenance = table.provenance
    dtypes = sorted({provenance.dtypes[module] for module in table.scores})
    data = [provenance.data_source or "given in Python", provenance.data_fingerprint[:12]]
    data = data if provenance.data_fingerprint else ["none", "-"]
    return [provenance.criterion, source, str(len(table.scores)), ", ".join(dtypes), *data, str(provenance.seed)]


def _identity(entry: Contents) -> dict[str, str]:
    if entry.tables:
        provenance = entry.tables[0].provenance
        return {"source": provenance.model_source, "fingerprint": provenance.model_fingerprint}
    if entry.comparison:
        return dict(entry.comparison["model"])
    if entry.layer_scores:
        return {"source": entry.layer_scores.model_source, "fingerprint": entry.layer_scores.model_fingerprint}
    return {"fingerprint": entry.selection.model_fingerprint} if entry.selection else {}


def _results(contents: list[Contents]) -> Table:
    """One line a result: what a reader compares first."""
    rows = []
    for entry in contents:
        result, record = entry.record.get("result", {}), entry.record
        loss = result.get("validation_loss")
        exact = next((r for r in entry.evaluation.get("results", []) if r["task"] == "exact-match"), None)
        origin = entry.selection.origin if entry.selection else {}
        rows.append(
            [
                entry.name,
                origin.get("criterion", ""),
                origin.get("scope", ""),
                f"{record['trainable_parameters']:,}" if "trainable_parameters" in record else "",
                "" if loss is None or math.isnan(loss) else f"{loss:.4f}",
                _value(exact, "after") if exact else "",
            ]
        )
    return Table(["result", "criterion", "scope", "trainable", "held-out loss", "exact match"], rows)
