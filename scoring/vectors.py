"""Units as vectors of their weights: what a diverse choice compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..experts import submodule
from .competition import Floats
from .groups import ScoredMember
from .weights import Weight, view

WeightMatrix = Callable[[str, str], Tensor]
"""``(module, axis)`` -> its weight, one row or one column a line: float32 ``(units, weights of a unit)``."""


def weight_matrices(model: nn.Module) -> WeightMatrix:
    """The weights of a model, read when they are asked for."""

    def matrix(module: str, axis: str) -> Tensor:
        weight = view(module, submodule(model, module))
        if weight is None:
            raise InputError(f"{module} has no weight with rows and columns: score this model again")
        return lines(weight, axis)

    return matrix


def lines(weight: Weight, axis: str) -> Tensor:
    """One row, or one column, of a weight a line; of a convolution with its kernel, float32 on the CPU."""
    values = weight.values().cpu()
    if values.ndim == 2:
        rows = values.T if weight.transposed else values
        return rows if axis == "row" else rows.T
    if axis == "row":
        return values.flatten(1)
    grouped = values.unflatten(0, (weight.groups, -1))  # (groups, out / groups, in / groups, kernel…)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def unit_vectors(
    members: Sequence[ScoredMember], scores: Floats, count: int, matrix: WeightMatrix, generator: np.random.Generator
) -> Tensor:
    """Each unit as a vector whose direction is that of its weights, and whose squared norm is its score.

    A unit of several members is their slices one after the other, each member's slices scaled to a Frobenius norm of 1
    together. Longer vectors are sketched by a Gaussian projection to ``2 * count + 16`` dimensions.

    Returns:
        float64 ``(units, dims)``.
    """
    dims = 2 * count + 16
    slices = [matrix(member.module, member.axis)[member.index].flatten(1).double() for member in members]
    norms = [float(part.norm()) or 1.0 for part in slices]
    squares = sum(part.square().sum(dim=1) / norm**2 for part, norm in zip(slices, norms, strict=True))
    if sum(part.shape[1] for part in slices) > dims:
        sketch = torch.zeros(len(scores), dims, dtype=torch.float64)
        for part, norm in zip(slices, norms, strict=True):
            projection = generator.standard_normal((part.shape[1], dims)) / (norm * dims**0.5)
            sketch += part @ torch.from_numpy(projection)
    else:
        sketch = torch.cat([part / norm for part, norm in zip(slices, norms, strict=True)], dim=1)
    lengths = torch.as_tensor(squares).sqrt()
    scale = torch.where(lengths > 0, torch.from_numpy(scores).sqrt() / lengths, 0.0)
    return sketch * scale.unsqueeze(1)
