"""How much each row moves a reading, told apart from probes that move all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

ITERATIONS = 8
RIDGE = 1e-3
COLUMNS = 1024
JUMP = 100
"""A reading whose square is so many times that of the upper quartile is no response but a jump."""


def row_variances(patterns: Tensor, readings: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Maximum-likelihood estimate of the rows' mean squared effects.

    Probe k moves row i by the sign ``p_ki``, so that reading t of it is ``Σ_i p_ki · r_it``, r_it the effect of row i
    alone. Taking r_it as independent and normal with variance v_i over the readings, their second moments S over
    probes are ``C = P diag(v) Pᵀ`` on average, and the likelihood's fixed point is

    ``v_i ← v_i · (p_iᵀ C⁻¹ S C⁻¹ p_i) / (p_iᵀ C⁻¹ p_i)``

    (MacKay's update of sparse Bayesian learning, for many readings of one support: Wipf & Rao 2007, "An Empirical
    Bayesian Strategy for Solving the Simultaneous Sparse Approximation Problem", eq. 19). Where there are fewer probes
    than rows, rows with large effects are found first, and what they explain no longer disturbs the others.

    Args:
        patterns: signs ``(probes, rows)``, of any dtype; few columns of them at a time are made float32.
        readings: ``(probes, readings)``, of any dtype likewise.
        iterations: of the fixed point, from equal variances.

    Returns:
        ``(rows,)``, non-negative; zeros if nothing was read.
    """
    probes, rows = patterns.shape
    moments = sum(part.float() @ part.float().T for part in readings.split(COLUMNS, dim=1)) / readings.shape[1]
    power = float(moments.diagonal().mean())
    variances = torch.full((rows,), power / rows, device=patterns.device)
    if power == 0:
        return variances
    ridge = RIDGE * power * torch.eye(probes, device=patterns.device)
    for _ in range(iterations):
        parts = zip(patterns.split(COLUMNS, dim=1), variances.split(COLUMNS), strict=True)
        covariance = ridge + sum((signs.float() * part) @ signs.float().T for signs, part in parts)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed):
            break  # readings of sizes too different for float32: this is as far as it goes
        inverse = torch.cholesky_inverse(factor)
        expected = _forms(patterns, inverse)
        observed = _forms(patterns, inverse @ moments @ inverse)
        updated = variances * (observed / expected).clamp(min=0)
        if not bool(updated.isfinite().all()):
            break
        variances = updated
    return variances


def _forms(patterns: Tensor, matrix: Tensor) -> Tensor:
    """``p_iᵀ matrix p_i`` of every column p_i, ``(rows,)``."""
    parts = (part.float() for part in patterns.split(COLUMNS, dim=1))
    return torch.cat([(part * (matrix @ part)).sum(dim=0) for part in parts])


def without_jumps(readings: Tensor, positions: int) -> Tensor:
    """The readings, in place, of which those that jump are cut down to the largest that is none.

    Where a router sends a token to another expert, what is read at the token changes by far more than what is
    differentiable about it, and would drown all the rest. Other readings stay as they are, bit for bit.

    Args:
        readings: ``(probes, positions · sums)``.
        positions: how many; each is looked at by itself, over the probes.
    """
    by_position = readings.view(len(readings), positions, -1)
    squares = torch.linalg.vector_norm(by_position, dim=2, dtype=torch.float32).square() / by_position.shape[2]
    most = JUMP * squares.kthvalue(ceil(0.75 * len(readings)), dim=0).values  # few probes make a token jump
    jumps = (squares > most) & (most > 0)
    if bool(jumps.any()):
        by_position *= torch.where(jumps, (most / squares).sqrt(), 1.0).unsqueeze(2).to(readings.dtype)
    return readings


def reliability(first: Tensor, second: Tensor) -> float:
    """Share of what an estimate says that is no noise, 0 to 1, from two independent halves of it.

    Args:
        first: from one half of the probes, any shape, mean 0.
        second: from the other half.

    Returns:
        the halves' correlation r as that of the whole, ``2r / (1 + r)`` (Spearman 1910; Brown 1910); 0 if negative.
    """
    scale = float(first.norm() * second.norm())
    correlation = max(0.0, float((first * second).sum()) / scale) if scale else 0.0
    return 2 * correlation / (1 + correlation)


def random_signs(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """±1 with equal probability, on the CPU: the same for one seed whatever the device."""
    return (torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1).to(dtype)
