"""Two processes that share the scoring find what one finds alone, and end together when one of them fails.

Run as a program, this file is one of the two.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rowscope import InputError, ScoreTable, criterion, ranks, scoring
from rowscope.records import LayerScores
from rowscope.scoring.layer_scores import zero_order

TIMEOUT = 240  # seconds; a hang is a failure
CASES = {
    **{
        f"llama {name}": ("llama", name, 5)  # an odd number of batches: one rank has more
        for name in (
            "taylor", "taylor:multivariable=true", "fisher", "fisher:per=batch", "hessian", "gradient-norm",
            "direct-taylor", "wanda", "magnitude", "zo-taylor:passes=100", "zo-taylor:estimator=spsa,passes=10",
        )
    },
    **{f"one batch {name}": ("llama", name, 1) for name in ("taylor", "direct-taylor", "wanda")},
    **{f"routed {name}": ("routed", name, 3) for name in ("taylor", "wanda")},
    "classes": ("bert", "labelwise-taylor:aggregator=top5-mean", 3),
}  # fmt: skip


CALLS = {
    "taylor": [3, 2], "wanda": [3, 2], "fisher": [5, 5], "direct-taylor": [6, 4],
    "zo-taylor:estimator=spsa,passes=10": [6, 4],
}  # fmt: skip
"""Forward passes of the first and the second rank."""


class Routed(nn.Module):
    """A batch goes through one of three experts, the third sees none; so a rank may not meet an expert at all."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
        self.head = nn.Linear(4, 2)

    def forward(self, x, expert):
        loss = self.head(self.experts["ab"[int(expert)]](x)).square().mean()
        return type("Output", (), {"loss": loss})


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def llama_batches(count, seed=1):
    tokens = torch.randint(3, 61, (count, 2, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in tokens]


def model_and_batches(kind, count):
    generator = torch.Generator().manual_seed(2)
    if kind == "llama":
        return llama(), llama_batches(count)
    torch.manual_seed(0)
    if kind == "routed":
        batches = [{"x": torch.randn(3, 4, generator=generator), "expert": torch.tensor(n % 2)} for n in range(count)]
        return Routed().eval(), batches
    config = BertConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_labels=6
    )
    labels = ([0, 1, 2, 0], [0, 4, 3, 0], [5, 0, 1])
    tokens = [torch.randint(3, 61, (len(row), 9), generator=generator) for row in labels]
    batches = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(label)}
        for row, label in zip(tokens, labels, strict=True)
    ]
    return BertForSequenceClassification(config).eval(), batches


def scored(case) -> ScoreTable:
    kind, name, count = CASES[case]
    model, batches = model_and_batches(kind, count)
    return scoring.score(model, criterion(name), batches, seed=3)


def layers_scored(count=3) -> LayerScores:
    return zero_order(llama(), llama_batches(count), passes=100)


# ---------------------------------------------------------------------------------------------- one of two processes


def file_name(case: str) -> str:
    return case.replace(" ", "-").replace(":", "-")


