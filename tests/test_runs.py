"""Run folders are resumed, locked, recorded and refused as promised."""

import pytest

from rowscope import InputError
from rowscope.records import read_json, write_text
from rowscope.runs import RunFolder


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


def test_other_settings_do_not_resume(tmp_path):
    """Guards resume: changed settings are listed, not silently mixed."""
    run = RunFolder.create(tmp_path / "a")
    run.keep_config({"seed": 0, "budget": "lora=16"})
    run.keep_config({"seed": 0, "budget": "lora=16"})
    with pytest.raises(InputError, match=r"budget was lora=16, is rank=2\)"):
        run.keep_config({"seed": 0, "budget": "rank=2"})
