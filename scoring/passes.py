"""What a forward pass consists of, and how many probes a number of passes buys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .blocks import outside
from .weights import Weight, view

OWNER_PROBES = 32
"""Probes of the head that tell which position a part of the loss belongs to."""
SHARE = 8
"""One part in so many of the passes goes to the head at most, and one to batches that are not probed."""
FEWEST, MOST = 8, 512
"""Probes of a block on one batch."""
ROUNDING = 1e-6
"""Of sums of passes."""


@dataclass(frozen=True)
class Plan:
    """How the passes are spent.

    Attributes:
        batches: how many batches are probed: the first ones.
        probes: of every block, on each of these batches.
        feature_probes: runs of the head, beside those for the positions, on each of these batches; 0: none of either.
        others: how many more batches are looked at for their activations.
        spent: forward passes in all, rounded up.
    """

    batches: int
    probes: int
    feature_probes: int
    others: int
    spent: int


@dataclass
class Costs:
    """Multiplications with weights in one forward pass: within the blocks, and outside of them.

    Attention's own products, and weights that are no layer's, are not counted.
    """

    within: int = 0
    outside: int = 0

    def plan(self, passes: int, batches: int, weights: int) -> Plan:
        """Spend `passes` on the probes of as few batches as take them.

        Args:
            passes: in units of the whole model's.
            batches: how many there are.
            weights: most scored weights of a block; each takes one pass to find out how far to move it, and one more
                finds the activations' sizes.

        Raises:
            InputError: if they do not suffice, or no block has run.
        """
        if not self.within:
            raise InputError("zo-taylor: no layer of the model's blocks has run: use zo-taylor:estimator=spsa")
        plans = self._plans(passes, batches, weights)
        if plans:
            return next((plan for plan in plans if plan.probes < MOST), plans[-1])
        least = 2 * ceil((4 + weights + 1 + FEWEST) * SHARE / (SHARE - 2) / 2)  # that is always enough
        while self._plans(least - 2, batches, weights):
            least -= 2
        raise InputError(f"criterion zo-taylor: passes={passes} do not suffice here: use at least {least}")

    def _plans(self, passes: int, batches: int, weights: int) -> list[Plan]:
        """What can be paid for, by how many batches are probed."""
        block = self.within / (self.within + self.outside)
        head = 1 - block
        plans = []
        for used in range(1, batches + 1):
            each = (passes - 1) / used - 3  # one pass counts the costs, three look at a batch
            head_probes = int(min(MOST, each / SHARE / max(head, 1e-9)))
            feature_probes = max(0, head_probes - OWNER_PROBES) if head_probes >= 2 * OWNER_PROBES else 0
            head_passes = (feature_probes + OWNER_PROBES + 1) * head if feature_probes else 0.0
            other = 2 + (OWNER_PROBES + 1) * head if feature_probes else 1.0
            others = int(min(batches - used, passes / SHARE / other))
            probes = int((each - head_passes - others * other / used) / block) - weights - 1
            if probes < FEWEST:
                break
            probes = min(probes, MOST)
            spent = 1 + used * (3 + head_passes + (probes + weights + 1) * block) + others * other
            plans.append(Plan(used, probes, feature_probes, others, ceil(spent - ROUNDING)))
        return plans


@contextmanager
def counted(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[Costs]:
    """Within it every forward pass adds its multiplications with weights; embeddings cost nothing."""
    costs = Costs()
    weights = {name: found for name, module in model.named_modules() if (found := view(name, module)) is not None}
    behind = set(outside(weights, blocks))

    def hook(weight: Weight) -> Callable[..., None]:
        def add(_: nn.Module, __: Any, output: Tensor) -> None:
            cost = weight.numel * (output.numel() // weight.out_features)
            if weight.name in behind:
                costs.outside += cost
            else:
                costs.within += cost

        return add

    with ExitStack() as stack:
        for weight in weights.values():
            if not isinstance(weight.module, nn.Embedding):
                stack.callback(weight.module.register_forward_hook(hook(weight)).remove)
        yield costs
