"""Activations that are made again in the backward pass, from tensors that autograd keeps anyway.

The output of a norm or of an activation function costs next to nothing to compute, but kept for a weight's gradient it
costs as much memory as the output of a matrix product. :func:`elementwise` computes such an output and ties its recipe
to it; a layer that needs it for its own gradient keeps the :class:`Recipe` and the inputs in its place. However many
layers do, it is made again once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ATTRIBUTE = "rowscope_recipe"


class Recipe:
    """How an activation is made from its inputs; keeps no tensor until :meth:`replay`.

    Args:
        run: a function of tensors without side effects and without randomness.
        device_type: of the tensors, whose autocast is remembered.
    """

    def __init__(self, run: Callable[..., Tensor], device_type: str) -> None:
        self.run = run
        self.autocast = (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
        self._replayed: tuple[Tensor, list[Tensor]] | None = None

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The activation with an autograd graph of its own down to leaves, which are the inputs; made once."""
        if self._replayed is None:
            device_type, dtype, enabled = self.autocast
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad(), torch.autocast(device_type, dtype=dtype, enabled=enabled):
                self._replayed = self.run(*leaves), leaves
        return self._replayed

    def forget(self) -> None:
        """Free what :meth:`replay` made."""
        self._replayed = None


def recipe_of(tensor: Tensor) -> tuple[Recipe, tuple[Tensor, ...]] | None:
    """The recipe that makes `tensor`, and its inputs; None if the tensor has to be kept itself."""
    return getattr(tensor, ATTRIBUTE, None)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        return recipe.run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        output, leaves = ctx.recipe.replay(ctx.saved_tensors)
        ctx.recipe.forget()
        wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad[1:], strict=True) if needed]
        # Not torch.autograd.grad: torch's module tracker, which FLOP counters use, raises an error inside of it.
        torch.autograd.backward(output, gradient, inputs=wanted)
        return None, *(leaf.grad for leaf in leaves)


def elementwise(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``run(*inputs)``, of which autograd keeps the inputs alone. Parameters that `run` uses get no gradient."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not any(x.requires_grad for x in inputs):
        return run(*inputs)
    recipe = Recipe(run, inputs[0].device.type)
    output: Tensor = _Elementwise.apply(recipe, *inputs)
    setattr(output, ATTRIBUTE, (recipe, inputs))
    return output


class _RecipeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe, ctx.dtype = recipe, x.dtype
        ctx.save_for_backward(weight, *inputs)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        x = ctx.recipe.replay(inputs)[0].detach().to(ctx.dtype)
        flat = gradient.reshape(-1, weight.shape[0])
        return gradient @ weight, flat.T @ x.reshape(-1, weight.shape[1]), None, *(None for _ in inputs)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ`` with a trained weight, keeping the recipe of `x` instead of `x` if it has one."""
    found = recipe_of(x)
    if found is None or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return torch.nn.functional.linear(x, weight)
    recipe, inputs = found
    return _RecipeLinear.apply(x, weight, recipe, *(tensor.detach() for tensor in inputs))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another dtype, with the recipe of `x`: who keeps it casts what the recipe makes."""
    if x.dtype == dtype:
        return x
    result = x.to(dtype)
    if (found := recipe_of(x)) is not None:
        setattr(result, ATTRIBUTE, found)
    return result
