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
    RunFolder,
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


def test_run_folders_are_not_overwritten(tmp_path):
    """Guards older runs: a non-empty folder needs --resume, names count up, files are no folders."""
    run = RunFolder.create(tmp_path / "runs" / "a")
    write_text(run.config, "")
    with pytest.raises(InputError, match="add --resume"):
        RunFolder.create(run.root)
    assert RunFolder.create(run.root, resume=True) == run
    with pytest.raises(InputError, match="is a file"):
        RunFolder.create(run.config)
    write_text(tmp_path / "model" / "config.json", "{}")
    with pytest.raises(InputError, match="other things than a run"):
        RunFolder.create(tmp_path / "model", resume=True)
    names = [RunFolder.next_free("rows", "some/model", tmp_path / "runs").root.name for _ in range(2)]
    assert names == ["rows-model-1", "rows-model-2"]


def test_log_survives_a_crash_and_a_rewind(tmp_path):
    """Guards resume: a torn last line is left out, and lines after the checkpoint's step are dropped."""
    run = RunFolder.create(tmp_path / "a")
    for step in range(4):
        run.append_log({"step": step, "loss": 1.0})
    with open(run.log, "a") as log:
        log.write('{"step": 4, "lo')
    assert [line["step"] for line in run.read_log()] == [0, 1, 2, 3]
    run.rewind_log(2)
    assert [line["step"] for line in run.read_log()] == [0, 1, 2]


def test_a_run_is_recorded_to_its_end(tmp_path):
    """Guards run.json: running during, finished after, interrupted when anything is raised."""
    run = RunFolder.create(tmp_path / "a")
    with run.recorded(["rowscope"], method="rows", seed=0, device="cpu") as record:
        assert read_json(run.run)["status"] == "running"
        record["result"] = {"steps": 3}
    assert read_json(run.run)["status"] == "finished"
    assert read_json(run.run)["result"] == {"steps": 3}
    with (
        pytest.raises(KeyboardInterrupt),
        run.recorded(["rowscope"], method="rows", seed=0, device="cpu"),
    ):
        raise KeyboardInterrupt
    assert read_json(run.run)["status"] == "interrupted"


def test_a_run_in_use_is_left_alone(tmp_path):
    """Guards two processes in one folder: the second is refused, and the lock goes with the first."""
    run = RunFolder.create(tmp_path / "a")
    with run.recorded(["rowscope"], "rows", 0, "cpu"):
        with pytest.raises(InputError, match="in use by another process"), run.recorded(["x"], "rows", 0, "cpu"):
            pass
        assert read_json(run.run)["command"] == ["rowscope"]
    with run.recorded(["y"], "rows", 0, "cpu"):
        pass


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


def test_other_settings_do_not_resume(tmp_path):
    """Guards resume: changed settings are listed, not silently mixed."""
    run = RunFolder.create(tmp_path / "a")
    run.keep_config({"seed": 0, "budget": "lora=16"})
    run.keep_config({"seed": 0, "budget": "lora=16"})
    with pytest.raises(InputError, match=r"budget was lora=16, is rank=2\)"):
        run.keep_config({"seed": 0, "budget": "rank=2"})
