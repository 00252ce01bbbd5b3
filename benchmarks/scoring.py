"""What scoring costs: time in forward passes of the model, memory as a ratio to inference's peak.

    python benchmarks/scoring.py [--layers 32] [--rounds 3] [--only taylor zo-taylor]
                                 [--out benchmarks/results/scoring.json]

A random Llama; one thread; each round times one inference pass a batch and every criterion in turn, medians of the
ratios within a round are printed. A criterion's passes are those that its record says, a backward pass being none:
``taylor`` is measured against forward passes alone. Memory is what torch's allocator had given out at the highest
moment, the model's weights included, as torch's profiler counts it on the CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from rowscope import scoring
from rowscope.records import write_json
from rowscope.runs import versions

CRITERIA = {
    "taylor": "taylor",
    "direct-taylor": "direct-taylor",
    "fisher, per batch": "fisher:per=batch",
    "wanda": "wanda",
    "zo-taylor": "zo-taylor:passes={passes}",
    "zo-taylor, spsa": "zo-taylor:estimator=spsa,passes={passes}",
}


def toy(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def batches(count: int, examples: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 2048, (count, examples, tokens), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def inference(model: LlamaForCausalLM, sample: list[dict[str, torch.Tensor]]) -> None:
    with torch.inference_mode():
        for batch in sample:
            model(**batch, use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak(work: Callable[[], object], weights: int) -> int:
    """Bytes of torch's allocations at the highest moment of `work`, `weights` included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return weights + highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scoring.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, sample = toy(arguments.layers), batches(arguments.batches, arguments.examples, arguments.tokens)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rules = {name: scoring.criterion(CRITERIA[name].format(passes=arguments.passes)) for name in arguments.only}
    inference(model, sample)
    ratios: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(arguments.rounds):
        for name, rule in rules.items():
            one_pass = seconds(lambda: inference(model, sample)) / len(sample)
            table = None

            def work(rule=rule):
                nonlocal table
                table = scoring.score(model, rule, sample)

            spent = seconds(work)
            ratios[name].append(spent / one_pass / table.provenance.forward_passes)
    plain = peak(lambda: inference(model, sample), weights)
    results = {}
    for name, rule in rules.items():
        memory = peak(lambda rule=rule: scoring.score(model, rule, sample), weights)
        results[name] = {"time_per_own_forward_pass": statistics.median(ratios[name]), "memory_ratio": memory / plain}
        print(f"{name:20} time per forward pass {results[name]['time_per_own_forward_pass']:.2f}  "
              f"memory {results[name]['memory_ratio']:.3f}", flush=True)  # fmt: skip
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    write_json(
        arguments.out,
        {
            "versions": versions(),
            "settings": settings,
            "weights": weights,
            "inference_peak": plain,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
