"""The norm of a row's gradient: what tuning the row gains."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..records import AxisTensors
from .criteria import Measurement, Task, register
from .fisher import Fisher


@register
@dataclass(frozen=True)
class GradientNorm:
    """``s_i = √(mean_b ‖g_i(b)‖₂²)`` with g(b) the gradient of batch b's mean loss.

    To first order, moving row i by a unit step down its gradient lowers the loss by ‖g_i‖: this is what tuning the row
    would gain, whatever the size of its weights. (The Fisher mask of Sung et al. 2021, "Training Neural Networks with
    Fixed Sparse Masks", summed over rows; the growth rule of Evci et al. 2020, "Rigging the Lottery".) The norm of the
    mean gradient would need a whole gradient kept beside the model; the root mean square over batches is streamed.
    """

    name: ClassVar[str] = "gradient-norm"
    needs_data: ClassVar[bool] = True

    def measure(self, task: Task) -> Measurement:
        """One forward and one backward pass a batch; even and odd batches make the two halves."""
        found = Fisher(per="batch", weighted=False).measure(task)
        halves = (_roots(found.halves[0]), _roots(found.halves[1])) if found.halves else ()
        return replace(found, scores=_roots(found.scores), halves=halves)


def _roots(table: AxisTensors) -> AxisTensors:
    return {name: {axis: value.sqrt() for axis, value in axes.items()} for name, axes in table.items()}
