"""``rowscope demo``: the whole chain, and what the README says of it."""

import pytest

from rowscope import Selection, cli
from rowscope.records import read_json
from rowscope.runs import RunFolder


@pytest.mark.slow
def test_the_demo_gains_what_it_promises(tmp_path, monkeypatch):
    """Guards the demo: the untouched model fails (< 20 % exact match), tuning gains 30 points or more."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--output-dir", "d"])
    assert exit_.value.code == 0
    run = RunFolder(tmp_path / "d")
    results = {result["task"]: result for result in read_json(run.evaluation)["results"]}
    exact = results["exact-match"]
    assert exact["before"]["value"] < 0.2
    assert exact["after"]["value"] >= exact["before"]["value"] + 0.3
    assert results["perplexity"]["after"]["value"] < results["perplexity"]["before"]["value"]
    assert Selection.load(run.selection).origin["scope"] == "coupled"
    assert len(run.score_tables()) == 3
    before = run.run.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--output-dir", "d", "--resume"])
    assert exit_.value.code == 0
    assert run.run.read_bytes() == before, "a finished demo is shown again, not run again"
    page = run.report.read_text()
    for expected in ("zo-taylor", "exact-match", "<svg"):
        assert expected in page
