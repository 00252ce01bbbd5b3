"""Random scores: the control that every other criterion has to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..data import Batch
from .criteria import Measurement, register


@register
@dataclass(frozen=True)
class Random:
    """``s_i ~ U(0, 1)``, independent for every row and column."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def measure(
        self, model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], seed: int
    ) -> Measurement:
        """Draw from one seeded generator, in the order of `modules`."""
        generator = torch.Generator().manual_seed(seed)
        return Measurement(
            {
                name: {
                    "row": torch.rand(module.out_features, generator=generator),
                    "column": torch.rand(module.in_features, generator=generator),
                }
                for name, module in modules.items()
            }
        )
