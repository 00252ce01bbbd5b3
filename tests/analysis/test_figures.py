"""Figures draw what they were given: looked up in the drawn objects, not in pixels."""

import numpy
import pytest
import torch
from matplotlib.figure import Figure

from rowscope import InputError, ScoreTable, Selection
from rowscope.analysis import figures
from rowscope.analysis.drawing import OUTSIDE, grid
from rowscope.records import LayerScores, Provenance
from rowscope.scoring.trust import compare

POINTS = [
    {"criterion": name, "passes": passes, "mean": 0.1 * number + passes / 1000, "standard_error": 0.02}
    for number, name in enumerate(["zo-taylor", "direct-taylor", "wanda"])
    for passes in (64, 8, 16)
]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def table(shapes, layers, axes=("row", "column"), criterion="taylor", seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: {
            axis: torch.rand(size, generator=generator)
            for axis, size in zip(("row", "column"), shape, strict=True)
            if axis in axes
        }
        for name, shape in shapes.items()
    }
    origin = Provenance(
        criterion, "m", "f" * 64, layers, shapes, dict.fromkeys(shapes, "float32"), data_fingerprint="d"
    )
    return ScoreTable(scores, scores, origin, (scores, scores))


def test_fidelity_has_a_line_a_criterion():
    """Guards the fidelity figure: a line, a band of two standard errors and a name for each criterion, a ceiling."""
    figure = figures.fidelity_curves(POINTS, {"split half of taylor": 0.9, "weight norm": 0.2})
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["zo-taylor", "direct-taylor", "wanda", "split half of taylor", "weight norm"]
    assert lines["direct-taylor"].get_xdata().tolist() == [8, 16, 64], "in the order of passes"
    assert lines["direct-taylor"].get_ydata() == pytest.approx([0.108, 0.116, 0.164])
    assert set(lines["split half of taylor"].get_ydata()) == {0.9}
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.008 - 0.04, 0.064 + 0.04))
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert "highest 0.26 by wanda at 64 passes" in figure.get_label()


def test_fidelity_lines_differ_in_grey():
    """Guards readers without colours: no two of a dozen lines share dashes and marker."""
    points = [{**POINTS[0], "criterion": f"c{number}", "passes": p} for number in range(12) for p in (8, 16)]
    lines = figures.fidelity_curves(points).axes[0].lines
    assert len({(line.get_marker(), str(line._dash_pattern)) for line in lines}) == 12


def test_fidelity_of_one_seed_and_one_point():
    """Guards the poorest measurement: one number of passes, one seed, no ceiling."""
    point = {"criterion": "taylor", "passes": 16, "mean": 0.8, "standard_error": float("nan")}
    assert figures.fidelity_curves([point]).axes[0].lines[-1].get_ydata().tolist() == [0.8]


def test_fidelity_refuses_what_a_log_axis_cannot_show():
    """Guards against a criterion that silently goes missing: no passes have no place on the axis."""
    with pytest.raises(InputError, match="magnitude spends no pass"):
        figures.fidelity_curves([{"criterion": "magnitude", "passes": 0, "mean": 0.1, "standard_error": 0.0}])
    with pytest.raises(InputError, match="no fidelity"):
        figures.fidelity_curves([])


def test_layer_bars():
    """Guards the picture of layers: a bar each in the model's order, two standard errors where known, and words."""
    scores = LayerScores({"h.0": 1.0, "h.1": 4.0, "h.2": 0.0}, "gates:passes=8", noise={"h.0": 0.1, "h.1": 0.25})
    (axes,) = (figure := figures.layer_bars(scores)).axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 4.0, 0.0]
    ends = [segment[:, 1].tolist() for segment in axes.containers[1].lines[2][0].get_segments() if len(segment)]
    assert numpy.allclose(ends, [[0.8, 1.2], [3.5, 4.5]])
    assert [tick for tick in axes.get_xticks() if 0 <= tick <= 2] == [0, 1, 2]
    assert "by gates:passes=8. Highest in h.1: 2.4 times the average layer." in figure.get_label()
    (axes,) = figures.layer_bars(LayerScores({"only": 0.0}, "rows:taylor")).axes
    assert axes.get_ylabel() == "score", "nothing is said of errors where none is known"


