"""What a score table says of itself, on tables that were really scored; and several side by side."""

import json

import pytest
import torch

from rowscope import InputError, ScoreTable, criterion, scoring
from rowscope.models import linear_modules
from rowscope.scoring import agreement
from rowscope.scoring.trust import common_axis, compare, labels, trust


@pytest.fixture(scope="module")
def scored(demo, demo_batches):
    """Score the demo model; each criterion once."""
    known: dict[str, ScoreTable] = {}

    def score(text, **options):
        key = f"{text} {options}"
        if key not in known:
            origin = {"model_source": "demo", "model_fingerprint": demo.fingerprint, "data_source": "demo"}
            known[key] = scoring.score(demo.model, criterion(text), demo_batches, **origin, **options)
        return known[key]

    return score


def batch(seed, examples, tokens):
    drawn = torch.randint(3, 97, (examples, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn), "labels": drawn}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("magnitude", "knows nothing of the data: it ranks rows as the weight norm does"),
        ("random", "knows nothing of the data (Spearman with the weight norm "),
        ("zo-taylor:estimator=spsa,passes=8", "this ranking is mostly weight magnitude; try --criterion taylor"),
        ("wanda", "ranks rows almost as the weight norm does (Spearman 0.9"),
        ("taylor", "half of the data gives nearly the same ranking (split-half 0.9"),
    ],
)
def test_verdicts_on_the_demo(scored, text, verdict):
    """Guards the story that the demo tells of each criterion, in one sentence without a line break."""
    found = trust(scored(text))
    assert verdict in found.verdict
    assert "\n" not in found.verdict
    assert len(found.verdict) < 110


def test_few_batches_give_a_similar_ranking(demo, demo_batches):
    """Guards the middle of the scale: neither stable nor another ranking."""
    table = scoring.score(demo.model, criterion("taylor:multivariable=True"), demo_batches[:2])
    found = trust(table)
    assert 0.5 < found.split_half < 0.9
    assert found.verdict.startswith("half of the data gives a similar ranking (split-half 0.")


def test_one_batch_cannot_tell(demo, demo_batches):
    """Guards against a made-up stability: without halves the verdict asks for a second batch."""
    found = trust(scoring.score(demo.model, criterion("taylor"), demo_batches[:1]))
    assert found.split_half is None
    assert "at least 2 batches (--score-batches)" in found.verdict


def test_unlike_halves_ask_for_more_batches(tiny_llama):
    """Guards an unstable ranking: a few random tokens a half."""
    found = trust(scoring.score(tiny_llama, criterion("taylor"), [batch(0, 1, 3), batch(1, 1, 3)]))
    assert found.split_half < 0.5
    assert found.verdict.startswith("half of the data gives another ranking")
    assert found.verdict.endswith("more --score-batches")


def test_stable_by_the_norm_alone(tiny_llama):
    """Guards against false stability: rows of very unlike size rank alike on any data, and that is all they do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in linear_modules(tiny_llama).values():
            sizes = torch.linspace(-2, 2, module.out_features).exp()
            module.weight.mul_(sizes[torch.randperm(len(sizes), generator=generator)][:, None])
    found = trust(scoring.score(tiny_llama, criterion("taylor"), [batch(0, 1, 3), batch(1, 1, 3)]))
    assert found.split_half > 0.6
    assert found.split_half_beyond_norm < 0.5
    assert found.verdict.startswith("beyond the weight norm, half of the data gives another ranking")


def test_noise_is_called_noise(tiny_llama):
    """Guards zero-order scores where all rows have one norm: then the ranking is not even the weights' size."""
    with torch.no_grad():
        for module in linear_modules(tiny_llama).values():
            module.weight.copy_(module.weight.sign() * 0.02)
    found = trust(scoring.score(tiny_llama, criterion("zo-taylor:estimator=spsa,passes=8"), [batch(0, 2, 9)]))
    assert found.signal_to_noise < 1
    assert "mostly noise; try --criterion taylor" in found.verdict


def test_broken_scores_come_first(scored):
    """Guards the gravest case: scores that are no numbers are said before anything else."""
    table = scored("taylor", axes=("row",))
    scores = {module: {"row": axes["row"].clone()} for module, axes in table.scores.items()}
    next(iter(scores.values()))["row"][:2] = float("nan")
    found = trust(ScoreTable(scores, table.weight_norm, table.provenance, table.halves))
    assert found.verdict == "2 scores are NaN or infinite: score again with --dtype float32"


def test_figures_come_from_the_table(scored):
    """Guards the figures beside the verdict: those of the agreement module and of the provenance."""
    table = scored("taylor")
    for axis in ("row", "column"):
        found = trust(table, axis)
        assert found.split_half == agreement.split_half(table, axis)
        assert found.split_half_beyond_norm == agreement.split_half(table, axis, beyond_norm=True)
        assert found.norm_agreement == agreement.norm_agreement(table, axis)
        assert (found.forward_passes, found.backward_passes) == (4, 4)
    assert trust(table).axis == "row"


