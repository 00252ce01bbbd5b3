"""Reading the weights of quantised layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a 4-bit or 8-bit linear layer of bitsandbytes."""
    return type(module).__module__.startswith("bitsandbytes.") and type(module).__name__ in (
        "Linear4bit",
        "Linear8bitLt",
    )


def dequantise(module: Any) -> Tensor:
    """The weight that a quantised layer computes with, float32 ``(out_features, in_features)``."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if type(module).__name__ == "Linear4bit":
        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    data, scales = module.weight.data, module.weight.SCB
    return int8_vectorwise_dequant(data, module.state.SCB if scales is None else scales).float()
