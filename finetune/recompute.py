"""Have a model keep fewer activations: norms, activation functions and gated products are made again when needed.

What a module computes decides, not its class: a *norm* is a layer without layers in it that gives a scaled input's
output, an *activation function* one that treats every number alike, and a *gated product* what lies between the linear
layers of a feed-forward block whose forward pass equals ``down(activation(gate(x)) * up(x))`` bit for bit.

The idea, and why it ends at the floor of what must be kept: norm outputs and down-projection inputs are elementwise in
tensors that autograd keeps anyway. Unlike activation checkpointing no matrix product is computed twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import recipes
from .layer import RowsLayer
from .recipes import elementwise


@dataclass(eq=False)
class Recomputed:
    """A module's forward pass in another form; called in place of `original`, and deep-copied with its module.

    Attributes:
        module: whose forward pass it is.
        original: the module's own bound forward.
        run: called with `original` and the arguments.
    """

    module: nn.Module
    original: Callable[..., Any]
    run: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        return self.run(self.original, *args, **kwargs)


def recompute_activations(model: nn.Module) -> list[str]:
    """Keep what cannot be made again elementwise, in every module whose structure allows it; `model` is changed.

    Values and gradients stay the same. Works for rows and columns and for PEFT's LoRA without dropout; put the adapter
    in first. Trained norms, and modules whose forward something else has replaced, are left as they are.

    Returns:
        The names of the changed modules. :func:`keep_activations` changes them back.
    """
    changed = []
    taken: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in taken:
            continue
        if "forward" in vars(module):
            taken.update(filter(_is_activation, module.children()))  # of a block that is changed already
            continue
        if (gated := _gated(module)) is not None:
            run, activation = gated
            taken.add(activation)
        elif _is_norm(module) or _is_activation(module):
            run = _elementwise
        elif isinstance(module, LoraLayer):
            _recompute_lora(module)
            continue
        else:
            continue
        module.forward = Recomputed(module, module.forward, run)
        changed.append(name)
    return changed


def keep_activations(model: nn.Module) -> None:
    """Undo :func:`recompute_activations`."""
    for module in model.modules():
        for name in ("forward", "_cast_input_dtype"):
            if isinstance(vars(module).get(name), Recomputed):
                delattr(module, name)


# ---------------------------------------------------------------------------------------------- other forward passes


def _elementwise(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    module: nn.Module = original.__self__  # type: ignore[attr-defined]
    if len(args) != 1 or kwargs or any(parameter.requires_grad for parameter in module.parameters()):
        return original(*args, **kwargs)
    return elementwise(original, *args)


def _gated_forward(
    gate: str, up: str, down: str, activation: str, original: Callable[..., Tensor], x: Tensor
) -> Tensor:
    mlp: nn.Module = original.__self__  # type: ignore[attr-defined]
    function = getattr(mlp, activation)
    product = elementwise(lambda a, b: function(a) * b, getattr(mlp, gate)(x), getattr(mlp, up)(x))
    return getattr(mlp, down)(product)


def _fused_forward(
    fused: str, down: str, activation: str, first: bool, original: Callable[..., Tensor], x: Tensor
) -> Tensor:
    mlp: nn.Module = original.__self__  # type: ignore[attr-defined]
    function = getattr(mlp, activation)

    def product(both: Tensor) -> Tensor:
        a, b = both.chunk(2, dim=-1)
        return function(a) * b if first else function(b) * a

    return getattr(mlp, down)(elementwise(product, getattr(mlp, fused)(x)))


def _recompute_lora(layer: LoraLayer) -> None:
    """Have the A matrices keep the recipe of their input, through PEFT's cast to their dtype."""
    assert isinstance(layer, nn.Module)
    for a in layer.lora_A.values():
        if type(a) is nn.Linear and "forward" not in vars(a):
            a.forward = Recomputed(a, a.forward, _lora_a)  # type: ignore[method-assign]
    if "_cast_input_dtype" not in vars(layer):
        layer._cast_input_dtype = Recomputed(layer, layer._cast_input_dtype, _lora_cast)  # type: ignore[method-assign]


def _lora_a(original: Callable[..., Tensor], x: Tensor) -> Tensor:
    a: nn.Linear = original.__self__  # type: ignore[attr-defined]
    return original(x) if a.bias is not None else recipes.linear(x, a.weight)


