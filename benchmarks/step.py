"""What a training step costs: time, FLOPs, bytes kept for the backward pass, and bytes on disk; methods side by side.

    python benchmarks/step.py [--device cuda --config llama-3-8b --dtype bfloat16] [--methods NAME…] [--out FILE]

A step is a forward and a backward pass of a causal language model, and AdamW's. Every method trains as many weights as
a LoRA of rank 16 on all linear layers of the blocks, to 1 % (`full` trains all), from the same random model, on the
same batch. The floor is the model frozen, its forward pass and the gradient of its embeddings; the embeddings' output
asks for a gradient in every method. Methods take turns in a new order each round; a ratio is the median of the rounds'
own ratios, on the CPU of the process's CPU time on one thread, on a GPU of the time between two events.

FLOPs are those of the matrix products but attention's own. *Kept* is what autograd holds after the forward pass, each
storage once, parameters left out; *in blocks* what the blocks keep of it, without the logits; *state* what a method
holds all the time besides the base model and what it trains (indices, masks, originals); *dense* what of the kept
bytes does not depend on the tokens, such as copies of weights; *extra* both of these.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from baselines import METHODS
from peft import PeftModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rowscope.records import write_json
from rowscope.runs import versions

CONFIGS = {
    "tiny": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip

# What is promised: a quantity of a method, relative to another method's, and the most it may be.
GOALS = (
    *(("time", name, "floor", 1.03) for name in ("rows", "coupled")),
    ("time", "columns", "floor", 1.05),
    *(("time", name, "lora", 0.82) for name in ("rows", "columns", "coupled")),
    *(("time", f"{name}+recompute", "floor", 1.06) for name in ("rows", "columns", "coupled")),
    *(("kept", f"{name}+recompute", "lora", 0.55) for name in ("rows", "columns", "coupled")),
    *(("kept_in_blocks", f"{name}+recompute", "lora", 0.55) for name in ("rows", "columns", "coupled")),
    *(("extra", name, "shira", 0.05) for name in ("rows", "columns", "coupled")),
    *(("state", name, "shira", 0.05) for name in ("rows", "columns", "coupled")),
    *(("flops_over_formula", name, None, 1.01) for name in ("rows", "columns", "coupled")),
)

RATIOS = {
    "time / floor": ("time", "floor"),
    "time / lora": ("time", "lora"),
    "flops / floor": ("flops", "floor"),
    "in blocks / lora": ("kept_in_blocks", "lora"),
}
SIZES = ("kept", "kept_in_blocks", "extra", "peak", "file")


def base_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """The frozen model that all methods start from; the output of its embeddings asks for a gradient."""
    settings = CONFIGS[options.config] | ({"num_hidden_layers": options.layers} if options.layers else {})
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            model = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False, use_cache=False))
    finally:
        torch.set_default_dtype(dtype)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


class Setup:
    """A method at work: its model, its optimizer and one batch for all its steps."""

    def __init__(self, name: str, base: nn.Module, batch: Tensor) -> None:
        self.model = METHODS[name].build(base)
        self.trains_base = METHODS[name].trains_base
        self.batch = batch
        self.trained = [part for part in self.model.parameters() if part.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if self.trained else None

    def loss(self, batch: Tensor | None = None) -> Tensor:
        """Of a forward pass."""
        batch = self.batch if batch is None else batch
        return self.model(input_ids=batch, labels=batch).loss

    def step(self) -> None:
        """One training step."""
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], device: str) -> float:
    """The process's CPU time, or the GPU's time between two events."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.process_time()
    work()
    return time.process_time() - started


# ------------------------------------------------------------------------------------------------- bytes and FLOPs


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """What a tensor keeps in memory; a sparse one has two."""
    parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
    return [part.untyped_storage() for part in parts]


class _Kept:
    """A tensor that autograd keeps, and whether a block asked for it."""

    def __init__(self, tensor: Tensor, in_blocks: bool) -> None:
        self.tensor, self.in_blocks = tensor, in_blocks


def kept(setup: Setup, batch: Tensor | None = None) -> tuple[int, int]:
    """Bytes that autograd holds after the forward pass, each storage once, without parameters; those of blocks."""
    found: WeakSet[_Kept] = WeakSet()
    inside = False

    def pack(tensor: Tensor) -> _Kept:
        result = _Kept(tensor.detach(), inside)  # an output that its own graph keeps would never be freed
        found.add(result)
        return result

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    body = setup.model.get_decoder() if not isinstance(setup.model, PeftModel) else setup.model.model.get_decoder()
    handles = [body.layers[0].register_forward_pre_hook(enter), body.layers[-1].register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = setup.loss(batch)
    for handle in handles:
        handle.remove()
    own = {part.untyped_storage().data_ptr() for part in setup.model.parameters()}
    everything, blocks = {}, {}
    for saved in found:
        for storage in storages(saved.tensor):
            if storage.data_ptr() not in own:
                everything[storage.data_ptr()] = storage.nbytes()
                if saved.in_blocks:
                    blocks[storage.data_ptr()] = storage.nbytes()
    del loss
    return sum(everything.values()), sum(blocks.values())


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in an attribute: itself, or in containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name, None) for field in dataclasses.fields(value)])


