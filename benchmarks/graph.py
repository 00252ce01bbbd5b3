"""What the graph of a large model costs: CPU time, memory, growth with the layers, and Torch-Pruning's own for scale.

    python benchmarks/graph.py [--repeats 3] [--seventy] [--out benchmarks/results/graph.json]

Every measurement is a process of its own on one thread; kinds are interleaved and medians taken. Memory is the peak
above that of the process with everything imported and the model built on the meta device (`live`: in memory, bfloat16,
pages untouched). `torch-pruning` is its DependencyGraph with `get_all_groups` of the same model; `--seventy` runs that
for the 70B shape too, which takes minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

VOCABULARY = 128256
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LAYERS = (2, 5, 10, 20, 40, 80)


def measured(shape: str, layers: int, how: str) -> dict[str, float]:
    """One measurement in this process: ``how`` is ``rowscope``, ``live`` or ``torch-pruning``."""
    import resource
    import time
    import warnings

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rowscope import trace

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    settings = SHAPES[shape] | {"num_hidden_layers": layers, "num_key_value_heads": 8, "vocab_size": VOCABULARY}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager", dtype=torch.bfloat16))
    if how == "live":
        model = model.to_empty(device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    groups = _torch_pruning_groups(model) if how == "torch-pruning" else len(trace(model).groups)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "megabytes": peak / 1024, "groups": groups}


def _torch_pruning_groups(model: object) -> int:
    import torch
    import torch_pruning

    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta"), "use_cache": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(model, inputs, output_transform=lambda out: out.logits, verbose=False)
    return sum(1 for _ in graph.get_all_groups(root_module_types=[torch.nn.Linear]))


def in_child(shape: str, layers: int, how: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", shape, str(layers), how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seventy", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        shape, layers, how = arguments.one
        print(json.dumps(measured(shape, int(layers), how)))
        return
    kinds = [("8B", 32, how) for how in ("rowscope", "live", "torch-pruning")] + [
        ("70B", n, "rowscope") for n in LAYERS
    ]
    kinds += [("70B", 80, "torch-pruning")] if arguments.seventy else []
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for repeat in range(arguments.repeats):
        for kind in kinds:
            if not repeat or kind[2] != "torch-pruning" or kind[0] == "8B":
                found[kind].append(in_child(*kind))
    medians = {
        kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()
    }
    print("| shape | layers | what | CPU seconds | MB above the import | groups |\n|---|---|---|---|---|---|")
    for (shape, layers, how), median in medians.items():
        cells = [
            shape,
            layers,
            how,
            f"{median['seconds']:.1f}",
            f"{median['megabytes']:.0f}",
            f"{median['groups']:.0f}",
        ]
        print(f"| {' | '.join(map(str, cells))} |")
    whole, half = (medians["70B", layers, "rowscope"]["seconds"] for layers in (80, 40))
    ratios = {"80 layers over 40": whole / half}
    for shape, layers in (("8B", 32), ("70B", 80)):
        if (shape, layers, "torch-pruning") in medians:
            theirs, ours = (medians[shape, layers, how]["seconds"] for how in ("torch-pruning", "rowscope"))
            ratios[f"torch-pruning over rowscope, {shape}"] = theirs / ours
    print("\n".join(f"{name}: {ratio:.1f}" for name, ratio in ratios.items()))
    if arguments.out:
        rows = [{"shape": s, "layers": n, "what": how, **median} for (s, n, how), median in medians.items()]
        arguments.out.write_text(json.dumps({"runs": rows, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
