"""What is read off a block's output: random sums of its features, where and in what the loss is sensitive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

READINGS = 2**22
"""Numbers read off a block in all its probes on a batch, at most about so many."""
ROUNDINGS = 4
"""A movement of hidden states is at least so many roundings of their dtype in size."""


def visible(size: float, hidden: Tensor) -> float:
    """`size`, relative to the hidden states, or the smallest that their dtype can tell from its own roundings."""
    return max(size, ROUNDINGS * torch.finfo(hidden.dtype).eps)


def by_position(hidden: Tensor) -> Tensor:
    """Hidden states as ``(positions, features)``; those of images are ``(examples, features, height, width)``."""
    return (hidden.movedim(1, -1) if hidden.ndim == 4 else hidden).flatten(0, -2).float()


@dataclass(frozen=True)
class Sensitivity:
    """How sensitive the loss is to the last hidden states.

    Attributes:
        positions: ``(examples, tokens)`` or flat, non-negative, of mean 1 over those that are not 0.
        features: ``(features,)``, non-negative, of mean 1.
    """

    positions: Tensor
    features: Tensor

    def fits(self, flat: Tensor) -> bool:
        """Whether hidden states ``(positions, features)`` have the same positions and features."""
        return flat.shape == (self.positions.numel(), len(self.features))


@dataclass(frozen=True)
class Readout:
    """Reads hidden states.

    Attributes:
        positions: indices of the positions that are read.
        weights: ``(positions, 1)``.
        projection: ``(features, sums)``.
    """

    positions: Tensor
    weights: Tensor
    projection: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """The readings, ``(positions · sums,)``; their squares' mean is that of the weighted hidden states."""
        return (by_position(hidden)[self.positions] @ self.projection * self.weights).flatten()


def readout(sensitivity: Sensitivity, probes: int, generator: torch.Generator) -> Readout:
    """Random sums over the features, ``E[sums²] = Σ features · hidden²``, at the positions with any sensitivity."""
    device, count = sensitivity.features.device, len(sensitivity.features)
    most = READINGS // probes
    weights = sensitivity.positions.flatten()
    positions = weights.argsort(descending=True, stable=True)[:most]
    positions = positions[weights[positions] > 0]
    sums = max(1, min(count, most // max(1, len(positions))))
    projection = torch.randn(count, sums, generator=generator).to(device) * sensitivity.features.sqrt().unsqueeze(1)
    return Readout(positions, weights[positions].sqrt().unsqueeze(1), projection)
