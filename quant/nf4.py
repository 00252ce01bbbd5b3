"""4-bit NormalFloat in plain torch: what a 4-bit base makes of a weight, and what it loses.

(Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 and appendix E.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

# The 16 levels of appendix E: quantiles of the standard normal, scaled to [-1, 1], with an exact zero.
LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight in NF4.

    Attributes:
        levels: uint8 ``(blocks, block_size)``, indices into the 16 levels.
        scales: float32 ``(blocks,)``, the largest magnitude of each block.
        shape: of the weight.
    """

    levels: Tensor
    scales: Tensor
    shape: torch.Size


def quantise(weight: Tensor, block_size: int = 64) -> QuantisedWeight:
    """Round each block of `block_size` consecutive weights to the nearest level times the block's largest magnitude.

    Raises:
        InputError: if the number of weights does not divide by `block_size`.
    """
    if weight.numel() % block_size:
        raise InputError(f"a weight of shape {tuple(weight.shape)} does not divide into blocks of {block_size}")
    blocks = weight.detach().float().reshape(-1, block_size)
    scales = blocks.abs().amax(dim=1)
    # as the reference kernels do it: multiply by the reciprocal, which rounds differently from a division
    unit = blocks * torch.where(scales > 0, scales.reciprocal(), 0.0).unsqueeze(1)
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    return QuantisedWeight(torch.bucketize(unit, middles).to(torch.uint8), scales, weight.shape)


def dequantise(quantised: QuantisedWeight) -> Tensor:
    """The weight that a 4-bit base computes with, float32."""
    return (LEVELS[quantised.levels.long()] * quantised.scales.unsqueeze(1)).reshape(quantised.shape)


def residual(weight: Tensor, block_size: int = 64) -> Tensor:
    """``W − dequantise(quantise(W))``, float32: what is lost, and what selected rows can give back."""
    return weight.detach().float() - dequantise(quantise(weight, block_size))
