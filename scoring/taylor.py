"""First-order Taylor importance from exact gradients, streamed: a weight's gradient is reduced and freed at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from tqdm import tqdm

from ..data import Batch
from ..records import AxisTensors
from .criteria import Measurement, add_into, checked_loss, combined, only_trainable, reduce_weight, register


@register
@dataclass(frozen=True)
class Taylor:
    """``s_i = mean_b Σ_j |w_ij · g_ij(b)|`` with g(b) the gradient of batch b's mean loss.

    (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8, summed over a row or column.)
    The absolute value is taken per batch, which is what lets a gradient be reduced and freed at once: the peak is
    that of a backward pass with frozen weights plus one weight's gradient.
    """

    name: ClassVar[str] = "taylor"
    needs_data: ClassVar[bool] = True

    def measure(
        self, model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], seed: int
    ) -> Measurement:
        """One forward and one backward pass a batch; even and odd batches make the two halves."""
        halves: tuple[AxisTensors, AxisTensors] = ({}, {})
        half = halves[0]

        def reduce_gradient(name: str, weight: Tensor) -> None:
            assert weight.grad is not None
            add_into(half, name, reduce_weight((weight.detach().float() * weight.grad.float()).abs()))
            weight.grad = None

        weights = [module.weight for module in modules.values()]
        with only_trainable(model, weights):
            hooks = [
                module.weight.register_post_accumulate_grad_hook(
                    lambda weight, name=name: reduce_gradient(name, weight)
                )
                for name, module in modules.items()
            ]
            try:
                for number, batch in enumerate(tqdm(batches, desc="taylor", disable=None, delay=2)):
                    half = halves[number % 2]
                    inputs = {key: value.to(weights[0].device) for key, value in batch.items()}
                    checked_loss(model(**inputs, use_cache=False).loss, number).backward()
            finally:
                for hook in hooks:
                    hook.remove()
        scores, means = combined(halves, ((len(batches) + 1) // 2, len(batches) // 2))
        return Measurement(scores, means, forward_passes=len(batches), backward_passes=len(batches))