def _lora_cast(original: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    layer: LoraLayer = original.__self__  # type: ignore[attr-defined]
    return recipes.cast(x, dtype) if layer.cast_input_dtype_enabled else original(x, dtype)


# ---------------------------------------------------------------------------------------------- what a module computes


def _probe(size: int, like: Tensor) -> Tensor:
    """Random numbers `(2, 3, size)`, the same at every call."""
    numbers = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    return numbers.to(like.device, like.dtype if like.dtype.is_floating_point else torch.float32)


@torch.no_grad()
def _result(function: Callable[..., Any], *inputs: Tensor) -> Tensor | None:
    """What `function` gives; None if it takes other arguments or gives something else."""
    try:
        with torch.random.fork_rng(devices=[]):  # dropout
            result = function(*inputs)
    except Exception:  # any error of a foreign module means: it is not what is looked for
        return None
    return result if isinstance(result, Tensor) else None


def _is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises over the last dimension: scaling a token does not change its output."""
    weights = list(module.parameters(recurse=False))
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None or not weights:
        return False
    if any(weight.ndim != 1 or weight.is_meta or len(weight) != len(weights[0]) for weight in weights):
        return False
    x = 1e3 * _probe(len(weights[0]), weights[0])
    once, twice, first = _result(module, x), _result(module, 2 * x), _result(module, x[:1])
    if once is None or twice is None or first is None or once.shape != x.shape:
        return False
    return torch.allclose(once, twice, rtol=1e-2, atol=1e-2) and torch.allclose(first, once[:1], rtol=1e-2, atol=1e-2)


def _has_parts(module: nn.Module) -> bool:
    parts = (module.children(), module.parameters(), module.buffers())
    return any(next(iter(part), None) is not None for part in parts)


def _is_activation(module: nn.Module) -> bool:
    """Whether a module without weights maps every number by itself, and does change them."""
    if _has_parts(module):
        return False
    x = _probe(8, torch.empty(0))
    # In several calls: dropout would differ between them.
    whole, again, part = _result(module, x), _result(module, 1 * x), _result(module, x[..., :3])
    if whole is None or again is None or part is None or whole.shape != x.shape or torch.equal(whole, x):
        return False
    return torch.equal(whole, again) and torch.allclose(whole[..., :3], part, atol=1e-6)


def _linear_children(module: nn.Module) -> list[str]:
    linear = (nn.Linear, Conv1D, BaseTunerLayer)
    return [name for name, child in module.named_children() if isinstance(child, linear)]


def _gated(module: nn.Module) -> tuple[Callable[..., Tensor], nn.Module] | None:
    """Another form of a gated feed-forward block's forward pass, with its activation; None if it is none.

    A form is right if it gives the same bits, in training and in evaluation mode.
    """
    names = _linear_children(module)
    activations = [name for name, child in module.named_children() if _is_activation(child)]
    if len(names) not in (2, 3) or len(activations) != 1:
        return None
    weight = getattr(module, names[0]).weight
    if weight.is_meta:
        return None
    width = _in_features(getattr(module, names[0]))
    x = _probe(width, weight)
    own = _in_both_modes(module, module.forward, x)
    for form in _forms(names, activations[0]):
        if own is not None and _same(own, _in_both_modes(module, partial(form, module.forward), x)):
            return form, getattr(module, activations[0])
    return None


def _forms(names: list[str], activation: str) -> Iterator[Callable[..., Tensor]]:
    if len(names) == 3:
        for gate, up, down in itertools.permutations(names):
            yield partial(_gated_forward, gate, up, down, activation)
    else:
        for (fused, down), first in itertools.product(itertools.permutations(names), (True, False)):
            yield partial(_fused_forward, fused, down, activation, first)


def _in_features(layer: Any) -> int:
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return int(base.nx if isinstance(base, Conv1D) else base.in_features)


def _in_both_modes(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> list[Tensor] | None:
    modes = {child: child.training for child in module.modules()}
    try:
        results = [_result(forward, x) for _ in map(module.train, (True, False))]
    finally:
        for child, training in modes.items():
            child.training = training
            if isinstance(child, RowsLayer):
                child.restore()  # the model may be sharded next
    return None if any(result is None for result in results) else results  # type: ignore[return-value]


def _same(one: list[Tensor], other: list[Tensor] | None) -> bool:
    return other is not None and all(map(torch.equal, one, other))
