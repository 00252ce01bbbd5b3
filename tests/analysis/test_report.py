"""The report is one page from files alone, whole or not at all, whatever the names in the files."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rowscope import InputError, ScoreTable
from rowscope.analysis.report import render
from rowscope.records import LayerScores, write_json
from rowscope.scoring.trust import compare, labels

SECTIONS = (
    "What was trained, and why these rows",
    "What it gained",
    "What it cost",
    "Which rows matter",
    "How far to trust the scores",
    "How to reproduce it",
)
HOSTILE = "<script>alert(1)</script>"


def test_a_run_has_every_section(make_run, tmp_path):
    """Guards the promise of the page: all sections, all figures, and the figures as files."""
    run = make_run(tmp_path / "run")
    page = render([run.root], tmp_path / "r.html").read_text()
    for title in SECTIONS:
        assert f"<h3>{title}</h3>" in page
    # a selection map, loss curves, memory, 3 tables x 2 axes, agreement
    assert page.count("<svg role=") == 1 + 1 + 1 + 6 + 1
    assert len(list(run.figures.glob("*.png"))) == 10
    for expected in ("exact-match (200 examples)", "45.5% ± 3.5%", "not measured", "zo-taylor", "1.26 MiB"):
        assert expected in page


def test_the_page_asks_the_network_for_nothing(make_run, tmp_path):
    """Guards 'opens from disk without network': no source, link, import or font comes from outside."""
    page = render([make_run(tmp_path / "run").root], tmp_path / "r.html").read_text()
    addresses = re.findall(r'(?:src|href|url\(|@import)\s*=?\s*["\'(]?([^"\')\s>]+)', page)
    outside = [address for address in addresses if not address.startswith(("#", "data:image/png"))]
    assert outside == []
    assert "<script" not in page


def test_ids_are_unique(make_run, tmp_path):
    """Guards the inline pictures: two that share ids would show each other's parts."""
    runs = [make_run(tmp_path / name).root for name in ("a", "b")]
    ids = re.findall(r'\sid="([^"]+)"', render(runs, tmp_path / "r.html").read_text())
    assert ids
    assert len(ids) == len(set(ids))


