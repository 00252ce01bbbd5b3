"""Every file is written whole or not at all, and read back equal."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rowscope import InputError, ScoreTable, Selection
from rowscope.records import (
    FORMAT_VERSION,
    Provenance,
    atomic_path,
    read_json,
    read_tensors,
    read_yaml,
    write_json,
    write_tensors,
    write_text,
)

SHAPES = {"model.layers.0.mlp.up_proj": (7, 5), "model.layers.0.mlp.down_proj": (5, 7)}


def table() -> ScoreTable:
    scores = {
        name: {"row": torch.rand(rows), "column": torch.rand(columns)} for name, (rows, columns) in SHAPES.items()
    }
    provenance = Provenance(
        criterion="zo-taylor:passes=4",
        model_source="demo",
        model_fingerprint="f" * 64,
        layers=["model.layers.0"],
        shapes=SHAPES,
        dtypes=dict.fromkeys(SHAPES, "float32"),
        forward_passes=4,
        signal_to_noise=0.25,
    )
    return ScoreTable(
        scores, scores, provenance, (scores, scores), {"model.layers.0.mlp.up_proj": {"row": torch.ones(7)}}
    )


def assert_equal_tables(first, second):
    assert list(first) == list(second), "in the order they were written"
    for module in first:
        assert first[module].keys() == second[module].keys()
        for axis in first[module]:
            assert torch.equal(first[module][axis], second[module][axis])


def test_scores_round_trip(tmp_path):
    """Guards scores.safetensors: every tensor and all provenance come back."""
    written = table()
    written.save(tmp_path / "scores.safetensors")
    read = ScoreTable.load(tmp_path / "scores.safetensors")
    assert read.provenance == written.provenance
    for name in ("scores", "weight_norm", "noise"):
        assert_equal_tables(getattr(read, name), getattr(written, name))
    for first, second in zip(read.halves, written.halves, strict=True):
        assert_equal_tables(first, second)


index_sets = st.dictionaries(
    st.sampled_from(sorted(SHAPES)),
    st.dictionaries(st.sampled_from(["row", "column"]), st.sets(st.integers(0, 4), min_size=1), min_size=1),
    min_size=1,
)


@pytest.mark.parametrize("suffix", [".safetensors", ".yaml"])
@given(index_sets)
def test_selections_round_trip(tmp_path_factory, suffix, chosen):
    """Guards both forms of a selection: the machine's and the one that people edit."""
    path = tmp_path_factory.mktemp("selection") / f"s{suffix}"
    indices = {m: {a: torch.tensor(sorted(i)) for a, i in axes.items()} for m, axes in chosen.items()}
    written = Selection(indices, {module: SHAPES[module] for module in indices}, "f" * 64, {"budget": "rank=2"})
    written.save(path)
    read = Selection.load(path)
    assert_equal_tables(read.indices, written.indices)
    assert (read.shapes, read.origin, read.model_fingerprint) == (written.shapes, written.origin, "f" * 64)
    cost = sum(len(i) * SHAPES[m][1 if a == "row" else 0] for m, axes in chosen.items() for a, i in axes.items())
    assert read.trainable_parameters() == cost


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([5, 3]), "sorted and unique"),
        (torch.tensor([3, 3]), "sorted and unique"),
        (torch.tensor([7]), r"outside 0\.\.6"),
        (torch.tensor([-1]), r"outside 0\.\.6"),
        (torch.tensor([], dtype=torch.int64), "non-empty"),
        (torch.tensor([0.5]), "whole numbers"),
    ],
)
def test_impossible_indices_are_refused(index, message):
    """Guards training against rows that do not exist or count twice."""
    with pytest.raises(InputError, match=message):
        Selection({"model.layers.0.mlp.up_proj": {"row": index}}, SHAPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: selection\nshapes: {m: [2, 2]}\n", "unreadable indices"),
        ("kind: selection\nindices: {m: {row: [0]}}\n", "unreadable shapes"),
        ("kind: selection\nindices: {m: {row: [zero]}}\nshapes: {m: [2, 2]}\n", "unreadable indices"),
        ("kind: selection\nindices: {m: {row: [1.5]}}\nshapes: {m: [2, 2]}\n", "unreadable indices"),
        ("kind: selection\nindices: {m: {row: [true]}}\nshapes: {m: [2, 2]}\n", "unreadable indices"),
        ("kind: selection\nindices: {m: {}}\nshapes: {m: [2, 2]}\n", "trains nothing"),
        ("kind: selection\nindices: {5: {row: [0]}}\nshapes: {5: [2, 2]}\n", "trains nothing"),
        ("kind: selection\norigin: abc\nindices: {m: {row: [0]}}\nshapes: {m: [2, 2]}\n", "is damaged"),
        ("kind: selection\nformat_version: two\n", "odd format version"),
        ("kind: selection\nindices: {m: {diagonal: [0]}}\nshapes: {m: [2, 2]}\n", "use 'row' or 'column'"),
        ("kind: selection\nindices: {m: {row: [0]}}\nshapes: {}\n", "no shape"),
        ("indices: {}\n", "is no selection"),
        ("- 1\n", "holds no mapping"),
        ("a: [\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_yaml_selections(tmp_path, text, message):
    """Guards hand-edited selections: one line says what is wrong; nothing in a file is ever run."""
    write_text(tmp_path / "s.yaml", text)
    with pytest.raises(InputError, match=message):
        Selection.load(tmp_path / "s.yaml")


def test_other_files_are_refused(tmp_path):
    """Guards readers against missing, truncated, foreign and newer files."""
    path = tmp_path / "scores.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        ScoreTable.load(path)
    table().save(path)
    with pytest.raises(InputError, match="holds scores, not selection"):
        Selection.load(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        ScoreTable.load(path)
    write_tensors(path, {"scores/m/row": torch.ones(1)}, "scores", {})
    with pytest.raises(InputError, match="score again"):
        ScoreTable.load(path)
    write_tensors(path, {}, "scores", {"format_version": FORMAT_VERSION + 1})
    with pytest.raises(InputError, match="upgrade rowscope"):
        read_tensors(path, "scores")
    for text, message in (("{", "not valid JSON"), ("[]", "no JSON object")):
        write_text(tmp_path / "x.json", text)
        with pytest.raises(InputError, match=message):
            read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writes_leave_the_old_file(tmp_path, failure):
    """Guards atomic writes: after a failure midway the old content stands and no temporary file is left."""
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail_midway():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail_midway()
    assert read_json(path)["a"] == 1
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_says_its_version(tmp_path):
    """Guards the promise that every JSON has format_version."""
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"format_version": FORMAT_VERSION, "a": 1}


def test_only_ordinary_files_are_replaced(tmp_path):
    """Guards --out: a device or a folder is refused, and a link is kept, its target written."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "target.json"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(InputError, match="no ordinary file"):
            write_json(path, {})
    write_json(target, {"a": 1})
    link.symlink_to(target)
    write_json(link, {"a": 2})
    assert link.is_symlink()
    assert read_json(target)["a"] == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"scores/model.layers.0.mlp.up_proj/row": torch.ones(3)},
        {"scores/model.layers.0.mlp.up_proj/row": torch.ones(7, 2)},
        {"scores/model.layers.0.mlp.up_proj/diagonal": torch.ones(7)},
        {"scores/elsewhere/row": torch.ones(7)},
        {"scores/nothing": torch.ones(7)},
        {"weight_norm/model.layers.0.mlp.up_proj/row": torch.ones(7)},
    ],
)
def test_edited_score_tables_are_refused(tmp_path, damage):
    """Guards selections: scores that are too few, of no module or of no axis never decide anything."""
    written = table()
    header = {**written.provenance.__dict__}
    write_tensors(tmp_path / "s.safetensors", damage, "scores", header)
    with pytest.raises(InputError, match="score again"):
        ScoreTable.load(tmp_path / "s.safetensors")
