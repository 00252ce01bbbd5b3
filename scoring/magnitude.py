"""Weight magnitude: needs no data."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .criteria import Measurement, Task, register


@register
@dataclass(frozen=True)
class Magnitude:
    """``s_i = Σ_j |w_ij|^p`` (Li et al. 2017, "Pruning Filters for Efficient ConvNets"; Torch-Pruning's local score).

    Attributes:
        p: 1 or 2.
    """

    p: int = 2

    name: ClassVar[str] = "magnitude"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise InputError(f"criterion magnitude: p={self.p} is not offered, use 1 or 2")

    def measure(self, task: Task) -> Measurement:
        """Score every weight; no batch is looked at."""
        return Measurement(
            {name: weight.reduce(weight.values().abs() ** self.p) for name, weight in task.weights.items()}
        )