def held(model: nn.Module) -> dict[int, int]:
    """Storage -> bytes of every tensor that the model's modules hold: parameters, buffers, or plain attributes."""
    values = [value for module in model.modules() for value in vars(module).values()]
    values += [part for module in model.modules() for part in module._parameters.values()]
    return {storage.data_ptr(): storage.nbytes() for tensor in _tensors(values) for storage in storages(tensor)}


def state(setup: Setup, base: nn.Module) -> int:
    """Bytes that the method's model holds besides the weights of a base model and those it trains, once each."""
    trained = {part.untyped_storage().data_ptr() for part in setup.trained}
    others = sum(size for pointer, size in held(setup.model).items() if pointer not in trained)
    frozen = sum(part.nbytes for part in base.parameters() if not setup.trains_base)
    return others - frozen - sum(part.nbytes for part in base.buffers())


def matrix_flops(work: Callable[[], object]) -> int:
    """FLOPs of matrix products, without those inside of attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if str(operator) in ("aten.mm", "aten.addmm", "aten.bmm"))


def expected_flops(setup: Setup) -> int:
    """``(4 + 2δ) P`` a token: P weights of linear layers, used forward and for the input's gradient, δ trained."""
    weights = sum(part.numel() for name, part in setup.model.named_parameters() if is_base_matrix(name, part))
    trained = sum(part.numel() for part in setup.trained)
    return (4 * weights + 2 * trained) * setup.batch.numel()


def is_base_matrix(name: str, part: Tensor) -> bool:
    """Whether a parameter is the weight of one of the base model's linear layers."""
    return not part.requires_grad and part.ndim == 2 and "embed_tokens" not in name and "lora_" not in name


def peak(setup: Setup, device: str) -> int:
    """Bytes of torch's allocations at the highest moment of a step, above those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        setup.step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        setup.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def adapter_file(model: nn.Module) -> int | None:
    """Bytes of the saved adapter; None for a method without one."""
    if not isinstance(model, PeftModel):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


# ------------------------------------------------------------------------------------------------- all of it


def sizes(name: str, base: nn.Module, batch: Tensor, device: str) -> dict[str, Any]:
    """Everything about a method that is no time."""
    setup = Setup(name, base, batch)
    setup.step()
    kept_bytes, in_blocks = kept(setup)
    twice, _ = kept(setup, torch.cat([batch, batch]))
    dense = max(0, 2 * kept_bytes - twice)
    flops = matrix_flops(lambda: setup.loss().backward())
    return {
        "trainable_parameters": sum(part.numel() for part in setup.trained),
        "kept": kept_bytes,
        "kept_in_blocks": in_blocks,
        "dense": dense,
        "state": state(setup, base),
        "extra": state(setup, base) + dense,
        "flops": flops,
        "flops_over_formula": flops / expected_flops(setup),
        "peak": peak(setup, device),
        "file": adapter_file(setup.model),
    }


def times(setups: dict[str, Setup], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of a step, by method and round; the methods take turns in a new order each round."""
    found: dict[str, list[float]] = {name: [] for name in setups}
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        order = list(setups)
        shuffle(order)
        for name in order:
            spent = seconds(setups[name].step, device)
            if number:  # the first round warms up
                found[name].append(spent)
    return found


def relative(results: dict[str, dict[str, Any]], quantity: str, name: str, other: str | None) -> float | None:
    """A quantity of a method over that of another, times round by round; None where one of them was not run."""
    if name not in results or (other is not None and other not in results):
        return None
    if other is None:
        return float(results[name][quantity])
    if quantity == "time":
        return statistics.median(a / b for a, b in zip(results[name]["time"], results[other]["time"], strict=True))
    return float(results[name][quantity] / results[other][quantity])


def print_results(results: dict[str, dict[str, Any]]) -> None:
    """The table, and what was promised beside what was found."""
    mib = 2**20
    columns = ("method", "trained", *RATIOS, *SIZES)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, found in results.items():
        ratios = [relative(results, quantity, name, other) for quantity, other in RATIOS.values()]
        cells = [name, f"{found['trainable_parameters']:,}"]
        cells += ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        cells += ["" if found[size] is None else f"{found[size] / mib:.2f}" for size in SIZES]
        print(f"| {' | '.join(cells)} |")
    print("\nsizes in MiB, peak above the state before the step\n")
    for quantity, name, other, most in GOALS:
        if (ratio := relative(results, quantity, name, other)) is not None:
            to = f" / {other}" if other else ""
            print(f"{'met   ' if ratio <= most else 'MISSED'} {quantity:18} {name}{to}: {ratio:.3f} (goal {most})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--config", default="tiny", choices=list(CONFIGS))
    parser.add_argument("--layers", type=int, help="blocks; by default all of the configuration's")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = base_model(options)
    torch.manual_seed(1)
    batch = torch.randint(0, base.config.vocab_size, (options.examples, options.tokens), device=options.device)
    results = {name: sizes(name, base, batch, options.device) for name in options.methods}
    setups = {name: Setup(name, base, batch) for name in options.methods}
    for name, spent in times(setups, options.rounds, options.device).items():
        results[name]["time"] = spent
    print_results(results)
    if options.out is not None:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread"
        write_json(options.out, {"device": device, "settings": settings, "versions": versions(), "methods": results})


if __name__ == "__main__":
    main()
