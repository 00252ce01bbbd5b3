"""From scores to a selection under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..graph import CouplingGroup
from ..records import AXES, AxisTensors, ScoreTable, Selection
from .budget import Budget, Share
from .groups import ScoredMember, channel_scores, scored_members

SCOPES = ("layer", "coupled")
COUPLED_KINDS = ("mlp", "attention-vo", "attention-qk")


@dataclass(frozen=True)
class Family:
    """Alike units of which the best are picked: one axis of a module, or the channels of a coupled group.

    Attributes:
        name: of the module or the group.
        scores: float32 ``(units,)``.
        members: what a unit consists of.
    """

    name: str
    scores: Tensor
    members: list[ScoredMember]

    def share(self, shapes: dict[str, tuple[int, int]]) -> Share:
        """What the budget needs to know."""
        cost = sum(
            member.index.shape[1] * shapes[member.module][1 - AXES.index(member.axis)] for member in self.members
        )
        modules = {member.module for member in self.members}
        return Share(self.name, len(self.scores), cost, sum(sum(shapes[module]) for module in modules))


def select(
    table: ScoreTable,
    budget: Budget,
    *,
    scope: str = "layer",
    axis: str = "row",
    groups: Sequence[CouplingGroup] = (),
) -> Selection:
    """Pick the units with the largest scores, under a budget.

    Args:
        table: scores of every candidate module.
        budget: see :class:`Budget`.
        scope: ``layer`` picks within each module on its own; ``coupled`` picks whole channels of the groups within
            one block (feed-forward, value/output, query/key): rows of some weights with columns of others.
        axis: ``row`` or ``column``; with ``coupled`` the groups decide.
        groups: of the same model, for ``coupled``.

    Raises:
        InputError: for an unknown scope or axis, NaN scores, missing scores, or a budget that does not fit.
    """
    check_scope(scope, axis)
    shapes = table.provenance.shapes
    families = _coupled_families(table, groups) if scope == "coupled" else _module_families(table, axis)
    for family in families:
        if not bool(family.scores.isfinite().all()):
            raise InputError(f"scores of {family.name} hold NaN or infinity: score again")
    counts = budget.units([family.share(shapes) for family in families])
    indices: AxisTensors = {}
    for family, count in zip(families, counts, strict=True):
        if count:
            chosen = family.scores.argsort(descending=True, stable=True)[:count]
            for member in family.members:
                indices.setdefault(member.module, {})[member.axis] = member.index[chosen].flatten().sort().values
    origin = {"criterion": table.provenance.criterion, "budget": str(budget), "scope": scope}
    if scope == "layer":
        origin["axis"] = axis
    chosen_shapes = {module: shape for module, shape in shapes.items() if module in indices}  # in the model's order
    ordered = {module: indices[module] for module in chosen_shapes}
    return Selection(ordered, chosen_shapes, table.provenance.model_fingerprint, origin)


def check_scope(scope: str, axis: str) -> None:
    """Raise an InputError unless both are known."""
    if scope not in SCOPES:
        raise unknown_name("scope", scope, SCOPES)
    if axis not in AXES:
        raise unknown_name("axis", axis, AXES)


def _module_families(table: ScoreTable, axis: str) -> list[Family]:
    families = []
    for module, axes in table.scores.items():
        if axis not in axes:
            raise InputError(f"no {axis} scores of {module}: score again with --axis both")
        every = torch.arange(len(axes[axis])).unsqueeze(1)
        families.append(Family(module, axes[axis], [ScoredMember(module, axis, every)]))
    return families


def _coupled_families(table: ScoreTable, groups: Sequence[CouplingGroup]) -> list[Family]:
    families = [
        Family(group.id, channel_scores(group, table), scored_members(group, table))
        for group in groups
        if group.kind in COUPLED_KINDS and scored_members(group, table)
    ]
    if not families:
        raise InputError("scope coupled found no coupled groups in this model: use --scope layer")
    return families
