"""Exact gradients one weight at a time: each is handed on the moment it is complete, and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import models
from .blocks import overridden
from .weights import Weight

Receiver = Callable[[Weight, Tensor], None]
"""Called with a weight and its gradient, in the layout of :meth:`Weight.values`."""


@contextmanager
def streamed(model: nn.Module, weights: Mapping[str, Weight], receive: Receiver) -> Iterator[None]:
    """Within it, every backward pass hands each weight's gradient to `receive` and frees it.

    A full weight gets its gradient from autograd; a quantised one has none there: its gradient is computed from its
    layer's input and output gradient. The blocks' activations are recomputed in the backward pass, so that the peak is
    that of a forward pass, the blocks' inputs, one block's activations and one weight's gradient.
    """

    with ExitStack() as stack:
        stack.enter_context(only_trainable(model, weights.values()))
        stack.enter_context(overridden(models.layers(model).values(), _checkpointed))
        stack.enter_context(received(weights.values(), receive))
        if any(weight.is_quantised for weight in weights.values()):
            # Nothing before the first quantised layer may require gradients: give the graph a beginning.
            first = next(iter(models.layers(model).values()), model)
            stack.callback(first.register_forward_pre_hook(require_gradients, with_kwargs=True).remove)
        yield


@contextmanager
def received(weights: Iterable[Weight], receive: Receiver) -> Iterator[None]:
    """Within it, whatever graph is run backward, each weight's gradient is handed to `receive` and freed."""
    with ExitStack() as stack:
        sharing: dict[nn.Parameter, list[Weight]] = {}  # an embedding and a head may be one parameter
        for weight in weights:
            if weight.is_quantised:
                stack.callback(weight.module.register_forward_hook(_tapped(weight, receive)).remove)
            else:
                sharing.setdefault(weight.parameter, []).append(weight)
        for parameter, owners in sharing.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(_handing_on(owners, receive)).remove)
        yield


def _handing_on(owners: Sequence[Weight], receive: Receiver) -> Callable[[Tensor], None]:
    def hand_on(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for weight in owners:
            receive(weight, parameter.grad)
        parameter.grad = None

    return hand_on


@contextmanager
def only_trainable(model: nn.Module, weights: Iterable[Weight]) -> Iterator[None]:
    """Within it exactly the full ones among `weights` require gradients; then flags and gradients are as before."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    wanted = {weight.parameter for weight in weights if not weight.is_quantised}
    for parameter in before:
        parameter.requires_grad_(parameter in wanted)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _checkpointed(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _WeightGradient(torch.autograd.Function):
    """The identity on a layer's output; its backward pass hands the layer's weight gradient to a receiver."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight: Weight, receive: Receiver) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.receive = weight, receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.receive(ctx.weight, gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float())
        return gradient, None, None, None


def _tapped(weight: Weight, receive: Receiver) -> Callable[..., Tensor]:
    return lambda _, inputs, output: _WeightGradient.apply(output, inputs[0].detach(), weight, receive)


def require_gradients(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: what comes in becomes the beginning of the graph."""

    def required(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_() if floating else value

    return tuple(required(value) for value in args), {name: required(value) for name, value in kwargs.items()}
