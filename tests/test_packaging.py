"""The wheel holds everything, and works outside a clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as the build leaves folders behind."""
    import shutil

    source = tmp_path_factory.mktemp("build") / "2-odd.name"
    ignore = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, source]
    subprocess.run(command, check=True)
    return next(target.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_is_complete(wheel):
    """Guards packaging: every module and data file of the rooms is in the wheel, tests and docs are not."""
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = ("graph", "scoring", "quant", "finetune", "analysis", "demo")
    files = list(ROOT.glob("*.py")) + [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    expected = {f"rowscope/{path.relative_to(ROOT).as_posix()}" for path in files}
    expected |= {"rowscope/py.typed", "rowscope/demo/model/model.safetensors", "rowscope/demo/data/task/test.jsonl"}
    expected |= {f"rowscope/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "analysis/templates").iterdir()}
    assert expected <= names
    assert not [name for name in names if "tests/" in name or "docs/" in name]


@pytest.mark.slow
def test_the_wheel_works_outside_a_clone(wheel, tmp_path):
    """Guards users of the wheel: installed into an empty folder, in an empty folder, the demo chain runs."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    code = "import rowscope, sys; print(rowscope.__file__); from rowscope.cli import main; main()"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    done = subprocess.run([*command, "demo", "--max-steps", "2"], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert (work / "runs" / "demo" / "report.html").is_file()
