"""How well each criterion ranks the rows that exact Taylor ranks, against the passes it spends.

    python benchmarks/fidelity.py [--models demo encoder] [--seeds 5] [--passes 128 512 2048]
                                  [--zero-orders "zo-taylor" "zo-taylor, spsa"]
                                  [--out benchmarks/results/fidelity.json] [--figure docs/images/fidelity]

Fidelity is the rank correlation with exact Taylor (Σ|w·g| over all 8 batches of a seed) along rows or columns, the
weight norm partialled out, median over modules; means over seeds, which draw the batches and all of the criterion's
randomness, ± standard error. A backward pass counts as two passes. Beside it stand the ceilings: what exact gradients
give to the quantities that the zero orders guess. The file is updated after every seed, what
it held of other criteria and passes stays.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import encoder
import torch
from torch import Tensor, nn

import rowscope
from rowscope import data, models, scoring
from rowscope.analysis import figures
from rowscope.records import AXES, ScoreTable, read_json, write_json
from rowscope.runs import versions
from rowscope.scoring.agreement import partial_spearman, spearman
from rowscope.scoring.losses import model_loss
from rowscope.scoring.weights import scored_weights

BATCHES = 8
ZERO_ORDERS = {"zo-taylor": "zo-taylor:passes={}", "zo-taylor, spsa": "zo-taylor:estimator=spsa,passes={}"}
EXACT = ("random", "magnitude", "wanda", "direct-taylor", "fisher:per=batch", "taylor")
Scores = dict[str, dict[str, Tensor]]


def subject(name: str, seed: int):
    """Model, batches and loss (None: the model's own)."""
    if name == "demo":
        loaded = rowscope.load_model("demo")
        return loaded.model, data.calibration_batches(data.load("demo")["train"], loaded.tokenizer, seed=seed), None
    model, tokenizer = encoder.load()
    return model, encoder.batches(tokenizer, BATCHES, seed), encoder.contrastive_loss


def fidelity(scores: Scores, reference: ScoreTable, axis: str, partial: bool = True) -> float:
    """Median over modules of the (partial) rank correlation with the reference."""
    values = []
    for module, axes in scores.items():
        mine, exact, norm = (
            table[axis].double().numpy() for table in (axes, reference.scores[module], reference.weight_norm[module])
        )
        values.append(partial_spearman(mine, exact, norm) if partial else spearman(mine, exact))
    return statistics.median(values)


def ceilings(model: nn.Module, batches: Sequence[dict], loss: Callable | None) -> dict[str, Scores]:
    """Exact gates of rows and columns, signed and as root mean square over batches; and exact direct sizes."""
    table = scoring.score(model, scoring.criterion("taylor:multivariable=True"), batches, loss=loss)
    squares: Scores = {}
    for batch in batches:
        one = scoring.score(model, scoring.criterion("taylor:multivariable=True"), [batch], loss=loss).scores
        for module, axes in one.items():
            entry = squares.setdefault(module, {axis: torch.zeros_like(value) for axis, value in axes.items()})
            for axis, value in axes.items():
                entry[axis] += value.square()
    return {
        "exact gates": table.scores,
        "exact gates, RMS over batches": squares,
        "exact direct gradient sizes": direct_sizes(model, batches, loss or model_loss),
    }


def direct_sizes(model: nn.Module, batches: Sequence[dict], loss: Callable) -> Scores:
    """``d_i Σ_j |w_ij| ‖x_j‖`` with exact d: the head's gradient, by autograd, through each weight's own block."""
    weights, blocks = scored_weights(model), list(models.layers(model).values())
    sizes = {name: torch.zeros(weight.out_features) for name, weight in weights.items()}
    norms = {name: torch.zeros(weight.in_features) for name, weight in weights.items()}
    for batch in batches:
        calls, ends = [], []

        def record(_, args, kwargs, calls=calls):
            calls.append((args, kwargs))

        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]

        def cut(_, __, output, ends=ends):
            ends.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
            return (ends[0], *output[1:]) if isinstance(output, tuple) else ends[0]

        handles.append(blocks[-1].register_forward_hook(cut))
        total = loss(model, batch).sum()
        for handle in handles:
            handle.remove()
        (gradient,) = torch.autograd.grad(total, ends[0])
        handles = []
        for name, weight in weights.items():

            def note(_, inputs, output, name=name):
                norms[name] += inputs[0].detach().flatten(0, -2).square().sum(0)

                def add(found, name=name):
                    sizes[name] += found.detach().flatten(0, -2).square().sum(0)

                output.register_hook(add)

            handles.append(weight.module.register_forward_hook(note))
        for block, (args, kwargs) in zip(blocks, calls, strict=True):
            output = block(*(a.detach() if isinstance(a, Tensor) else a for a in args), **kwargs)
            (output[0] if isinstance(output, tuple) else output).backward(gradient)
        model.zero_grad()
        for handle in handles:
            handle.remove()
    return {
        name: weight.reduce(
            weight.values().abs() * weight.by_column(norms[name].sqrt()) * weight.by_row(sizes[name].sqrt())
        )
        for name, weight in weights.items()
    }


