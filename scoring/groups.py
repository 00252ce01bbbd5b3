"""From scores of rows and columns to scores of the channels of a coupled group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..graph import CouplingGroup
from ..records import ScoreTable

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(dim=0),
    "mean": lambda parts: parts.mean(dim=0),
    "max": lambda parts: parts.amax(dim=0),
}


@dataclass(frozen=True)
class ScoredMember:
    """A member of a group that is a row or column axis of a scored weight.

    Attributes:
        module: name of the module.
        axis: ``row`` or ``column``.
        index: int64 ``(channels, indices per channel)``.
    """

    module: str
    axis: str
    index: Tensor


def scored_members(group: CouplingGroup, table: ScoreTable) -> list[ScoredMember]:
    """The members of `group` that `table` has scores for; biases and norms are none."""
    found = []
    for member in group.members:
        if (
            member.shared
            or member.port.parameter != f"{member.module}.weight"
            or member.module not in table.provenance.shapes
        ):
            continue
        if member.axis not in table.scores[member.module]:
            raise InputError(f"no {member.axis} scores of {member.module}: score again with --axis both")
        found.append(ScoredMember(member.module, member.axis, torch.tensor(member.index.table)))
    return found


def channel_scores(group: CouplingGroup, table: ScoreTable, group_reduction: str = "mean") -> Tensor:
    """Scores of a group's channels, float32 ``(size,)``.

    A member's part is the sum over its indices of a channel; `group_reduction` (``sum``, ``mean``, ``max``, as in
    Torch-Pruning) joins the members. The test compares it with Torch-Pruning's magnitude importance.
    """
    if group_reduction not in REDUCTIONS:
        raise unknown_name("group reduction", group_reduction, REDUCTIONS)
    members = scored_members(group, table)
    if not members:
        raise InputError(f"group {group.id} has no scored rows or columns")
    parts = [table.scores[member.module][member.axis][member.index].sum(dim=1) for member in members]
    return REDUCTIONS[group_reduction](torch.stack(parts))
