"""The published zero-order estimator: every weight moved at random, one slope of the loss for each probe."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ranks import progress, summed
from ..records import AxisTensors
from .criteria import Measurement, Task
from .weights import Weight


def measure_spsa(task: Task, passes: int, epsilon: float) -> Measurement:
    """``s_i = Σ_j |w_ij · ĝ_ij|`` with the two-sided simultaneous-perturbation estimate of the gradient

    ``ĝ = 1/K Σ_k (L_k(w + εz_k) − L_k(w − εz_k)) / 2ε · z_k``, ``z_k ~ N(0, I)``, both losses on the same batch

    (SPSA: Spall 1992; seed replay: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes"; the
    row score: the zero-order criterion of SPruFT, arXiv 2502.11439). z is never stored: it is drawn again from its
    seed for each sign and for the final sum. The weights are never written to: a layer computes with a temporary.

    With K probes against d weights the cosine between ĝ and the gradient is at most about √(K/d), so the ranking
    is mostly that of the weights' size; ``signal_to_noise`` says how much so.

    Args:
        task: what to score.
        passes: forward passes in all, 2K. Even and odd probes make the two halves; under ``torch.distributed`` the
            ranks share the probes.
        epsilon: size of the perturbation, in units of the weights.
    """
    probes, count = passes // 2, len(task.weights)
    slopes = torch.zeros(probes, dtype=torch.float64)
    first_seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(task.seed)))
    seeds = [[first_seed + probe * count + number for number in range(count)] for probe in range(probes)]
    weights = list(task.weights.values())
    with torch.inference_mode():
        for probe in progress(range(probes), "zo-taylor"):
            losses = []
            for sign in (1.0, -1.0):
                with perturbed(weights, seeds[probe], sign * epsilon):
                    losses.append(task.loss(probe % len(task.batches)).double())
            slopes[probe] = (losses[0] - losses[1]) / (2 * epsilon)
    return _scores(weights, seeds, summed(slopes))


@torch.no_grad()
def _scores(weights: Sequence[Weight], seeds: list[list[int]], slopes: Tensor) -> Measurement:
    """Replay the draws weight by weight, so that one estimated gradient at a time is in memory."""
    scores: AxisTensors = {}
    halves: tuple[AxisTensors, AxisTensors] = ({}, {})
    noise: AxisTensors = {}
    sigma = float(slopes.square().mean().sqrt()) / math.sqrt(len(slopes))
    energy, weights_in_all = 0.0, 0
    for number, weight in enumerate(weights):
        name, size = weight.name, weight.values().abs()
        sums = [torch.zeros_like(size) for _ in halves]
        for probe, slope in enumerate(slopes.tolist()):
            sums[probe % 2].add_(draw(size, seeds[probe][number]), alpha=slope)
        for half, total, count in zip(halves, sums, ((len(slopes) + 1) // 2, len(slopes) // 2), strict=True):
            half[name] = weight.reduce(size * (total / count).abs())
        gradient = (sums[0] + sums[1]) / len(slopes)
        scores[name] = weight.reduce(size * gradient.abs())
        noise[name] = weight.reduce(size * sigma * math.sqrt(2 / math.pi))
        energy += float(gradient.square().sum())
        weights_in_all += gradient.numel()
    ratio = energy / (weights_in_all * sigma**2) - 1 if sigma else 0.0
    return Measurement(
        scores, halves, noise, forward_passes=2 * len(slopes), signal_to_noise=math.sqrt(max(0.0, ratio))
    )


def draw(values: Tensor, seed: int) -> Tensor:
    """Standard normal numbers shaped like `values`, the same for the same seed, whatever the dtype."""
    generator = torch.Generator(values.device).manual_seed(seed)
    return torch.randn(values.shape, generator=generator, device=values.device)


@contextmanager
def perturbed(weights: Sequence[Weight], seeds: Sequence[int], scale: float) -> Iterator[None]:
    """Within it each layer computes with ``weight + scale · z``; the weights themselves are never written to."""
    originals = {weight: weight.parameter.data for weight in weights}

    def before(weight: Weight, seed: int) -> Any:
        def hook(module: Any, _: Any) -> None:
            values = weight.values()
            module.weight.data = values.add(draw(values, seed), alpha=scale).to(weight.parameter.dtype)

        return hook

    def after(weight: Weight) -> Any:
        def hook(module: Any, _: Any, __: Any) -> None:
            module.weight.data = originals[weight]

        return hook

    def beside(weight: Weight, seed: int) -> Any:
        """A quantised layer cannot compute with other weights: what they would add is added to its output."""

        def hook(_: Any, inputs: Any, output: Tensor) -> Tensor:
            z = draw(torch.empty(weight.out_features, weight.in_features, device=output.device), seed)
            return output + (inputs[0].float() @ z.T * scale).to(output.dtype)

        return hook

    hooks = []
    try:
        for weight, seed in zip(weights, seeds, strict=True):
            if weight.is_quantised:
                hooks.append(weight.module.register_forward_hook(beside(weight, seed)))
            else:
                hooks.append(weight.module.register_forward_pre_hook(before(weight, seed)))
                hooks.append(weight.module.register_forward_hook(after(weight)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, original in originals.items():
            weight.parameter.data = original
