"""Weights times activations (Wanda): forward passes only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..experts import tokens_of
from ..ranks import progress
from ..records import AxisTensors
from .averages import summed_tables
from .criteria import Measurement, Task, register
from .weights import CONVOLUTIONS, Weight

Squares = dict[str, Tensor]
"""Module name -> squared norm of each of its input features, float32 ``(in_features,)``."""


@register
@dataclass(frozen=True)
class Wanda:
    """``s_i = Σ_j |w_ij| · ‖x_j‖₂`` with x_j input feature j of the layer over all calibration tokens.

    (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, eq. 1,
    summed over a row; the score of column j is its part ``Σ_i |w_ij| · ‖x_j‖₂``.) Squared norms are added up in
    float32 whatever the model's dtype. Padding, where the batch's ``attention_mask`` is 0, does not count. A half's
    norms are those of its own tokens: smaller than the whole's.

    Of a convolution x_j is input channel j over all examples and positions, the same for every weight of a kernel:
    positions that the kernel's stride or the border leaves out are counted too. The inputs of an embedding are
    one-hot: ‖x_j‖ is the root of how often token j occurs.
    """

    name: ClassVar[str] = "wanda"
    needs_data: ClassVar[bool] = True

    def measure(self, task: Task) -> Measurement:
        """One forward pass a batch; even and odd batches make the two halves."""
        halves: tuple[Squares, Squares] = ({}, {})
        with torch.inference_mode():
            for number in progress(range(len(task.batches)), self.name):
                with norms_added(task.weights, task.batches[number].get("attention_mask"), halves[number % 2]):
                    task.loss(number)
        columns = [{name: {"column": squares} for name, squares in half.items()} for half in halves]
        first, second = (
            {name: axes["column"] for name, axes in half.items()}
            for half in summed_tables(columns, task.weights, ("column",))
        )
        every = {name: sum(half[name] for half in (first, second) if name in half) for name in first | second}
        passes = len(task.batches)
        scores = _scores(task.weights, every)  # type: ignore[arg-type]
        if passes == 1:
            return Measurement(scores, forward_passes=passes)
        return Measurement(
            scores, (_scores(task.weights, first), _scores(task.weights, second)), forward_passes=passes
        )


def _scores(weights: Mapping[str, Weight], squares: Squares) -> AxisTensors:
    """Row and column scores; zeros for a layer that no token came through."""
    return {
        name: weight.reduce(weight.values().abs().mul_(weight.by_column(squares[name].sqrt())))
        if name in squares
        else {"row": torch.zeros(weight.out_features), "column": torch.zeros(weight.in_features)}
        for name, weight in weights.items()
    }


@contextmanager
def norms_added(weights: Mapping[str, Weight], importance: Tensor | None, squares: Squares) -> Iterator[None]:
    """Within it the squared norms of every layer's input features are added to `squares`."""

    def hook(weight: Weight) -> Callable[[nn.Module, Any], None]:
        def add(_: nn.Module, inputs: Any) -> None:
            found = squared_norms(weight, inputs[0], importance)
            squares[weight.name] = squares[weight.name] + found if weight.name in squares else found

        return add

    with ExitStack() as stack:
        for weight in weights.values():
            stack.callback(weight.module.register_forward_pre_hook(hook(weight)).remove)
        yield


def squared_norms(weight: Weight, inputs: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared norm of each input feature, ``(in_features,)``.

    Args:
        weight: of the layer.
        inputs: of the layer: ``(…, in_features)``, of a convolution ``(examples, in_features, positions…)``, of an
            embedding token ids.
        importance: ``(examples, tokens)``, how much each token counts: a mask, 0 where there is padding, or any
            weights of the sum of squares. Looked at where the layer's inputs are such tokens.
    """
    if isinstance(weight.module, nn.Embedding):
        if importance is not None and inputs.ndim == 2 and inputs.shape == (1, importance.shape[1]):
            inputs = inputs.expand(importance.shape)  # positions, the same for every example
        tokens, counts = _counting(inputs, importance)
        return torch.bincount(tokens, counts, minlength=weight.in_features).float()
    if isinstance(weight.module, CONVOLUTIONS):
        channels = inputs.movedim(-1 - len(weight.module.kernel_size), -1)
        return channels.flatten(0, -2).float().square().sum(dim=0)
    tokens, counts = _counting(inputs, importance, inputs.shape[-1])
    return counts @ tokens.float().square()


def _counting(inputs: Tensor, importance: Tensor | None, *feature: int) -> tuple[Tensor, Tensor]:
    """The tokens that count in one row, ``(tokens, *feature)``, and how much each does, ``(tokens,)``."""
    routed = tokens_of(inputs)
    if importance is not None and routed is not None and routed[1] == importance.numel():
        importance = importance.flatten()[routed[0].to(importance.device)].unsqueeze(0)
    tokens = inputs.reshape(-1, *feature)
    shape = inputs.shape[: inputs.ndim - len(feature)]
    if importance is None or importance.ndim != 2 or shape not in (importance.shape, (importance.numel(),)):
        return tokens, torch.ones(len(tokens), device=inputs.device)
    counts = importance.flatten().to(inputs.device, torch.float32)
    return tokens[counts != 0], counts[counts != 0]
