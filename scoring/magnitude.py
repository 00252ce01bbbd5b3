"""Weight magnitude: needs no data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..data import Batch
from ..errors import InputError
from .criteria import Measurement, reduce_weight, register


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

    def measure(
        self, model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], seed: int
    ) -> Measurement:
        """Score every weight; `batches` are not looked at."""
        return Measurement(
            {name: reduce_weight(module.weight.detach().float().abs() ** self.p) for name, module in modules.items()}
        )
