"""First-order Taylor importance from exact gradients, streamed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ranks import progress
from .averages import HalfMeans
from .criteria import Measurement, Task, register
from .gradients import streamed
from .weights import Weight


@register
@dataclass(frozen=True)
class Taylor:
    """``s_i = mean_b Σ_j |w_ij · g_ij(b)|`` with g(b) the gradient of batch b's mean loss; or, with `multivariable`,
    ``mean_b |Σ_j w_ij · g_ij(b)|``, the change of the loss when the row vanishes, to first order.

    (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8, summed over a row or column;
    both forms and the name of the setting are Torch-Pruning's.) The absolute value is taken per batch, which is what
    lets a gradient be reduced and freed at once.

    Attributes:
        multivariable: sum before taking the absolute value.
    """

    multivariable: bool = False

    name: ClassVar[str] = "taylor"
    needs_data: ClassVar[bool] = True

    def measure(self, task: Task) -> Measurement:
        """One forward and one backward pass a batch; even and odd batches make the two halves."""
        means, number = HalfMeans(), 0

        def receive(weight: Weight, gradient: Tensor) -> None:
            product = weight.values() * gradient.float()
            values = weight.reduce(product, Tensor.abs) if self.multivariable else weight.reduce(product.abs())
            means.add(number, weight.name, values)

        with streamed(task.model, task.weights, receive):
            for number in progress(range(len(task.batches)), self.name):
                task.loss(number).backward()
        passes = len(task.batches)
        means.reduce_over_ranks(task.weights)
        scores, halves = means.means(passes)
        return Measurement(scores, halves, forward_passes=passes, backward_passes=passes)
