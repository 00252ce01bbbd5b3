"""What the choice of what to train gains on the demo task: axes, criteria, ways to pick, LoRA; at equal parameters.

    python benchmarks/demo_methods.py [--methods NAME…] [--steps 100] [--seeds 3] [--fresh-seeds 5] [--out FILE]

Every method gets the budget of a LoRA of rank 16 on all linear layers, the same data, steps and batch, no dropout, and
the best learning rate by held-out loss over the seeds: from 2e-3, 4e-3 and 8e-3, and on by factors of two while the
best is at the edge. At that rate it is run again with seeds that decided nothing. A seed orders the data and draws
LoRA's start, samples and random controls. Printed are means and standard errors of the held-out loss, and of the
difference to LoRA's at the same fresh seeds. The file is updated on the way; what it already has is not run again.
"""

import argparse
import statistics
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from peft import LoraConfig

import rowscope
from rowscope import Budget, RowsConfig, data, scoring
from rowscope.finetune import train
from rowscope.graph import trace
from rowscope.models import linear_modules
from rowscope.records import read_json, write_json
from rowscope.runs import RunFolder, versions
from rowscope.scoring.vectors import weight_matrices
from rowscope.settings import TrainingSettings

RANK = 16
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
FIRST_FRESH_SEED = 100


@dataclass(frozen=True)
class Method:
    """How units are chosen; `target_modules` are all linear layers if empty, the budget stays that of all."""

    criterion: str = "taylor"
    scope: str = "layer"
    axis: str = "column"
    pick: str = "top"
    heads: bool = False
    target_modules: tuple[str, ...] = ()


METHODS = {
    "LoRA": None,
    "columns, random": Method(pick="random"),
    "coupled channels, random": Method(scope="coupled", pick="random"),
    "columns, taylor, sampled": Method(pick="sample"),
    "coupled channels, taylor, sampled": Method(scope="coupled", pick="sample"),
    "columns, taylor, diverse": Method(pick="diverse"),
    "coupled channels, taylor, diverse": Method(scope="coupled", pick="diverse"),
    "columns of o and down, random": Method(pick="random", target_modules=("o_proj", "down_proj")),
    "columns, taylor": Method(),
    "coupled channels, taylor": Method(scope="coupled"),
    "coupled channels, magnitude": Method("magnitude", scope="coupled"),
    "coupled whole heads, random": Method(scope="coupled", pick="random", heads=True),
    "rows, random": Method(axis="row", pick="random"),
    "rows, taylor": Method(axis="row"),
}


@cache
def budget() -> Budget:
    """Weights of a LoRA of rank 16 on all linear layers."""
    modules = linear_modules(rowscope.load_model("demo").model).values()
    return Budget("params", RANK * sum(module.in_features + module.out_features for module in modules))


def configuration(method: str, seed: int):
    """The PEFT configuration of a method, scores and selection included; one seed governs all of it."""
    loaded = rowscope.load_model("demo")
    choice = METHODS[method]
    if choice is None:
        return LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(linear_modules(loaded.model))
        )
    batches = data.calibration_batches(data.load("demo")["train"], loaded.tokenizer, seed=seed)
    table = scoring.score(
        loaded.model, rowscope.criterion(choice.criterion), batches, target_modules=choice.target_modules, seed=seed,
        model_fingerprint=loaded.fingerprint,
    )  # fmt: skip
    return RowsConfig.from_selection(
        rowscope.select(
            table,
            # All modules: as LoRA there, module by module.
            budget() if choice.target_modules else Budget("lora", RANK),
            scope=choice.scope,
            axis=choice.axis,
            pick=choice.pick,
            heads=choice.heads,
            groups=trace(loaded.model).groups if choice.scope == "coupled" else (),
            vectors=weight_matrices(loaded.model) if choice.pick == "diverse" else None,
            seed=seed,
        )
    )


def run(config, settings: TrainingSettings) -> dict:
    """Train once from the embedded model; the held-out loss at the end."""
    loaded, splits = rowscope.load_model("demo"), data.load("demo")
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            loaded.model, loaded.tokenizer, splits["train"], splits["validation"], config, settings,
            RunFolder.create(Path(folder) / "run"),
        )  # fmt: skip
    return {"loss": result.validation_loss, "trainable_parameters": result.trainable_parameters}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def next_rate(cells: list[dict]) -> float | None:
    """The learning rate to try next; None once the best is between two others."""
    losses = {cell["learning_rate"]: mean_and_error([seed["loss"] for seed in cell["seeds"]])[0] for cell in cells}
    for rate in LEARNING_RATES:
        if rate not in losses:
            return rate
    best = min(losses, key=losses.__getitem__)
    return {min(losses): best / 2, max(losses): best * 2}.get(best)


def row(method: str, best: dict, lora: dict | None) -> str:
    """A line of the table, of the best cells of the method and of LoRA."""
    tuned, fresh = (mean_and_error([seed["loss"] for seed in best[part]]) for part in ("seeds", "fresh"))
    trained = best["seeds"][0]["trainable_parameters"]
    line = f"| {method} | {trained:,} | {best['learning_rate']:g} | {tuned[0]:.4f} ± {tuned[1]:.4f} "
    line += f"| {fresh[0]:.4f} ± {fresh[1]:.4f} |"
    if lora is None or method == "LoRA":
        return f"{line} |"
    pairs = zip(best["fresh"], lora["fresh"], strict=True)
    mean, error = mean_and_error([own["loss"] - other["loss"] for own, other in pairs])
    return f"{line} {mean:+.4f} ± {error:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh-seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_methods.json")
    options = parser.parse_args()
    base = TrainingSettings(
        max_steps=options.steps, per_device_train_batch_size=16, eval_steps=options.steps, save_steps=options.steps
    )
    cells = read_json(options.out)["cells"] if options.out.is_file() else []

    def own(method: str) -> list[dict]:
        return [cell for cell in cells if cell["method"] == method and len(cell["seeds"]) == options.seeds]

    def best(method: str) -> dict | None:
        return min(own(method), key=lambda cell: statistics.mean(seed["loss"] for seed in cell["seeds"]), default=None)

    def save() -> None:
        write_json(options.out, {"steps": options.steps, "versions": versions(), "cells": cells})

    def trained(method: str, rate: float, seed: int) -> dict:
        return run(configuration(method, seed), replace(base, learning_rate=rate, seed=seed))

    print(f"{options.steps} steps, {options.seeds} seeds to tune, {options.fresh_seeds} fresh ones")
    print("| method | trainable | learning rate | loss, tuning seeds | loss, fresh seeds | minus LoRA |")
    print("|---|---|---|---|---|---|")
    for method in options.methods:
        while (rate := next_rate(own(method))) is not None:
            found = [trained(method, rate, seed) for seed in range(options.seeds)]
            cells.append({"method": method, "learning_rate": rate, "seeds": found})
            save()
        chosen = best(method)
        fresh = chosen.setdefault("fresh", [])
        while len(fresh) < options.fresh_seeds:
            fresh.append(trained(method, chosen["learning_rate"], FIRST_FRESH_SEED + len(fresh)))
            save()
        print(row(method, chosen, best("LoRA")), flush=True)


if __name__ == "__main__":
    main()
