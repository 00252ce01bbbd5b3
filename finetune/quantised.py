"""A linear layer with a packed weight, of 4 or 8 bits, of which some rows or columns are trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..quant.layers import dequantise
from .layer import Linear


class QuantisedLinear(Linear):
    """bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``. Adapters act apart: a packed weight is never written to."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if hasattr(base_layer, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16 a forward pass in evaluation mode would repack the weight for good; what is
            # dequantised from it afterwards, for the gradient too, is garbage.
            base_layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        super().__init__(base_layer, *args, **kwargs)

    def matrix(self) -> Tensor:
        """The dequantised weight `(out_features, in_features)`, fp32; a copy."""
        return dequantise(self.base_layer)

    def can_hold(self, adapter_names: list[str]) -> bool:
        """False: the adapters act apart."""
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused, as quantising the merged weight again would lose most of the adapter.

        Raises:
            InputError: always.
        """
        raise InputError("the base is quantised, to merge would round the adapter away: merge it into the full model")