def test_agreement_matrix_shows_the_comparison():
    """Guards the matrix: Spearman above the diagonal, beyond the norm below, stability on it, signs included."""
    names = ["taylor", "wanda", "random"]
    tables = [table({"b.0.up": (30, 20)}, ["b.0"], criterion=name, seed=seed) for seed, name in enumerate(names)]
    value = compare(dict(zip(names, tables, strict=True)))
    figure = figures.agreement_matrix(value)
    shown = numpy.array([float(text) for text in texts(figure.axes[0])]).reshape(3, 3)
    for pair in value["pairs"]:
        first, second = names.index(pair["first"]), names.index(pair["second"])
        assert shown[first, second] == pytest.approx(pair["median"]["spearman"], abs=0.006)
        assert shown[second, first] == pytest.approx(pair["median"]["partial"], abs=0.006)
    assert shown.diagonal().tolist() == [1, 1, 1]
    assert shown.min() < 0


def test_agreement_matrix_of_one_table():
    """Guards a single table: it is shown beside the weight norm."""
    figure = figures.agreement_matrix(compare({"mine": table({"b.0.up": (30, 20)}, ["b.0"])}))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["mine", "weight norm"]


def test_modules_outside_the_blocks_have_a_row():
    """Guards embeddings and heads: they are shown below the layers, in columns of their own."""
    shapes = {"model.embed_tokens": (4, 9), "lm_head": (9, 4)}
    shapes |= {f"model.layers.{number}.mlp.up": (6, 4) for number in range(2)}
    scored = table(shapes, ["model.layers.0", "model.layers.1"])
    layout = grid(list(shapes), scored.provenance.layers)
    assert layout.rows == ["model.layers.0", "model.layers.1", OUTSIDE]
    assert layout.columns == ["mlp.up", "embed_tokens", "lm_head"]
    axes = figures.importance_heatmap(scored, "row").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "other"]
    assert len(texts(axes)) == 4, "a number in each cell that has a module, none elsewhere"
    mean = torch.cat([entry["row"] for entry in scored.scores.values()]).mean()
    head = float(scored.scores["lm_head"]["row"].mean() / mean)
    assert float(texts(axes)[-1]) == pytest.approx(head, abs=0.06)
    indices = {"lm_head": {"row": torch.tensor([1, 2])}}
    shares = figures.selection_map(Selection(indices, {"lm_head": (9, 4)}), scored.provenance.layers).axes[0]
    assert texts(shares) == ["22"]


def test_only_modules_outside_the_blocks():
    """Guards --target-modules lm_head: one row, not one empty row a layer."""
    scored = table({"lm_head": (9, 4)}, [f"model.layers.{number}" for number in range(40)])
    axes = figures.importance_heatmap(scored, "column").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["other"]


def test_models_without_blocks():
    """Guards networks without a list of blocks: rows are what the modules are part of."""
    shapes = {"stem": (4, 3), "stage1.a.conv1": (4, 4), "stage1.a.conv2": (4, 4), "stage1.b.conv1": (4, 4)}
    axes = figures.importance_heatmap(table(shapes, []), "row").axes[0]
    names = {label.get_text() for label in axes.get_yticklabels()}
    assert names == {"a", "b", "other"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "conv1", "conv2"]


def test_many_layers_keep_the_row_of_the_rest():
    """Guards deep models: layers are named every few, what is outside them always."""
    layers = [f"model.layers.{number}" for number in range(80)]
    shapes = {f"{layer}.up": (3, 2) for layer in layers} | {"lm_head": (3, 2)}
    names = figures.importance_heatmap(table(shapes, layers), "row").axes[0].get_yticklabels()
    assert names[-1].get_text() == "other"
    assert len(names) < 30
