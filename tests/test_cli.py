"""The command line: every command works on the demo, and wrong input gets one line and exit status 2."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from rowscope import ScoreTable, Selection, cli
from rowscope.demo import MODEL_FOLDER
from rowscope.graph import read_groups
from rowscope.records import LayerScores, read_json, read_yaml
from rowscope.runs import RunFolder

FAST = ["--score-batches", "2", "--score-batch-size", "2", "--score-tokens", "48"]
TRAIN = [*FAST, "--max-steps", "4", "--per-device-train-batch-size", "2", "--eval-steps", "4", "--save-steps", "2"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    return exit_.value.code


def run_ok(capsys, *arguments: str) -> dict:
    """Run with --json and return what was printed."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def run_bad(capsys, *arguments: str) -> str:
    """Run and return the one line of the refusal."""
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in printed.err
    return lines[0]


def small_data(folder, splits=("train", "validation", "test"), examples=6):
    for split in splits:
        path = folder / "data" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [{"prompt": f"{split} {n}?\n", "completion": f"{n}+1\n#### {n + 1}"} for n in range(examples)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "data")


def test_graph_needs_no_weights(capsys, tmp_path):
    """Guards the graph of a configuration alone, in every format, and the dry run."""
    source = tmp_path / "only"
    source.mkdir()
    (source / "config.json").write_bytes((MODEL_FOLDER / "config.json").read_bytes())
    assert run_ok(capsys, "graph", str(source), "--out", "g.json")["groups"] == 25
    assert len(read_groups(tmp_path / "g.json")) == 25
    for name, start in (("g.graphml", b"<?xml"), ("g.png", b"\x89PNG"), ("g.svg", b"<?xml")):
        run_ok(capsys, "graph", str(source / "config.json"), "--out", name)
        assert (tmp_path / name).read_bytes().startswith(start)
    saved = run_ok(capsys, "graph", str(source), "--remove", "model.layers.*.mlp=128")
    assert saved["before"]["parameters"] - saved["after"]["parameters"] == 8 * 3 * 128 * 192
    assert run("graph", str(source)) == 0
    assert "model.layers.0-7 (8 ×)" in " ".join(capsys.readouterr().out.split())


def test_the_chain_by_commands(capsys, tmp_path):
    """Guards the joints: graph, score, select, finetune, evaluate and report take each other's files."""
    data = small_data(tmp_path)
    assert run_ok(capsys, "graph", "demo", "--out", "graph.json")["groups"] == 25
    assert len(read_groups(tmp_path / "graph.json")) == 1 + 3 * 8
    summary = run_ok(capsys, "score", "demo", "--data", data, *FAST, "--plot", "map.png", "--out", "s.safetensors")
    assert summary["backward_passes"] == 2
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert ScoreTable.load(tmp_path / "s.safetensors").provenance.data_source == data
    picked = run_ok(capsys, "select", "s.safetensors", "--budget", "lora=2", "--scope", "coupled", "--out", "s.yaml")
    selection = Selection.load(tmp_path / "s.yaml")
    assert picked["trainable_parameters"] == selection.trainable_parameters() > 0
    tuned = run_ok(capsys, "finetune", "rows", "demo", "--data", data, "--selection", "s.yaml", *TRAIN)
    folder = RunFolder(tmp_path / "runs" / "rows-demo-1")
    assert tuned["trainable_parameters"] == selection.trainable_parameters()
    assert read_json(folder.run)["status"] == "finished"
    assert read_json(folder.memory)["components"]["adapter"] == 4 * selection.trainable_parameters()
    found = run_ok(
        capsys, "evaluate", "demo", "--data", data, "--adapter", str(folder.root), "--tasks", "perplexity,exact-match"
    )
    before, after = (found["results"][0][side]["value"] for side in ("before", "after"))
    assert after < before
    assert read_json(folder.evaluation)["results"] == found["results"]
    assert run("report", str(folder.root)) == 0
    assert "<html" in folder.report.read_text()


