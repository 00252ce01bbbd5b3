"""What choosing rows by a score gains on the demo task: criteria, axes and LoRA at equal trainable parameters.

    python benchmarks/demo_methods.py [--steps 100] [--seeds 3] [--out benchmarks/results/demo_methods.json]

Every method gets the budget of a LoRA of rank 16 on all linear layers, the same data, steps and batch, no dropout, and
the best of the same learning rates by held-out loss over the seeds. Printed are means and standard errors over the
seeds (which order the data, draw LoRA's start and the random control) of held-out loss and of exact match on the test
split. The file is updated after every method.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

import rowscope
from rowscope import Budget, RowsConfig, data, scoring
from rowscope.analysis.evaluate import evaluate
from rowscope.finetune import train
from rowscope.graph import trace
from rowscope.models import linear_modules
from rowscope.records import read_json, write_json
from rowscope.runs import RunFolder, versions
from rowscope.settings import TrainingSettings

RANK = 16
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
METHODS = {
    "coupled channels, taylor": ("taylor", "coupled", "row"),
    "coupled channels, zo-taylor as published": ("zo-taylor:estimator=spsa,passes=256", "coupled", "row"),
    "coupled channels, magnitude": ("magnitude", "coupled", "row"),
    "coupled channels, random": ("random", "coupled", "row"),
    "columns, taylor": ("taylor", "layer", "column"),
    "LoRA": None,
}


def configuration(method: str, seed: int):
    """The PEFT configuration of a method, scores and selection included; one seed governs all of it."""
    loaded = rowscope.load_model("demo")
    choice = METHODS[method]
    if choice is None:
        return LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(linear_modules(loaded.model))
        )
    criterion, scope, axis = choice
    batches = data.calibration_batches(data.load("demo")["train"], loaded.tokenizer, seed=seed)
    table = scoring.score(
        loaded.model, rowscope.criterion(criterion), batches, seed=seed, model_fingerprint=loaded.fingerprint
    )
    groups = trace(loaded.model).groups if scope == "coupled" else ()
    return RowsConfig.from_selection(
        rowscope.select(table, Budget("lora", RANK), scope=scope, axis=axis, groups=groups)
    )


def run(config, settings: TrainingSettings) -> dict:
    """Train once from the embedded model and measure the result."""
    loaded, splits = rowscope.load_model("demo"), data.load("demo")
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            loaded.model, loaded.tokenizer, splits["train"], splits["validation"], config, settings,
            RunFolder.create(Path(folder) / "run"),
        )  # fmt: skip
    exact = evaluate("exact-match", loaded.model, loaded.tokenizer, splits["test"]).value
    return {
        "loss": result.validation_loss,
        "exact_match": exact,
        "trainable_parameters": result.trainable_parameters,
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_methods.json")
    options = parser.parse_args()
    base = TrainingSettings(
        max_steps=options.steps, per_device_train_batch_size=16, eval_steps=options.steps, save_steps=options.steps
    )
    cells = read_json(options.out)["cells"] if options.out.is_file() else []
    print(f"{options.steps} steps, {options.seeds} seeds")
    print("| method | trainable | learning rate | held-out loss | exact match |\n|---|---|---|---|---|")
    for method in options.methods:
        configs = [configuration(method, seed) for seed in range(options.seeds)]
        rows = []
        for rate in LEARNING_RATES:
            found = [run(config, replace(base, learning_rate=rate, seed=seed)) for seed, config in enumerate(configs)]
            loss, exact = (mean_and_error([cell[name] for cell in found]) for name in ("loss", "exact_match"))
            rows.append({"method": method, "learning_rate": rate, "loss": loss, "exact_match": exact, "seeds": found})
        cells = [cell for cell in cells if cell["method"] != method] + rows
        write_json(options.out, {"steps": options.steps, "versions": versions(), "cells": cells})
        best = min(rows, key=lambda row: row["loss"][0])
        (loss, loss_error), (exact, exact_error) = best["loss"], best["exact_match"]
        print(
            f"| {method} | {best['seeds'][0]['trainable_parameters']:,} | {best['learning_rate']:g} "
            f"| {loss:.4f} ± {loss_error:.4f} | {exact:.1%} ± {exact_error:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