def failures(rank: int) -> dict[str, str]:
    """What each rank says of mishaps that only the second one meets: in the criterion, and in code of the caller."""

    def broken(model, batch):
        if rank == 1:
            raise ZeroDivisionError("a bug")
        return model(**batch).loss

    def said(name, batches, loss=None) -> str:
        try:
            scoring.score(llama(), criterion(name), batches, loss=loss)
        except (InputError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    bad = llama_batches(4)
    bad[1]["labels"][:] = -100  # the mean over no token is NaN; batch 1 and probe 1 are the second rank's
    return {
        "taylor": said("taylor", bad),
        "wanda": said("wanda", bad),
        "spsa": said("zo-taylor:estimator=spsa,passes=8", bad),
        "bug": said("taylor", llama_batches(4), broken),
        "other batches": said("taylor", llama_batches(4, seed=rank)),
    }


def forward_calls(name: str) -> int:
    """How often this process runs the model to score five batches of two examples."""
    model, calls = llama(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    scoring.score(model, criterion(name), llama_batches(5))
    return len(calls)


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks.launched("cpu"):
        rank = ranks.world()[0]
        for case in CASES:
            scored(case).save(folder / f"{file_name(case)}-{rank}.safetensors")
        for count in (1, 3):
            layers_scored(count).save(folder / f"layers-{count}-{rank}.json")
        (folder / f"calls-{rank}.json").write_text(json.dumps({name: forward_calls(name) for name in CALLS}))
        (folder / f"failures-{rank}.json").write_text(json.dumps(failures(rank)))
        scored("llama taylor").save(folder / f"afterwards-{rank}.safetensors")
    assert ranks.world() == (0, 1)


# ---------------------------------------------------------------------------------------------- the tests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder into which two processes have written all that they found."""
    folder = tmp_path_factory.mktemp("ranks")
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert not any("destroy_process_group" in error for error in errors), errors
    return folder


def assert_same(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for module, axes in expected.items():
        for axis, values in axes.items():
            torch.testing.assert_close(found[module][axis], values, rtol=rtol, atol=1e-6 * float(values.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_find_what_one_finds(two_ranks, case):
    """Guards distributed scoring: scores, halves, noise and passes are those of one process, on every rank; also where
    the batches do not divide evenly, a rank has none, or an expert is met by one rank or by none."""
    alone = scored(case)
    for rank in (0, 1):
        table = ScoreTable.load(two_ranks / f"{file_name(case)}-{rank}.safetensors")
        assert_same(table.scores, alone.scores)
        assert_same(table.noise, alone.noise)
        assert len(table.halves) == len(alone.halves)
        for found, expected in zip(table.halves, alone.halves, strict=True):
            assert_same(found, expected)
        cost = {"seconds": None, "peak_memory": None, "signal_to_noise": None}
        assert dataclasses.replace(table.provenance, **cost) == dataclasses.replace(alone.provenance, **cost)
        ratios = [value.provenance.signal_to_noise for value in (table, alone)]
        assert ratios[0] == ratios[1] or ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_the_work_is_shared(two_ranks):
    """Guards the point of it: each rank runs its part of the passes only."""
    first, second = (json.loads((two_ranks / f"calls-{rank}.json").read_text()) for rank in (0, 1))
    assert {name: [first[name], second[name]] for name in CALLS} == CALLS


@pytest.mark.parametrize("count", [1, 3])
def test_layer_scores_of_two_ranks(two_ranks, count):
    """Guards layer scores by forward passes: the ranks share the batches, each has the whole result."""
    alone = layers_scored(count)
    for rank in (0, 1):
        found = LayerScores.load(two_ranks / f"layers-{count}-{rank}.json")
        assert found.scores == pytest.approx(alone.scores, rel=1e-4)
        assert found.noise == pytest.approx(alone.noise, rel=1e-4)
        assert found.forward_passes == alone.forward_passes == 3 * count


def test_one_rank_s_failure_ends_both(two_ranks):
    """Guards against a rank that waits for ever: what one has met, both raise, and they can go on afterwards."""
    first, second = (json.loads((two_ranks / f"failures-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("taylor", "wanda", "spsa"):
        assert first[name].startswith("ElsewhereError: the loss of batch 1 is nan"), first
        assert second[name].startswith("InputError: the loss of batch 1 is nan"), second
    assert first["bug"].startswith("ElsewhereError: rank 1 has failed (ZeroDivisionError: a bug)")
    assert second["bug"] == "ZeroDivisionError: a bug"
    assert first["other batches"].startswith("InputError: the ranks have different batches")
    assert second["other batches"] == first["other batches"]
    alone = scored("llama taylor")
    for rank in (0, 1):
        assert_same(ScoreTable.load(two_ranks / f"afterwards-{rank}.safetensors").scores, alone.scores)


def test_launched_alone_is_nothing(monkeypatch):
    """Guards ordinary runs: without a launcher, or with one process, no process group is made."""
    for size in (None, "1", "many"):
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
        with ranks.launched("cuda:1") as device:
            assert device == "cuda:1"
            assert ranks.world() == (0, 1)


def test_launched_refusals(monkeypatch):
    """Guards one line where processes cannot find each other, or would share a GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="start with torchrun, or unset WORLD_SIZE"), ranks.launched("cpu"):
        pass
    with pytest.raises(InputError, match="each takes its own"), ranks.launched("cuda:0"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(InputError, match="3 GPUs are too few for process 4"), ranks.launched("cuda"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["taylor", "zo-taylor:passes=100"])
def test_torchrun_writes_one_file(tmp_path, criterion):
    """Guards 'torchrun -m rowscope score': one result, printed once, equal to one process's."""
    score = ["-m", "rowscope", "score", "demo", "--criterion", criterion, "--score-batches", "3"]
    score += ["--score-batch-size", "2", "--score-tokens", "48", "--target-modules", "down_proj", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, out in ((torchrun, "two"), ([sys.executable], "one")):
        done = subprocess.run(
            [*command, *score, "--out", f"{out}.safetensors"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["scores"] == f"{out}.safetensors", "printed once"
        assert "destroy_process_group" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "two.safetensors"]
    one, two = (ScoreTable.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert_same(two.scores, one.scores)
    assert two.provenance.forward_passes == one.provenance.forward_passes


if __name__ == "__main__":
    work(Path(sys.argv[1]))