def test_finetune_scores_and_selects_by_itself(capsys, tmp_path):
    """Guards the one-command way; and --resume of a finished run prints its result again."""
    arguments = ["finetune", "rows", "demo", "--data", small_data(tmp_path), *TRAIN, "--output-dir", "a"]
    first = run_ok(capsys, *arguments, "--budget", "rank=2", "--scope", "layer", "--axis", "column")
    folder = RunFolder(tmp_path / "a")
    chosen = Selection.load(folder.selection)
    assert {axis for axes in chosen.indices.values() for axis in axes} == {"column"}
    assert ScoreTable.load(folder.scores).provenance.criterion == "taylor"
    again = run_ok(capsys, *arguments, "--budget", "rank=2", "--scope", "layer", "--axis", "column", "--resume")
    assert again == first
    assert "add --resume" in run_bad(capsys, *arguments)
    changed = [*arguments, "--budget", "rank=3", "--scope", "layer", "--axis", "column", "--resume"]
    assert "budget was rank=2, is rank=3" in run_bad(capsys, *changed)
    shutil.rmtree(folder.adapter)
    assert run(*arguments, "--budget", "rank=2", "--scope", "layer", "--axis", "column", "--resume") == 0
    assert (folder.adapter / "adapter_model.safetensors").is_file(), "a lost adapter is made again"


def test_an_interrupted_run_resumes_to_the_same_adapter(capsys, tmp_path, monkeypatch):
    """Guards Ctrl-C: exit 130, a readable run folder, and after --resume the straight run's adapter, bit for bit."""
    from rowscope.analysis.memory import MemoryCallback

    data = small_data(tmp_path)
    arguments = ["finetune", "rows", "demo", "--data", data, *TRAIN]
    assert run(*arguments, "--output-dir", "straight") == 0
    capsys.readouterr()

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryCallback, "on_step_end", interrupt)
        assert run(*arguments, "--output-dir", "torn") == 130
    assert "interrupted" in capsys.readouterr().err
    torn = RunFolder(tmp_path / "torn")
    assert read_json(torn.run)["status"] == "interrupted"
    assert "started otherwise (seed was 0, is 1)" in run_bad(
        capsys, *arguments, "--output-dir", "torn", "--resume", "--seed", "1"
    )
    assert run_ok(capsys, *arguments, "--output-dir", "torn", "--resume")["result"]["resumed_from"] == 2
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("straight", "torn")
    ]
    assert adapters[0] == adapters[1]


def test_resume_of_nothing_starts_afresh(capsys, tmp_path):
    """Guards --resume in scripts: with nothing there yet it starts, and says so."""
    arguments = ["finetune", "rows", "demo", "--data", small_data(tmp_path), *TRAIN, "--output-dir", "new", "--resume"]
    assert run(*arguments) == 0
    assert "nothing to resume" in capsys.readouterr().err


def test_settings_come_from_yaml_and_flags_win(capsys, tmp_path):
    """Guards --config: names are the flags', flags win, unknown names are refused, a run's own config works."""
    data = small_data(tmp_path)
    (tmp_path / "c.yaml").write_text(f"data: {data}\nbudget: rank=3\nmax-steps: 2\nscore_batches: 1\nscope: layer\n")
    arguments = ["finetune", "rows", "demo", "--config", "c.yaml", "--max-steps", "3", "--score-batch-size", "2"]
    assert run_ok(capsys, *arguments, "--output-dir", "a")["result"]["steps"] == 3
    kept = read_yaml(tmp_path / "a" / "config.yaml")
    assert (kept["budget"], kept["max_steps"], kept["score_batches"]) == ("rank=3", 3, 1)
    again = ["finetune", "rows", "demo", "--config", "a/config.yaml", "--output-dir", "b"]
    assert run_ok(capsys, *again)["result"]["steps"] == 3
    first, second = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "bad.yaml").write_text("bugdet: rank=3\n")
    line = run_bad(capsys, "finetune", "rows", "demo", "--config", "bad.yaml")
    assert "did you mean 'budget'" in line


