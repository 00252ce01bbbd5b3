"""What comes after a model's blocks, run on other hidden states: where the loss is sensitive to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Forward, hidden_states, overridden, replaced
from .criteria import Task
from .passes import OWNER_PROBES
from .readout import Sensitivity, visible
from .variances import random_signs, row_variances

STEP = 1e-3
"""Size of a movement of the hidden states, relative to them; larger where their dtype is coarse."""
OWNED = 0.8
"""A part of the loss belongs to a position that explains at least this share of how it changes."""
AT_ONCE = 2**24
"""Parts times positions that are looked at together."""


@dataclass(frozen=True)
class Head:
    """A model's head with what its last block handed on.

    Attributes:
        task: the model and its batches.
        number: of the batch.
        blocks: the model's, in the order in which they ran.
        forms: what each of them returned, without the hidden states.
        hidden: what the last block handed on, ``(examples, tokens, features)``.
        parts: of the batch's loss.
    """

    task: Task
    number: int
    blocks: Sequence[nn.Module]
    forms: Sequence[Any]
    hidden: Tensor
    parts: Tensor

    @classmethod
    def of(cls, task: Task, number: int, blocks: Sequence[nn.Module]) -> Head | None:
        """Run the model once; None if its loss is not a function of what the last block hands on."""
        ran: list[nn.Module] = []
        forms: list[Any] = []
        shapes: list[torch.Size] = []
        last: list[Tensor] = []

        def noting(module: nn.Module, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                last[:] = [hidden_states(output)]
                ran.append(module)
                shapes.append(last[0].shape)
                forms.append(replaced(output, None))
                return output

            return run

        with overridden(blocks, noting):
            parts = task.loss_parts(number)
        if len(ran) != len(blocks) or set(ran) != set(blocks) or len(set(shapes)) != 1 or last[0].ndim != 3:
            return None
        head = cls(task, number, ran, forms, last[0], parts)
        return head if torch.allclose(head.run(head.hidden), parts, rtol=1e-3) else None

    @property
    def real(self) -> Tensor:
        """``(examples, tokens)``, 0 where there is padding."""
        mask = self.task.batches[self.number].get("attention_mask")
        shape = self.hidden.shape[:2]
        if mask is None or mask.shape != shape or not bool(mask.any()):
            return torch.ones(shape, device=self.hidden.device)
        return (mask != 0).to(self.hidden.device, torch.float32)

    def run(self, hidden: Tensor) -> Tensor:
        """The loss's parts when the last block hands on `hidden`; no block is run."""
        outputs = {module: replaced(form, hidden) for module, form in zip(self.blocks, self.forms, strict=True)}

        def standing_in(module: nn.Module, forward: Forward) -> Forward:
            output = outputs[module]
            return lambda *args, **kwargs: output

        with overridden(self.blocks, standing_in):
            return self.task.loss_parts(self.number)


def sensitivity(head: Head, feature_probes: int, generator: torch.Generator) -> Sensitivity | None:
    """Mean squared derivative of the loss's parts by the features, and by the positions they belong to.

    Args:
        head: of one batch.
        feature_probes: runs of the head that tell features apart; with 0 all features count alike.
        generator: of the signs.

    Returns:
        None if the loss does not change.
    """
    assert torch.is_inference_mode_enabled()  # forward passes only: no graph can exist
    hidden = head.hidden
    size = visible(STEP, hidden) * float(hidden.float().square().mean().sqrt())
    examples, tokens, features = hidden.shape

    def changes(movements: Tensor) -> Tensor:
        return head.run(hidden + (size * movements).to(hidden.dtype)).float() - head.parts.float()

    signs = random_signs((OWNER_PROBES, examples * tokens), generator).to(hidden.device)
    direction = torch.randn(examples, tokens, features, generator=generator).to(hidden.device)
    by_position = torch.stack([changes(row.view(examples, tokens, 1) * direction) for row in signs])
    if not bool(by_position.any()):
        return None
    energy, sizes = by_position.square().mean(dim=0), torch.zeros(features, device=hidden.device)
    if feature_probes:
        patterns = random_signs((min(feature_probes, 2 * features), features), generator).to(hidden.device)
        by_feature = torch.stack([changes(row) for row in patterns])
        sizes = row_variances(patterns, by_feature)
        if bool(sizes.any()):
            energy = by_feature.square().mean(dim=0)  # over many directions, where the other is along a single one
    positions = owned(signs, by_position, energy, head.real.flatten()).view(examples, tokens)
    positions = positions / positions[positions > 0].mean()
    return Sensitivity(positions, sizes / sizes.mean() if bool(sizes.any()) else torch.ones_like(sizes))


def owned(signs: Tensor, changes: Tensor, energy: Tensor, real: Tensor) -> Tensor:
    """The parts' energies, each at the position that explains the part; those of the others on all positions alike.

    Args:
        signs: ``(probes, positions)``.
        changes: ``(probes, parts)``.
        energy: how sensitive each part is, ``(parts,)``.
        real: ``(positions,)``, 0 where there is padding: that gets nothing of what is spread.

    Returns:
        ``(positions,)``.
    """
    positions, spread = torch.zeros(signs.shape[1], device=signs.device), 0.0
    size = max(1, AT_ONCE // signs.shape[1])
    for part, own in zip(changes.split(size, dim=1), energy.split(size), strict=True):
        explained = (signs.T @ part).square() / (len(signs) * part.square().sum(dim=0).clamp(min=1e-30))
        share, owner = explained.max(dim=0)
        alone = share >= OWNED
        positions.index_add_(0, owner[alone], own[alone])
        spread += float(own[~alone].sum())
    return positions + spread * real / real.sum()
