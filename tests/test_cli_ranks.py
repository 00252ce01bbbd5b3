"""``rowscope finetune rows`` in two processes: the run of one, written once, and one line where it fails.

Run as a program, this file is one of the two.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rowscope import RowsConfig  # noqa: F401 (teaches PEFT the method)
from rowscope.cli import main
from rowscope.records import Selection, read_json, read_yaml
from rowscope.runs import RunFolder

pytestmark = pytest.mark.slow

TIMEOUT = 400  # seconds; a hang is a failure
FAST = ("--max-steps", "4", "--eval-steps", "2", "--save-steps", "2", "--score-batches", "2")
TWO = ("finetune", "rows", "demo", *FAST, "--per-device-train-batch-size", "2")
COMMANDS = {  # {rank} stands for the number of the process
    "default folder": (*TWO,),
    "again": (*TWO, "--output-dir", "runs/rows-demo-1"),
    "finished": (*TWO, "--output-dir", "runs/rows-demo-1", "--resume", "--json"),
    "other settings": (*TWO, "--output-dir", "runs/rows-demo-1", "--resume", "--seed", "1"),
    "in use": (*TWO, "--output-dir", "used", "--resume"),
    "wrong option": (*TWO, "--no-such-option"),
    "wrong value": (*TWO, "--learning-rate", "-1"),
    "wrong budget": (*TWO, "--budget", "nothing"),
    "no model": ("finetune", "rows", "./nowhere", "--data", "demo", *FAST),
    "missing here": (*TWO, "--output-dir", "missing", "--selection", "selection-{rank}.yaml"),
    "diverges": (*TWO, "--output-dir", "diverges", "--learning-rate", "3e38", "--selection", "selection-0.yaml"),
    "score": ("score", "demo", "--data", "nowhere.jsonl", "--out", "scores.safetensors"),
}
REFUSED = {
    "again": "is not empty: add --resume",
    "other settings": "was started otherwise (seed was 0, is 1)",
    "in use": "is in use by another process",
    "wrong option": "--no-such-option",
    "wrong value": "learning_rate=-1",
    "wrong budget": "nothing",
    "no model": "model folder ./nowhere does not exist",
    "missing here": "selection-1.yaml",
    "diverges": "training diverged",
    "score": "nowhere.jsonl",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return os.environ | quiet | more


# ---------------------------------------------------------------------------------------------- one of two processes


def work(folder: Path, ports: list[str]) -> None:
    """Run all commands one after the other, each as a program of its own would, and note how they end."""
    os.chdir(folder)
    torch.set_num_threads(1)
    rank, ended = os.environ["RANK"], {}
    for port, (name, command) in zip(ports, COMMANDS.items(), strict=True):
        os.environ["MASTER_PORT"] = port
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([argument.format(rank=rank) for argument in command])
            except SystemExit as end:
                status = end.code
        ended[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
    Path(f"ended-{rank}.json").write_text(json.dumps(ended))


# ---------------------------------------------------------------------------------------------- the tests


def alone(folder: Path, *arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--output-dir", str(folder)])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> RunFolder:
    """The run of one process with the batch of both."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    alone(folder, "finetune", "rows", "demo", *FAST, "--per-device-train-batch-size", "4")
    return RunFolder(folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_process) -> Path:
    """The folder in which two processes have run all commands."""
    folder = tmp_path_factory.mktemp("ranks")
    Selection.load(one_process.selection).save(folder / "selection-0.yaml")
    ports = [str(free_port()) for _ in COMMANDS]
    common = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    command = [sys.executable, __file__, str(folder), *ports]
    run = RunFolder.create(folder / "used")
    run.run.write_text("{}")
    with run._locked():
        processes = [
            subprocess.Popen(
                command, env=common | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
            )
            for rank in "01"
        ]
        try:
            errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder


@pytest.fixture(scope="module")
def ended(two_ranks) -> list[dict]:
    """How each process has ended each command."""
    return [read_json(two_ranks / f"ended-{rank}.json") for rank in (0, 1)]


def assert_same_run(run: RunFolder, other: RunFolder) -> None:
    """Same selection; losses and adapter to 1e-6, but held-out losses, which are means over other batches."""
    assert Selection.load(run.selection).origin == Selection.load(other.selection).origin
    for name in ("loss", "learning_rate", "grad_norm"):
        logs = [[line[name] for line in each.read_log() if name in line] for each in (run, other)]
        assert logs[0] == pytest.approx(logs[1], abs=1e-6, rel=1e-5)
    files = [each.checkpoints / "checkpoint-4" / "adapter_model.safetensors" for each in (run, other)]
    adapters = [load_file(file) for file in files]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], tensor, atol=1e-5, rtol=0)
    results = [read_json(each.run)["result"] for each in (run, other)]
    assert results[0]["steps"] == results[1]["steps"]
    assert results[0]["validation_loss"] == pytest.approx(results[1]["validation_loss"], rel=0.05)


def test_two_processes_make_one_run(two_ranks, ended, one_process):
    """Guards the command in several processes: one folder, one result on the terminal, and the run of one process."""
    run = RunFolder(two_ranks / "runs" / "rows-demo-1")
    assert [path.name for path in run.root.parent.iterdir()] == ["rows-demo-1"]
    assert [each["default folder"]["status"] for each in ended] == [0, 0]
    assert "rows-demo-1" in ended[0]["default folder"]["out"]
    assert ended[1]["default folder"]["out"] == ""
    assert [each["default folder"]["err"] for each in ended] == ["", ""]
    assert read_json(run.run)["status"] == "finished"
    assert read_yaml(run.config)["max_steps"] == 4
    assert read_json(run.memory)["components"]["adapter"] == read_json(one_process.memory)["components"]["adapter"]
    assert_same_run(run, one_process)


def test_a_finished_run_is_shown_once(ended):
    """Guards --resume of a finished run: the first process prints it, both end well."""
    assert [each["finished"]["status"] for each in ended] == [0, 0]
    assert json.loads(ended[0]["finished"]["out"])
    assert ended[1]["finished"]["out"] == ""


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_line(ended, name):
    """Guards failing together: whichever process meets it, all end with status 2, and one of them says it."""
    assert [each[name]["status"] for each in ended] == [2, 2]
    lines = [line for each in ended for line in each[name]["err"].splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("rowscope: ")
    assert REFUSED[name] in lines[0]


def test_a_refused_run_leaves_no_folder(two_ranks, ended):
    """Guards the run folder: refused before it has begun, none stays behind; one in use is left as it was."""
    assert not (two_ranks / "missing").exists()
    assert (two_ranks / "used" / "run.json").read_text() == "{}"


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
    "accelerate": (
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
    ),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher, tmp_path, one_process):
    """Guards the commands that the documentation gives: torchrun and accelerate launch make the run of one process,
    and nothing but the result reaches the terminal."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), "-m", "rowscope", *TWO]
    done = subprocess.run(
        [*command, "--output-dir", "run", "--json"], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert_same_run(RunFolder(tmp_path / "run"), one_process)


def test_a_launcher_that_has_one_process_load_the_weights_is_refused():
    """Guards FSDP against processes without weights: accelerate's default is refused with the flag that mends it."""
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "rowscope", *TWO], env=environment(WORLD_SIZE="2", RANK="0", **fsdp),
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "add --fsdp_cpu_ram_efficient_loading false" in done.stderr


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
