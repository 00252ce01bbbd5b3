"""A synthetic but realistic run folder: 8 layers of 7 modules, three criteria, a selection, a log and measurements."""

from pathlib import Path

import numpy
import pytest
import torch

from rowscope.records import Provenance, ScoreTable, Selection, write_json, write_text, write_yaml
from rowscope.runs import RunFolder

HIDDEN, INTERMEDIATE, KEY_VALUE, LAYERS = 192, 512, 64, 8
FINGERPRINT = "5e0f" * 16
BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_shapes(hostile: str = "") -> dict[str, tuple[int, int]]:
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in BLOCK.items()}
    if hostile:
        shapes[f"model.layers.0.{hostile}"] = (HIDDEN, HIDDEN)
    return shapes


def make_table(criterion: str, seed: int, norm_weight: float, hostile: str = "", noisy: bool = False) -> ScoreTable:
    """Scores that mix the weight norm (shared by all tables) with a signal of their own seed."""
    scores, norms, halves, noise = {}, {}, ({}, {}), {}
    for position, (module, shape) in enumerate(make_shapes(hostile).items()):
        depth = int(module.split(".")[2]) / LAYERS
        scores[module], norms[module], noise[module] = {}, {}, {}
        for half in halves:
            half[module] = {}
        for axis, size in zip(("row", "column"), shape, strict=True):
            shared = numpy.random.default_rng(10**6 + position).lognormal(0, 0.3, size)
            own = numpy.random.default_rng(seed * 1000 + position).lognormal(0, 0.6, size)
            level = (0.2 + 3 * depth**2) * (4 if "down" in module else 1.5 if "v_proj" in module else 0.4)
            value = level * shared**norm_weight * own ** (1 - norm_weight)
            jitter = numpy.random.default_rng(seed * 77 + position)
            scores[module][axis] = torch.tensor(value, dtype=torch.float32)
            norms[module][axis] = torch.tensor(shared, dtype=torch.float32)
            for half in halves:
                half[module][axis] = torch.tensor(value * jitter.lognormal(0, 0.3, size), dtype=torch.float32)
            noise[module][axis] = torch.full((size,), 0.5 * level, dtype=torch.float32)
    provenance = Provenance(
        criterion=criterion,
        model_source="demo",
        model_fingerprint=FINGERPRINT,
        layers=[f"model.layers.{layer}" for layer in range(LAYERS)],
        shapes=make_shapes(hostile),
        dtypes=dict.fromkeys(make_shapes(hostile), "float32"),
        data_source="demo",
        data_fingerprint="ab12" * 16,
        forward_passes=512 if noisy else 8,
        backward_passes=0 if noisy else 8,
        signal_to_noise=0.42 if noisy else None,
    )
    return ScoreTable(scores, norms, provenance, halves, noise if noisy else {})


def make_selection(table: ScoreTable, rank: int = 24) -> Selection:
    indices = {
        module: {"row": axes["row"].nan_to_num().topk(rank if "down" in module else rank // 2).indices.sort().values}
        for module, axes in table.scores.items()
    }
    origin = {"criterion": table.provenance.criterion, "budget": "lora=16", "scope": "layer"}
    return Selection(indices, table.provenance.shapes, FINGERPRINT, origin)


def make_log() -> list[dict]:
    random = numpy.random.default_rng(3)
    lines: list[dict] = []
    for step in range(1, 201):
        loss = 2.1 + 1.1 * numpy.exp(-step / 40) + random.normal(0, 0.12)
        lines.append({"step": step, "loss": float(loss), "learning_rate": 1e-3, "active_layers": list(range(LAYERS))})
        if step % 20 == 0:
            lines.append({"step": step, "validation_loss": float(2.2 + 0.9 * numpy.exp(-step / 45))})
    return lines


def make_run(root: Path, hostile: str = "", seed: int = 1) -> RunFolder:
    """Write a finished run's folder, every file of it."""
    run = RunFolder.create(root)
    taylor = make_table("taylor", seed, 0.4, hostile)
    if hostile:
        taylor.scores[f"model.layers.0.{hostile}"]["row"][:3] = float("nan")
    taylor.save(run.scores)
    make_table("zo-taylor:estimator=spsa,passes=512", seed + 10, 0.75, hostile, noisy=True).save(
        run.root / "scores-zo-taylor.safetensors"
    )
    make_table("magnitude", seed + 20, 1.0, hostile).save(run.root / "scores-magnitude.safetensors")
    selection = make_selection(taylor)
    selection.save(run.selection)
    write_text(run.log, "")
    for line in make_log():
        run.append_log(line)
    settings = {
        "model": "demo",
        "data": "demo",
        "criterion": "taylor",
        "budget": "lora=16",
        "scope": "layer",
        "seed": seed,
    }
    write_yaml(run.config, settings | {"learning_rate": 1e-3, "max_steps": 200, "schedule": "none", "base": "full"})
    write_json(
        run.memory,
        {
            "unit": "bytes",
            "batch": [8, 128],
            "components": {
                "base_weights": 13_957_120,
                "adapter": 1_310_720,
                "gradients": 1_310_720,
                "optimizer": 2_621_552,
                "activations": 96_468_992,
            },
            "peak_rss": 812_000_000,
        },
    )
    results = [
        {
            "task": "exact-match",
            "unit": "fraction",
            "before": {"value": 0.11, "standard_error": 0.022, "samples": 200},
            "after": {"value": 0.455, "standard_error": 0.035, "samples": 200},
        },
        {
            "task": "loss",
            "unit": "nats/token",
            "before": {"value": 3.21, "standard_error": 0.03, "samples": 64},
            "after": {"value": 2.24, "standard_error": 0.02, "samples": 64},
        },
        {
            "task": "perplexity of unrelated text",
            "unit": "perplexity",
            "before": {"value": 18.4, "standard_error": 0.5, "samples": 64},
            "after": {"value": 18.9, "standard_error": 0.5, "samples": 64},
        },
        {
            "task": "gsm8k",
            "unit": "fraction",
            "before": {"value": 0.02, "standard_error": 0.01, "samples": 100},
            "after": None,
        },
    ]
    write_json(run.evaluation, {"data": "demo", "split": "test", "results": results})
    write_text(run.adapter / "adapter_model.safetensors", "0" * 1_320_000)
    write_json(
        run.run,
        {
            "status": "finished",
            "command": ["rowscope", "finetune", "rows", "demo", "--criterion", "taylor", "--output-dir", "runs/a b"],
            "method": "rows",
            "schedule": "none",
            "base": "full",
            "seed": seed,
            "device": "cpu",
            "versions": {"rowscope": "0.1.0", "python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0"},
            "model": {"source": "demo", "fingerprint": FINGERPRINT},
            "data": {"source": "demo", "fingerprint": "ab12" * 16},
            "selection": selection.origin,
            "trainable_parameters": selection.trainable_parameters(),
            "total_parameters": 3_489_216,
            "timings": {"score": 6.4, "train": 83.0, "evaluate": 12.5},
            "result": {
                "steps": 200,
                "train_loss": 2.31,
                "validation_loss_before": 3.21,
                "validation_loss": 2.2104,
                "best_step": 200,
            },
        },
    )
    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run")


@pytest.fixture(name="make_run")
def make_run_fixture():
    """The function that writes a finished run's folder."""
    return make_run