def measure(
    name: str, seeds: int, passes: Sequence[int], zero_orders: Sequence[str], keep: Callable[[str, list[dict]], None]
) -> None:
    """Hand the model's results to `keep` after every seed."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}

    def note(label: str, spent: int, scores: Scores, reference: ScoreTable, **more: float) -> None:
        entry = found.setdefault((label, spent), {})
        for axis in AXES:
            entry.setdefault(axis, []).append(fidelity(scores, reference, axis))
            entry.setdefault(f"{axis}, norm included", []).append(fidelity(scores, reference, axis, partial=False))
        for key, value in more.items():
            entry.setdefault(key, []).append(value)

    for seed in range(seeds):
        model, batches, loss = subject(name, seed)
        reference = scoring.score(model, scoring.criterion("taylor"), batches, loss=loss)
        note("weight norm", 0, reference.weight_norm, reference)
        for criterion in EXACT:
            for count in (1, 2, 4) if criterion in ("taylor", "direct-taylor") else (BATCHES,):
                table = scoring.score(model, scoring.criterion(criterion), batches[:count], loss=loss, seed=seed)
                spent = table.provenance.forward_passes + 2 * table.provenance.backward_passes
                if criterion == "taylor" and count == BATCHES:
                    continue
                note(criterion, spent, table.scores, reference)
        for label, scores in ceilings(model, batches, loss).items():
            note(label, -1, scores, reference)
        for budget in passes:
            for label in zero_orders:
                table = scoring.score(
                    model, scoring.criterion(ZERO_ORDERS[label].format(budget)), batches, loss=loss, seed=seed
                )
                ratio = table.provenance.signal_to_noise
                note(label, budget, table.scores, reference, signal_to_noise=ratio)
                rows, columns = (found[label, budget][axis][-1] for axis in AXES)
                print(f"{name}, seed {seed}: {label} {budget}: rows {rows:.3f}, columns {columns:.3f}", flush=True)
        keep(name, summary(found))


def summary(found: dict[tuple[str, int], dict[str, list[float]]]) -> list[dict]:
    """Means and standard errors over the seeds so far."""
    return [
        {
            "criterion": label,
            "passes": spent,
            "seeds": len(values["row"]),
            **{
                key: {
                    "mean": statistics.mean(numbers),
                    "standard_error": statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None,
                }
                for key, numbers in values.items()
            },
        }
        for (label, spent), values in found.items()
    ]


def draw(name: str, results: list[dict], path: Path) -> None:
    """The figure of the rows' fidelity."""
    points = [
        {
            "criterion": row["criterion"],
            "passes": row["passes"],
            "mean": row["row"]["mean"],
            "standard_error": row["row"]["standard_error"] or 0.0,
        }
        for row in results
        if row["passes"] > 0
    ]
    lines = {row["criterion"]: row["row"]["mean"] for row in results if row["passes"] == -1}
    figure = figures.fidelity_curves(points, lines)
    for suffix in (".png", ".svg"):
        figures.save(figure, path.with_name(f"{path.name}-{name}{suffix}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "encoder"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--zero-orders", nargs="*", default=list(ZERO_ORDERS), choices=list(ZERO_ORDERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/fidelity"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    previous = read_json(arguments.out) if arguments.out.is_file() else {}
    results = {"versions": versions(), "models": previous.get("models", {})}

    def keep(name: str, rows: list[dict]) -> None:
        measured = {(row["criterion"], row["passes"]) for row in rows}
        others = [row for row in results["models"].get(name, []) if (row["criterion"], row["passes"]) not in measured]
        results["models"][name] = others + rows
        write_json(arguments.out, results)

    for name in arguments.models:
        measure(name, arguments.seeds, arguments.passes, arguments.zero_orders, keep)
        draw(name, results["models"][name], arguments.figure)


if __name__ == "__main__":
    main()
