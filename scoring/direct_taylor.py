"""Taylor importance with the head's gradient in place of every block's: one block's graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from .. import models
from ..errors import InputError
from .averages import HalfMeans
from .criteria import Measurement, Task, register
from .gradients import only_trainable, overridden, received, require_gradients
from .weights import Weight

Forward = Callable[..., Any]


@register
@dataclass(frozen=True)
class DirectTaylor:
    """``s_i = mean_b Σ_j |w_ij · d_ij(b)|``, Taylor's score with a direct gradient d.

    With the model seen as a residual stream h_0, …, h_L of hidden states, ``d = ∂h_l/∂w · ∂loss/∂h_L`` for a weight of
    block l: the head's gradient is carried straight down the stream, as if every later block were the identity, where
    backpropagation would have ∂loss/∂h_l. Exact for the last block and the head, and worse the more the later blocks
    do. (Skipping the layers in between: Nøkland 2016, "Direct Feedback Alignment Provides Learning in Deep Neural
    Networks"; here the feedback is the identity, which the residual connections are.) The absolute value is taken per
    batch.

    No graph reaches beyond one block, so the peak is inference plus one block's graph, whatever the depth.
    """

    name: ClassVar[str] = "direct-taylor"
    needs_data: ClassVar[bool] = True

    def measure(self, task: Task) -> Measurement:
        """Two forward passes and one backward pass a batch; even and odd batches make the two halves.

        The first forward pass ends in the head's backward pass; in the second one each block is run backward as soon
        as it has run, which together makes one backward pass of the model.
        """
        if not models.layers(task.model):
            raise InputError("direct-taylor needs a model of blocks, this one has none: use --criterion taylor")
        means, number = HalfMeans(), 0

        def receive(weight: Weight, gradient: Tensor) -> None:
            means.add(number, weight.name, weight.reduce((weight.values() * gradient.float()).abs()))

        weights = task.weights.values()
        with only_trainable(task.model, weights), received(weights, receive):
            for number in tqdm(range(len(task.batches)), desc=self.name, disable=None, delay=2):
                _run_blocks(task, number, _head_gradient(task, number))
        passes = len(task.batches)
        scores, halves = means.means(passes)
        return Measurement(scores, halves, forward_passes=2 * passes, backward_passes=passes)


def _head_gradient(task: Task, number: int) -> Tensor:
    """∂loss/∂h_L, shaped like the last block's output; the head's weights get their gradients on the way."""
    last = list(models.layers(task.model).values())[-1]
    ends: list[Tensor] = []

    def wrap(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            hidden = _hidden_states(output)
            ends.append(hidden.detach().requires_grad_())
            torch.set_grad_enabled(True)  # until the no_grad below ends
            return ends[-1] if output is hidden else (ends[-1], *output[1:])

        return run

    with torch.no_grad(), overridden([last], wrap), _behind_blocks(task) as reached:
        loss = task.loss(number)
    if lost := next((name for name in _outside_blocks(task) if name not in reached), None):
        raise InputError(
            f"direct-taylor has no signal for {lost}, it is neither in a block nor behind the last one: "
            "leave it out, or use --criterion taylor"
        )
    if loss.requires_grad:
        loss.backward()
    if not ends or ends[-1].grad is None:
        raise InputError("direct-taylor: the loss does not come from the model's last block: use --criterion taylor")
    return ends[-1].grad


def _run_blocks(task: Task, number: int, gradient: Tensor) -> None:
    """Run the model once more, each block backward from `gradient` as soon as it has run."""
    quantised = any(weight.is_quantised for weight in task.weights.values())

    def wrap(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            if quantised:  # nothing before a quantised layer may require gradients: give the graph a beginning
                args, kwargs = require_gradients(task.model, args, kwargs)
            with torch.enable_grad():
                output = forward(*args, **kwargs)
            hidden = _hidden_states(output)
            if hidden.shape != gradient.shape:
                raise InputError("direct-taylor needs blocks of one shape: use --criterion taylor")
            if hidden.requires_grad:  # some of the block's weights are scored
                hidden.backward(gradient.to(hidden.device))
            return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)

        return run

    with torch.no_grad(), overridden(models.layers(task.model).values(), wrap):
        task.loss(number)


def _hidden_states(output: Any) -> Tensor:
    """What a block hands on: its output, or the first of its outputs."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise InputError(f"direct-taylor: the blocks return a {type(output).__name__}: use --criterion taylor")
    return hidden


def _outside_blocks(task: Task) -> list[str]:
    blocks = tuple(f"{name}." for name in models.layers(task.model))
    return [name for name in task.weights if not f"{name}.".startswith(blocks)]


@contextmanager
def _behind_blocks(task: Task) -> Iterator[set[str]]:
    """Within it, the weights outside the blocks that are used while gradients are enabled are noted by name."""
    names: set[str] = set()

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda *_: names.add(name) if torch.is_grad_enabled() else None

    with ExitStack() as stack:
        for name in _outside_blocks(task):
            stack.callback(task.weights[name].module.register_forward_pre_hook(note(name)).remove)
        yield names
