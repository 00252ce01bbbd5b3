"""Zero-order Taylor importance: gradients guessed from forward passes alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Batch
from ..errors import InputError, unknown_name
from ..records import AxisTensors
from .criteria import Measurement, checked_loss, reduce_weight, register


@register
@dataclass(frozen=True)
class ZerothOrderTaylor:
    """``s_i = Σ_j |w_ij · ĝ_ij|`` with the two-sided simultaneous-perturbation estimate of the gradient

    ``ĝ = 1/K Σ_k (L_k(w + εz_k) − L_k(w − εz_k)) / 2ε · z_k``, ``z_k ~ N(0, I)``, both losses on the same batch

    (SPSA: Spall 1992; seed replay: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes"; the
    row score: the zero-order criterion of SPruFT, arXiv 2502.11439). z is never stored: it is drawn again from its
    seed for each sign and for the final sum. The weights are never written to: a module computes with a temporary.

    With K probes against d weights the cosine between ĝ and the gradient is at most about √(K/d), so the ranking
    is mostly that of the weights' size; ``signal_to_noise`` says how much so.

    Attributes:
        estimator: ``spsa``.
        passes: forward passes in all, 2K.
        epsilon: size of the perturbation, in units of the weights.
    """

    estimator: str = "spsa"
    passes: int = 512
    epsilon: float = 1e-3

    name: ClassVar[str] = "zo-taylor"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.estimator != "spsa":
            raise unknown_name("estimator of zo-taylor", self.estimator, ["spsa"])
        if self.passes < 4 or self.passes % 2:
            raise InputError(f"criterion zo-taylor: passes={self.passes} must be even and at least 4")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"criterion zo-taylor: epsilon={self.epsilon} must be greater than 0")

    def measure(
        self, model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], seed: int
    ) -> Measurement:
        """`passes` forward passes; even and odd probes make the two halves."""
        probes = self.passes // 2
        slopes = torch.empty(probes, dtype=torch.float64)
        first_seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed)))
        seeds = [
            [first_seed + probe * len(modules) + number for number in range(len(modules))] for probe in range(probes)
        ]
        device = next(iter(modules.values())).weight.device
        with torch.inference_mode():
            for probe in tqdm(range(probes), desc="zo-taylor", disable=None, delay=2):
                number = probe % len(batches)
                inputs = {key: value.to(device) for key, value in batches[number].items()}
                losses = []
                for sign in (1.0, -1.0):
                    with perturbed(list(modules.values()), seeds[probe], sign * self.epsilon):
                        losses.append(checked_loss(model(**inputs, use_cache=False).loss, number).double())
                slopes[probe] = (losses[0] - losses[1]) / (2 * self.epsilon)
        return self._scores(modules, seeds, slopes)

    @torch.no_grad()
    def _scores(self, modules: Mapping[str, nn.Linear], seeds: list[list[int]], slopes: Tensor) -> Measurement:
        """Replay the draws weight by weight, so that one estimated gradient at a time is in memory."""
        scores: AxisTensors = {}
        halves: tuple[AxisTensors, AxisTensors] = ({}, {})
        noise: AxisTensors = {}
        sigma = float(slopes.square().mean().sqrt()) / math.sqrt(len(slopes))
        energy, weights_in_all = 0.0, 0
        for number, (name, module) in enumerate(modules.items()):
            weight = module.weight.detach()
            sums = [torch.zeros_like(weight, dtype=torch.float32) for _ in halves]
            for probe, slope in enumerate(slopes.tolist()):
                sums[probe % 2].add_(draw(weight, seeds[probe][number]), alpha=slope)
            size = weight.float().abs()
            for half, total, count in zip(halves, sums, ((len(slopes) + 1) // 2, len(slopes) // 2), strict=True):
                half[name] = reduce_weight(size * (total / count).abs())
            gradient = (sums[0] + sums[1]) / len(slopes)
            scores[name] = reduce_weight(size * gradient.abs())
            noise[name] = reduce_weight(size * sigma * math.sqrt(2 / math.pi))
            energy += float(gradient.square().sum())
            weights_in_all += gradient.numel()
        ratio = energy / (weights_in_all * sigma**2) - 1 if sigma else 0.0
        return Measurement(
            scores, halves, noise, forward_passes=2 * len(slopes), signal_to_noise=math.sqrt(max(0.0, ratio))
        )


def draw(weight: Tensor, seed: int) -> Tensor:
    """Standard normal numbers shaped like `weight`, the same for the same seed."""
    generator = torch.Generator(weight.device).manual_seed(seed)
    return torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)


@contextmanager
def perturbed(modules: Sequence[nn.Linear], seeds: Sequence[int], scale: float) -> Iterator[None]:
    """Within it each module computes with ``weight + scale · z``; the weights themselves are never written to."""
    originals = [module.weight.data for module in modules]

    def before(original: Tensor, seed: int) -> Any:
        def hook(module: nn.Linear, _: Any) -> None:
            module.weight.data = torch.add(original, draw(original, seed), alpha=scale)

        return hook

    def after(original: Tensor) -> Any:
        def hook(module: nn.Linear, _: Any, __: Any) -> None:
            module.weight.data = original

        return hook

    hooks = []
    try:
        for module, original, seed in zip(modules, originals, seeds, strict=True):
            hooks.append(module.register_forward_pre_hook(before(original, seed)))
            hooks.append(module.register_forward_hook(after(original)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, original in zip(modules, originals, strict=True):
            module.weight.data = original