def test_scores_of_one_seed_are_equal(tmp_path):
    """Guards determinism of the files: the same command writes the same bytes, but for what it cost."""
    for name in ("a", "b"):
        assert run("score", "demo", "--criterion", "zo-taylor:passes=32", *FAST, "--out", f"{name}.safetensors") == 0
        table = ScoreTable.load(tmp_path / f"{name}.safetensors")
        free = dataclasses.replace(table.provenance, seconds=None, peak_memory=None)
        dataclasses.replace(table, provenance=free).save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_compare_tells_the_story_on_one_screen(capsys, tmp_path, monkeypatch):
    """Guards 'rowscope compare': trust, agreement and verdicts in 24 lines of 100 columns, the rest in files."""
    monkeypatch.setenv("COLUMNS", "100")
    criteria = {"taylor": "taylor", "zo": "zo-taylor:passes=24", "size": "magnitude", "chance": "random"}
    for name, criterion in criteria.items():
        assert run("score", "demo", "--criterion", criterion, *FAST, "--out", f"{name}.safetensors") == 0
    printed = capsys.readouterr().out
    assert "trust: half of the data gives" in printed
    assert "this ranking is mostly weight magnitude; try --criterion taylor" in printed
    files = [f"{name}.safetensors" for name in criteria]
    assert run("compare", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110, "verdicts may wrap, tables may not"
    assert any(line.split()[:3] == ["taylor", "~", "zo-taylor:passes=24"] for line in lines)
    assert any(line.startswith("magnitude: knows nothing of the data") for line in lines)
    value = run_ok(capsys, "compare", *files, "--axis", "column", "--out", "c.json", "--plot", "m.svg")
    assert value["axis"] == "column"
    assert (len(value["tables"]), len(value["pairs"]), len(value["pairs"][0]["modules"])) == (4, 6, 56)
    assert {"format_version": 1, **value} == read_json(tmp_path / "c.json")
    assert (tmp_path / "m.svg").read_bytes().startswith(b"<?xml")
    assert run("report", "c.json", *files, "--out", "r.html") == 0
    assert run("compare", "taylor.safetensors") == 0
    assert "taylor ~ weight norm" in capsys.readouterr().out


def test_compare_many_with_the_first(capsys, tmp_path, monkeypatch):
    """Guards the screen with more than four files: each is compared with the first; criteria that repeat are named."""
    monkeypatch.setenv("COLUMNS", "100")
    names = [f"{number}.safetensors" for number in range(5)]
    for number, name in enumerate(names):
        arguments = ["--criterion", "random", "--axis", "row", "--seed", str(number)]
        assert run("score", "demo", *arguments, "--out", name) == 0
    capsys.readouterr()
    assert run("compare", *names) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ~ ") == 4
    assert "random (0) ~ random (4)" in " ".join(printed.split())


def test_target_modules_are_scored(capsys, tmp_path):
    """Guards --target-modules: endings and regular expressions, embeddings and heads if named, shown in the figure."""
    wanted = {
        "down_proj": 8,
        "embed_tokens, lm_head": 2,
        r"model\.layers\.[01]\.mlp\..*": 6,
    }
    for targets, count in wanted.items():
        arguments = ["score", "demo", "--criterion", "magnitude", "--target-modules", targets, "--plot", "p.png"]
        assert run_ok(capsys, *arguments)["modules"] == count
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert len(ScoreTable.load(tmp_path / "scores.safetensors").scores) == 6


def test_layers_are_scored(capsys, tmp_path):
    """Guards --granularity layer: rows summed or forward passes alone, a picture, and what takes the file."""
    fast = [*FAST, "--granularity", "layer"]
    rows = run_ok(capsys, "score", "demo", *fast, "--axis", "column", "--out", "rows.json")
    assert (rows["criterion"], rows["backward_passes"], rows["layer_scores"]) == ("columns:taylor", 2, "rows.json")
    gates = run_ok(capsys, "score", "demo", *fast, "--criterion", "zo-taylor:passes=18", "--plot", "bars.png")
    assert (gates["criterion"], gates["forward_passes"]) == ("gates:passes=18,epsilon=0.001", 18)
    assert gates["data_fingerprint"] == rows["data_fingerprint"]
    found = LayerScores.load(tmp_path / "layer_scores.json")
    assert (found.scores, found.noise) == (gates["scores"], gates["noise"])
    assert list(found.scores) == list(rows["scores"]) == [f"model.layers.{number}" for number in range(8)]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert run("score", "demo", *fast, "--criterion", "magnitude", "--out", "size.json") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "rows:magnitude: 8 layers layer score standard error share" in printed
    assert run("score", "demo", *FAST) == 0
    picked = run_ok(capsys, "select", "scores.safetensors", "--layer-scores", "layer_scores.json")
    assert picked["layer_scores"].startswith("gates:passes=18")
    assert run("report", "layer_scores.json", "--out", "r.html") == 0


def test_scores_of_other_models_are_not_compared(capsys, tmp_path):
    """Guards 'rowscope compare' against rows of different models: one line, exit 2, nothing written."""
    assert run("score", "demo", "--criterion", "magnitude", "--out", "a.safetensors") == 0
    table = ScoreTable.load(tmp_path / "a.safetensors")
    other = dataclasses.replace(table.provenance, model_fingerprint="0" * 64)
    dataclasses.replace(table, provenance=other).save(tmp_path / "b.safetensors")
    line = run_bad(capsys, "compare", "a.safetensors", "b.safetensors", "--out", "c.json", "--plot", "p.png")
    assert "belong to different models" in line
    assert "is named twice" in run_bad(capsys, "compare", "a.safetensors", "a.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("scor demo", "Did you mean 'score'"),
        ("score", "Missing argument 'MODEL'"),
        ("score demo --critreion taylor", "--criterion"),
        ("score demo --criterion tailor", "did you mean 'taylor'"),
        ("score demo --seed x", "--seed"),
        ("score demo --axis diagonal", "unknown axis"),
        ("score demo --seed -1", "--seed"),
        ("score demo --out odd.yaml", "name a .safetensors file"),
        ("score demo --out /dev/full", "name a .safetensors file"),
        ("score demo --data ", "no data"),
        ("finetune rows demo --seed 4294967296", "seed=4294967296 is too large"),
        ("finetune rows demo --lr-scheduler-type cosin", "did you mean 'cosine'"),
        ("finetune rows demo --num-train-epochs inf", "num_train_epochs=inf"),
        ("finetune rows demo --learning-rate nan", "learning_rate=nan"),
        ("finetune rows demo --scope coupld", "did you mean 'coupled'"),
        ("finetune rows demo --data nowhere.jsonl --output-dir a", "nowhere.jsonl does not exist"),
        ("finetune rows ./nowhere --data demo --output-dir a", "does not exist"),
        ("finetune rows demo --selection bad.yaml --output-dir a", "has no module 'm'"),
        ("score demo --plot x.gif", "name a .png or .svg file"),
        ("score demo --granularity head", "unknown granularity 'head'"),
        ("score demo --granularity layer --out s.safetensors", "name a .json file for scores of layers"),
        ("score demo --granularity layer --criterion zo-taylor --axis row", "leave --axis and --target-modules away"),
        ("score demo --granularity layer --criterion zo-taylor:passes=8", "a batch takes 9"),
        ("score demo --criterion magnitude --target-modules down_prj", "target module 'down_prj' matches no"),
        ("score demo --target-modules down_proj,,lm_head", "has an empty name"),
        ("compare", "Missing argument 'SCORES...'"),
        ("compare nowhere.safetensors", "does not exist"),
        ("compare broken.jsonl", "no safetensors file"),
        ("compare x.safetensors --axis both", "unknown axis 'both'"),
        ("compare x.safetensors --out x.txt", "name a .json file"),
        ("compare x.safetensors --plot x.gif", "name a .png or .svg file"),
        ("score ./nowhere --data demo", "does not exist"),
        ("score . --data demo", "no config.json"),
        ("score demo --data nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("score demo --data broken.jsonl", "broken.jsonl line 1 is not a JSON object"),
        ("score demo --score-batches 0", "score_batches=0"),
        ("score demo --device tpu", "device 'tpu'"),
        ("score demo --dtype int3", "unknown dtype"),
        ("score demo --config nowhere.yaml", "nowhere.yaml does not exist"),
        ("graph demo --format gif", "unknown format"),
        ("graph demo --format png", "needs a file: give --out"),
        ("graph demo --format png --out graph.svg", "name a .png file"),
        ("graph demo --out graph", "name a .json, .graphml, .png or .svg file"),
        ("graph demo --view ports", "--view is for --format graphml"),
        ("graph demo --format graphml --view port --out g.graphml", "unknown view 'port'"),
        ("graph demo --block model.layers.0", "--block is for --format png"),
        ("graph demo --block model.layers.9 --out g.png", "unknown block"),
        ("graph demo --remove model.layers.0.mlp=512", "would lose all its 512 channels"),
        ("graph demo --remove model.layers.0.mlp=8 --out g.json", "--remove prints"),
        ("select nowhere.safetensors", "does not exist"),
        ("select broken.jsonl", "no safetensors file"),
        ("select x.safetensors --out x.txt", "name a .safetensors or .yaml file"),
        ("select x.safetensors --budget rank=0", "trains nothing"),
        ("select x.safetensors --budget params=80G", "write a whole number, e.g. params=80M"),
        ("select x.safetensors --pick best", "unknown pick 'best'"),
        ("select x.safetensors --axis diagonal", "unknown axis"),
        ("select x.safetensors --normalizer standardization", "did you mean 'standarization'"),
        ("select x.safetensors --group-reduction prod", "unknown group reduction 'prod'"),
        ("select x.safetensors --scope layer --heads", "--heads needs --scope coupled"),
        ("select x.safetensors --axis column", "add --scope layer or global"),
        ("select x.safetensors --layer-cap 0.5", "layer_cap=0.5"),
        ("select x.safetensors --layer-scores nowhere.json", "nowhere.json does not exist"),
        ("select x.safetensors --layer-scores broken.jsonl", "broken.jsonl is not valid JSON"),
        ("select bad.yaml --budget rank=3", "is a selection already"),
        ("finetune rows demo --layer-scores nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("finetune rwos demo", "Did you mean 'rows'"),
        ("finetune rows demo --budget rank=0", "trains nothing"),
        ("finetune rows demo --learning-rate 0", "learning_rate=0"),
        ("finetune rows demo --max-steps 0", "max_steps=0"),
        ("finetune rows demo --resume", "--output-dir"),
        ("finetune rows demo --output-dir broken.jsonl", "is a file"),
        ("evaluate demo --tasks perplexty", "did you mean 'perplexity'"),
        ("evaluate demo --split tset", "has no split"),
        ("evaluate demo --data demo-text --tasks exact-match", "exact-match needs"),
        ("evaluate demo --adapter nowhere", "holds no adapter"),
        ("report nowhere", "nowhere"),
    ],
)
def test_bad_input(capsys, tmp_path, arguments, message):
    """Guards the refusals: one line, what and where and the mend, exit 2, nothing written."""
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "bad.yaml").write_text("kind: selection\nindices: {m: {row: [0]}}\nshapes: {m: [2, 2]}\n")
    line = run_bad(capsys, *arguments.split(" "))
    assert message in line, line
    assert sorted(os.listdir(tmp_path)) == ["bad.yaml", "broken.jsonl"]


def test_data_is_needed_for_other_models(capsys, demo):
    """Guards the default: only the demo model comes with data."""
    from rowscope.demo import MODEL_FOLDER

    assert "--data" in run_bad(capsys, "score", str(MODEL_FOLDER))


def test_select_under_every_rule(capsys, tmp_path):
    """Guards select's flags: scopes, budgets, ways to pick, layer scores from both files, and a seed that counts."""
    assert run("score", "demo", "--criterion", "magnitude", "--out", "s.safetensors") == 0
    whole = run_ok(capsys, "select", "s.safetensors", "--budget", "params=200K", "--scope", "global", "--axis", "auto")
    assert 199_000 < whole["trainable_parameters"] <= 200_000
    LayerScores({f"model.layers.{n}": 1.0 + n for n in range(8)}, "by hand").save(tmp_path / "l.json")
    for layer_scores in ("l.json", "s.safetensors"):
        found = run_ok(
            capsys,
            "select",
            "s.safetensors",
            "--scope",
            "layer",
            "--budget",
            "memory=2MiB",
            "--layer-scores",
            layer_scores,
        )
        assert 130_000 < found["trainable_parameters"] <= 2 * 2**20 // 16
    rules = ["--scope", "coupled-global", "--heads", "--budget", "ratio=0.1", "--group-reduction", "max"]
    heads = run_ok(capsys, "select", "s.safetensors", *rules, "--normalizer", "max", "--pick", "diverse")
    assert {len(axes) for axes in heads["modules"].values()} == {1}
    assert (heads["heads"], heads["group_reduction"], heads["normalizer"]) == ("whole", "max", "max")
    drawn = []
    for seed in ("1", "1", "2"):
        run_ok(capsys, "select", "s.safetensors", "--pick", "sample", "--seed", seed, "--out", "d.yaml")
        drawn.append((tmp_path / "d.yaml").read_text())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_selection_is_converted(capsys, tmp_path):
    """Guards select on a selection: from the machine's format to the people's and back, the same indices."""
    name = "model.layers.0.mlp.up_proj"
    Selection({name: {"row": torch.tensor([3, 7])}}, {name: (512, 192)}, "0" * 64, {"a": "b"}).save(
        tmp_path / "s.yaml"
    )
    assert run_ok(capsys, "select", "s.yaml", "--out", "t.safetensors")["trainable_parameters"] == 2 * 192
    assert run("select", "t.safetensors", "--out", "u.yaml") == 0
    assert (tmp_path / "u.yaml").read_text() == (tmp_path / "s.yaml").read_text()


def test_finetune_takes_and_records_the_rules(capsys, tmp_path):
    """Guards one-command runs: every rule of the selection is in config.yaml, which makes the same selection again."""
    LayerScores({f"model.layers.{n}": 1.0 + n for n in range(8)}, "by hand").save(tmp_path / "l.json")
    data = small_data(tmp_path)
    rules = [
        "--budget",
        "ratio=0.02",
        "--scope",
        "coupled",
        "--heads",
        "--pick",
        "diverse",
        "--layer-scores",
        "l.json",
    ]
    arguments = ["finetune", "rows", "demo", "--data", data, *TRAIN, "--criterion", "magnitude"]
    assert run(*arguments, *rules, "--layer-cap", "3", "--output-dir", "a") == 0
    kept = read_yaml(tmp_path / "a" / "config.yaml")
    expected = {
        "budget": "ratio=0.02", "scope": "coupled", "axis": None, "pick": "diverse", "layer_scores": "l.json",
        "layer_floor": 0.25, "layer_cap": 3.0, "group_reduction": "mean", "normalizer": "mean", "heads": True,
    }  # fmt: skip
    assert kept.items() >= expected.items()
    assert run("finetune", "rows", "--config", "a/config.yaml", "demo", "--output-dir", "b") == 0
    first, second = ((tmp_path / name / "selection.safetensors").read_bytes() for name in "ab")
    assert first == second
    line = run_bad(capsys, *arguments, "--config", "a/config.yaml", "--pick", "top", "--output-dir", "a", "--resume")
    assert "pick was diverse, is top" in line


def test_a_selection_of_another_model_is_refused(capsys, tmp_path, demo):
    """Guards indices: those of another checkpoint do not train this one, and no run folder says otherwise."""
    name = "model.layers.0.mlp.up_proj"
    Selection({name: {"row": torch.tensor([0])}}, {name: (512, 192)}, "0" * 64).save(tmp_path / "s.yaml")
    assert "of another model" in run_bad(capsys, "finetune", "rows", "demo", "--selection", "s.yaml", *TRAIN)


def test_merge_gives_a_checkpoint_or_a_lora_of_the_same_model(capsys, tmp_path):
    """Merged, or exported as LoRA, a trained run measures as it did; bad input is refused and nothing is written."""
    small_data(tmp_path)
    trained = run_ok(capsys, "finetune", "rows", "demo", "--data", "data", *TRAIN, "--output-dir", "run")
    assert trained["status"] == "finished"
    assert run_ok(capsys, "merge", "demo", "run", "--out", "merged", "--dtype", "float32")["model"] == "merged"
    assert run_ok(capsys, "merge", "demo", "run/adapter", "--out", "lora", "--as-lora")["lora"] == "lora"
    assert read_json(tmp_path / "lora" / "adapter_config.json")["peft_type"] == "LORA"

    def perplexity(*arguments):
        found = run_ok(capsys, "evaluate", *arguments, "--data", "data", "--tasks", "perplexity")["results"][0]
        return (found["after"] or found["before"])["value"]

    expected = perplexity("demo", "--adapter", "run")
    assert perplexity("merged") == pytest.approx(expected, rel=1e-6)
    assert perplexity("demo", "--adapter", "lora") == pytest.approx(expected, rel=1e-5)

    before = sorted(path.name for path in tmp_path.iterdir())
    refused = {
        "name a new folder": ["merge", "demo", "run", "--out", "lora"],
        "no adapter": ["merge", "demo", "data", "--out", "new"],
        "is not one of rows": ["merge", "demo", "lora", "--out", "new", "--as-lora"],
        "name one, or merge": ["merge", "demo", "run", "run", "--out", "new", "--as-lora"],
        "trained on other weights": ["merge", "merged", "run", "--out", "new", "--strict"],
        "leave --strict away": ["evaluate", "merged", "--adapter", "run", "--data", "data", "--strict"],
    }
    for message, arguments in refused.items():
        assert message in run_bad(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="needs a folder that refuses writing")
def test_unwritable_output(capsys):
    """Guards --out in a place where nothing can be written, before anything is half there."""
    assert "/proc" in run_bad(
        capsys, "score", "demo", "--criterion", "magnitude", "--out", "/proc/nowhere/s.safetensors"
    )


def test_a_full_disk(tmp_path):
    """Guards a full disk: one line, exit 2, no half-written file, no temporary one."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [sys.executable, "-B", "-m", "rowscope", "score", "demo", "--criterion", "magnitude"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit_files)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "free some space" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_full_disk_at_a_checkpoint(tmp_path):
    """Guards a disk that fills during training: one line, exit 2, and after room is made --resume goes on."""
    data = small_data(tmp_path)
    command = [sys.executable, "-m", "rowscope", "finetune", "rows", "demo", "--data", data, *TRAIN]
    command += ["--output-dir", "a", "--budget", "lora=4"]
    limit = 500_000  # room for scores and selection, none for an adapter of 108 k weights with its optimizer

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit_files)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "free some space" in done.stderr
    assert read_json(tmp_path / "a" / "run.json")["status"] == "interrupted"
    assert subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_signal_interrupts(tmp_path):
    """Guards Ctrl-C from outside: exit 130, one word, and a run folder that says interrupted."""
    command = [sys.executable, "-m", "rowscope", "finetune", "rows", "demo", "--output-dir", "a", *FAST]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the suite runs in background
    )  # fmt: skip
    log = tmp_path / "a" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert read_json(tmp_path / "a" / "run.json")["status"] == "interrupted"


def test_help_imports_nothing_heavy():
    """Guards the start-up time: neither help nor the package's import load torch, transformers or matplotlib."""
    code = (
        "import sys, rowscope, rowscope.cli as c\n"
        "try: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'scipy', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "finetune" in done.stdout