def test_cost_is_measured(scored, tmp_path):
    """Guards the cost in the provenance: time and memory of the scoring, kept in the file, absent in old ones."""
    table = scored("taylor")
    assert 0 < table.provenance.seconds < 600
    peak = table.provenance.peak_memory  # None where the process had been larger before
    assert peak is None or 0 < peak < 8 * 2**30
    table.save(tmp_path / "s.safetensors")
    assert ScoreTable.load(tmp_path / "s.safetensors").provenance == table.provenance
    from rowscope.records import read_tensors, write_tensors

    tensors, header = read_tensors(tmp_path / "s.safetensors", "scores")
    for name in ("seconds", "peak_memory", "format_version", "kind"):
        del header[name]
    write_tensors(tmp_path / "old.safetensors", tensors, "scores", header)
    old = ScoreTable.load(tmp_path / "old.safetensors").provenance
    assert (old.seconds, old.peak_memory) == (None, None)
    write_tensors(tmp_path / "odd.safetensors", tensors, "scores", {**header, "seconds": "long"})
    with pytest.raises(InputError, match="is damaged"):
        ScoreTable.load(tmp_path / "odd.safetensors")


def test_memory_is_that_of_the_block():
    """Guards the peak on the CPU: what was allocated within is seen, what was there before is not."""
    from rowscope.scoring.cost import measured

    size = 2**28
    with measured(torch.nn.Linear(1, 1)) as cost:
        torch.ones(size // 4).sum()
    if cost.peak_memory is None:
        pytest.skip("this process was once larger by more than the block needs")
    assert 0.9 * size < cost.peak_memory < 2 * size
    with measured(torch.nn.Linear(1, 1)) as cost:
        torch.ones(size // 64).sum()
    assert cost.peak_memory is None, "below the mark of the process nothing is known"


def test_comparison(scored):
    """Guards comparison.json: every table, every pair, every module, as JSON; the first table comes first."""
    tables = [scored(text) for text in ("taylor", "zo-taylor:estimator=spsa,passes=8", "magnitude")]
    value = compare(labels(tables, ["a", "b", "c"]))
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["axis"] == "row"
    assert [table["name"] for table in value["tables"]] == ["taylor", "zo-taylor:estimator=spsa,passes=8", "magnitude"]
    named = [(pair["first"], pair["second"]) for pair in value["pairs"]]
    assert named == [
        ("taylor", "zo-taylor:estimator=spsa,passes=8"),
        ("taylor", "magnitude"),
        ("zo-taylor:estimator=spsa,passes=8", "magnitude"),
    ]
    for pair, (first, second) in zip(value["pairs"], [(0, 1), (0, 2), (1, 2)], strict=True):
        expected = agreement.agreement(tables[first], tables[second], "row")
        assert pair["median"] == vars(expected.median)
        assert pair["overall"] == vars(expected.overall)
        assert pair["modules"] == {name: vars(values) for name, values in expected.modules.items()}


def test_one_table_is_compared_with_the_norm(scored):
    """Guards a comparison of one: the norm is the other, and beyond it nothing is left to agree on."""
    value = compare({"mine": scored("taylor")}, "column")
    (pair,) = value["pairs"]
    assert (pair["first"], pair["second"]) == ("mine", "weight norm")
    assert pair["median"]["spearman"] == pytest.approx(value["tables"][0]["norm_agreement"])
    assert pair["median"]["partial"] == pytest.approx(0, abs=1e-9)
    assert len(value["tables"]) == 1


def test_axes(scored):
    """Guards tables of one axis: the axis that all have is taken, rows before columns, and none is refused."""
    both, rows, columns = (scored("magnitude", axes=axes) for axes in (("row", "column"), ("row",), ("column",)))
    assert common_axis([both, both]) == common_axis([both, rows]) == "row"
    assert common_axis([both, columns]) == trust(columns).axis == "column"
    with pytest.raises(InputError, match="no axis in common"):
        compare({"a": rows, "b": columns})
    with pytest.raises(InputError, match="has no column scores"):
        compare({"a": both, "b": rows}, "column")


def test_names_are_told_apart(scored):
    """Guards names: the criterion alone where that is enough, the file where criteria repeat."""
    one, other = scored("taylor"), scored("magnitude")
    assert list(labels([one, other, one], ["a/x.st", "y.st", "z.st"])) == ["taylor (x)", "magnitude", "taylor (z)"]
    assert list(labels([one, one], ["a/s.st", "b/s.st"])) == ["taylor (a/s.st)", "taylor (b/s.st)"]
