"""Random scores: the control that every other criterion has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .criteria import Measurement, Task, register


@register
@dataclass(frozen=True)
class Random:
    """``s_i ~ U(0, 1)``, independent for every row and column."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def measure(self, task: Task) -> Measurement:
        """Draw from one seeded generator, in the order of the weights."""
        generator = torch.Generator().manual_seed(task.seed)
        return Measurement(
            {
                name: {
                    "row": torch.rand(weight.out_features, generator=generator),
                    "column": torch.rand(weight.in_features, generator=generator),
                }
                for name, weight in task.weights.items()
            }
        )
