"""Taylor importance with the head's gradient in place of every block's: one block's graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import models
from ..errors import InputError
from ..ranks import progress
from .averages import HalfMeans
from .blocks import Forward, blocks_of, hidden_states, outside, overridden, replaced
from .criteria import Measurement, Task, register
from .gradients import only_trainable, received, require_gradients
from .weights import Weight


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
        blocks_of(task.model, self.name)
        means, number = HalfMeans(), 0

        def receive(weight: Weight, gradient: Tensor) -> None:
            means.add(number, weight.name, weight.reduce((weight.values() * gradient.float()).abs()))

        weights = task.weights.values()
        with only_trainable(task.model, weights), received(weights, receive):
            for number in progress(range(len(task.batches)), self.name):
                _run_blocks(task, number, _head_gradient(task, number))
        passes = len(task.batches)
        means.reduce_over_ranks(task.weights)
        scores, halves = means.means(passes)
        return Measurement(scores, halves, forward_passes=2 * passes, backward_passes=passes)


def _head_gradient(task: Task, number: int) -> Tensor:
    """∂loss/∂h_L, shaped like the last block's output; the head's weights get their gradients on the way."""
    last = list(models.layers(task.model).values())[-1]
    ends: list[Tensor] = []

    def wrap(_: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            hidden = hidden_states(output)
            ends.append(hidden.detach().requires_grad_())
            torch.set_grad_enabled(True)  # until the no_grad below ends
            return replaced(output, ends[-1])

        return run

    with torch.no_grad(), overridden([last], wrap), _behind_blocks(task) as reached:
        loss = task.loss(number)
    if lost := next((name for name in outside(task.weights, models.layers(task.model)) if name not in reached), None):
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

    def wrap(_: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            if quantised:  # nothing before a quantised layer may require gradients: give the graph a beginning
                args, kwargs = require_gradients(task.model, args, kwargs)
            with torch.enable_grad():
                output = forward(*args, **kwargs)
            hidden = hidden_states(output)
            if hidden.shape != gradient.shape:
                raise InputError("direct-taylor needs blocks of one shape: use --criterion taylor")
            if hidden.requires_grad:  # some of the block's weights are scored
                hidden.backward(gradient.to(hidden.device))
            return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)

        return run

    with torch.no_grad(), overridden(models.layers(task.model).values(), wrap):
        task.loss(number)


@contextmanager
def _behind_blocks(task: Task) -> Iterator[set[str]]:
    """Within it, the weights outside the blocks that are used while gradients are enabled are noted by name."""
    names: set[str] = set()

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda *_: names.add(name) if torch.is_grad_enabled() else None

    with ExitStack() as stack:
        for name in outside(task.weights, models.layers(task.model)):
            stack.callback(task.weights[name].module.register_forward_pre_hook(note(name)).remove)
        yield names