def test_hostile_names_are_text_and_nan_is_counted(make_run, tmp_path):
    """Guards the reader: markup in a module's name is shown, not run; scores that are no numbers are counted."""
    page = render([make_run(tmp_path / "run", HOSTILE).root], tmp_path / "r.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "3 scores are not finite" in page


def test_parts_alone(make_run, tmp_path):
    """Guards a person who only scored, selected, measured or evaluated: each file alone makes a page."""
    run = make_run(tmp_path / "run")
    expected = {run.scores: 3, run.selection: 0, run.memory: 2, run.evaluation: 1}
    for path, number in expected.items():
        page = render([path], tmp_path / "r.html").read_text()
        assert f"<h3>{SECTIONS[number]}</h3>" in page, path
    assert not (tmp_path / "figures").exists()


def test_layer_scores_alone(tmp_path):
    """Guards a person who scored layers: bars, a table, what made them; whatever the names in the file."""
    found = LayerScores({HOSTILE: 3.0, "b": 1.0}, "gates:passes=8", "m", "f" * 64, forward_passes=6, noise={"b": 0.1})
    found.save(tmp_path / "l.json")
    page = render([tmp_path / "l.json"], tmp_path / "r.html").read_text()
    assert "<h3>Which layers matter</h3>" in page
    assert page.count("<svg role=") == 1
    for expected in ("75.0%", "By gates:passes=8, 6 forward and 0 backward passes", "f" * 64):
        assert expected in page
    assert HOSTILE not in page


@pytest.mark.parametrize("axes", [("row",), ("column",), ("row", "column")])
def test_scores_alone(make_run, tmp_path, axes):
    """Guards a person who only scored, along whichever axes: heatmaps, trust with a verdict, and where it is from."""
    whole = ScoreTable.load(make_run(tmp_path / "run").scores)
    kept = [
        {name: {axis: entry[axis] for axis in axes} for name, entry in tensors.items()}
        for tensors in (whole.scores, whole.weight_norm, *whole.halves)
    ]
    path = tmp_path / "mine.safetensors"
    ScoreTable(kept[0], kept[1], whole.provenance, (kept[2], kept[3])).save(path)
    page = render([path], tmp_path / "r.html").read_text()
    assert page.count("<svg role=") == len(axes)
    for axis in axes:
        assert f"Importance of {axis}s by taylor" in page
    assert "taylor: half of the data gives" in page
    assert "taylor ~ weight norm" in page
    assert f"Of the {axes[0]}s" in page
    for origin in ("ab12ab12ab12", "mine.safetensors", "8 + 8"):
        assert origin in page


def test_score_files_of_one_model_share_a_chapter(make_run, tmp_path):
    """Guards several score files: one chapter, every pair, the matrix, and in words what they share."""
    run = make_run(tmp_path / "run")
    files = run.score_tables()
    page = render([*files, files[0]], tmp_path / "r.html").read_text()
    assert "<h1>3 score tables of demo</h1>" in page
    assert page.count("<svg role=") == 3 * 2 + 1
    assert page.count(f"<h3>{SECTIONS[4]}</h3>") == 1
    assert "taylor ~ magnitude" in page
    assert "zo-taylor:estimator=spsa,passes=512: signal-to-noise 0.42: this ranking is mostly weight magnitude" in page
    assert "held-out loss" not in page


def test_scores_that_cannot_be_compared_are_still_shown(make_run, tmp_path):
    """Guards a run folder with scores of another model in it: said, and the rest of the page is there."""
    run = make_run(tmp_path / "run")
    other = ScoreTable.load(run.score_tables()[1])
    strange = dataclasses.replace(other.provenance, model_fingerprint="0" * 64)
    dataclasses.replace(other, provenance=strange).save(run.score_tables()[1])
    page = render([run.root], tmp_path / "r.html").read_text()
    assert "The scores are not compared: scores of demo and of demo belong to different models" in page
    assert page.count("<svg role=") == 1 + 1 + 1 + 6


def test_a_comparison_makes_a_page(make_run, tmp_path):
    """Guards comparison.json in the report: the same trust section, from the file alone."""
    tables = [ScoreTable.load(path) for path in make_run(tmp_path / "run").score_tables()]
    write_json(tmp_path / "c.json", compare(labels(tables, ["a", "b", "c"])))
    page = render([tmp_path / "c.json"], tmp_path / "r.html").read_text()
    assert f"<h3>{SECTIONS[4]}</h3>" in page
    assert page.count("<svg role=") == 1
    assert "taylor ~ magnitude" in page


def test_several_runs_are_compared(make_run, tmp_path):
    """Guards side by side: a comparison on top, then each result under its name."""
    runs = [make_run(tmp_path / name).root for name in ("a", "b")]
    page = render(runs, tmp_path / "r.html").read_text()
    assert page.index('<th scope="col">held-out loss</th>') < page.index(f"<h2>{runs[0]}</h2>")
    assert f"<h2>{runs[1]}</h2>" in page


def test_one_state_one_page(make_run, tmp_path):
    """Guards determinism: the same files make the same bytes."""
    run = make_run(tmp_path / "run")
    pages = [render([run.root], tmp_path / name).read_bytes() for name in ("1.html", "2.html")]
    assert pages[0] == pages[1]


def test_an_interrupted_run_is_shown_as_such(make_run, tmp_path):
    """Guards half a run: what is there is shown and its state said."""
    run = make_run(tmp_path / "run")
    record = json.loads(run.run.read_text())
    del record["result"], record["trainable_parameters"]
    write_json(run.run, {**record, "status": "interrupted"})
    shutil.rmtree(run.adapter)
    page = render([run.root], tmp_path / "r.html").read_text()
    assert "This run is interrupted" in page


@pytest.mark.parametrize("damage", ["nothing", "empty", "torn json", "torn scores", "other json", "torn comparison"])
def test_bad_paths_leave_no_page(make_run, tmp_path, damage):
    """Guards the refusals: one line, and no half-written report."""
    run = make_run(tmp_path / "run")
    path = run.root
    if damage == "nothing":
        path = tmp_path / "nowhere"
    elif damage == "empty":
        path = tmp_path / "empty"
        path.mkdir()
    elif damage == "torn json":
        run.run.write_text('{"status": ')
    elif damage == "torn scores":
        run.scores.write_bytes(run.scores.read_bytes()[:-100])
    elif damage == "torn comparison":
        path = tmp_path / "c.json"
        write_json(path, {"axis": "row", "model": {}, "tables": [], "pairs": [{"first": "a"}]})
    else:
        path = tmp_path / "x.json"
        write_json(path, {"a": 1})
    with pytest.raises(InputError) as refusal:
        render([path], tmp_path / "r.html")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "r.html").exists()


def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("ROWSCOPE_REQUIRE_BROWSER") == "1":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(make_run, tmp_path, width):
    """Guards the page where it is read: every section visible, nothing wider than the window, no console error."""
    page = render([make_run(tmp_path / "run").root], tmp_path / "r.html")
    probe = """<script>
    const heights = [...document.querySelectorAll('h3, svg')].map(e => e.getBoundingClientRect().height);
    document.title = JSON.stringify({
        width: document.documentElement.scrollWidth, window: window.innerWidth, least: Math.min(...heights),
        sections: document.querySelectorAll('h3').length, requests: performance.getEntriesByType('resource').length});
    </script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    # Headless windows are at least 500 wide: a narrow page is shown in a frame of its own width.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe id="f" src="probed.html" style="width:{width}px;height:900px;border:0"></iframe>')
    seen = json.loads(_title(frame, tmp_path))
    assert seen["window"] == width
    assert seen["width"] <= width
    assert seen["sections"] == len(SECTIONS)
    assert seen["least"] > 5
    assert seen["requests"] == 0


def _title(frame: Path, tmp_path: Path) -> str:
    """The title of the page within the frame, which is where the probe left its findings."""
    text = frame.read_text() + (
        "<script>onload = () => {const t = document.getElementById('f').contentDocument.title;"
        "document.body.textContent = 'FOUND' + t + 'END'}</script>"
    )
    frame.write_text(text)
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"FOUND(.*?)END", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return found[1]
