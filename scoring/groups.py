"""From scores of rows and columns to scores of the channels, or the heads, of coupled groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: _divided(scores, scores.mean()),
    "max": lambda scores: _divided(scores, scores.max()),
    "sum": lambda scores: _divided(scores, scores.sum()),
    "standarization": lambda scores: (scores - scores.min()) / (scores.max() - scores.min() + 1e-8),
    "none": lambda scores: scores,
}


def _divided(scores: Tensor, by: Tensor) -> Tensor:
    return scores / by if by > 0 else scores  # all of them are 0 then


def normalize(scores: Tensor, normalizer: str) -> Tensor:
    """Scores of one family made comparable with another's, as Torch-Pruning's normalizers of these names.

    ``standarization`` (sic) maps the least score to 0 and the largest to 1. Scores that are all 0 stay 0.
    """
    if normalizer not in NORMALIZERS:
        raise unknown_name("normalizer", normalizer, NORMALIZERS)
    return NORMALIZERS[normalizer](scores)


@dataclass(frozen=True)
class ScoredMember:
    """A member of a group that is a row or column axis of a scored weight.

    Attributes:
        module: name of the module.
        axis: ``row`` or ``column``.
        index: int64 ``(units, indices per unit)``.
    """

    module: str
    axis: str
    index: Tensor


def scored_members(group: CouplingGroup, table: ScoreTable) -> list[ScoredMember]:
    """The members of `group` that `table` has scores for, by channels; biases and norms are none."""
    found = []
    for member in group.members:
        # An expert in a 3-D parameter is a module with a weight; of its bias there are no scores.
        is_weight = member.port.expert is not None or member.port.parameter == f"{member.module}.weight"
        if member.shared or not is_weight or member.module not in table.scores:
            continue
        if member.axis not in table.scores[member.module]:
            raise InputError(f"no {member.axis} scores of {member.module}: score again with --axis both")
        found.append(ScoredMember(member.module, member.axis, torch.tensor(member.index.table)))
    return found


def head_members(groups: Sequence[CouplingGroup], table: ScoreTable) -> list[ScoredMember]:
    """The same by heads, of groups that have their heads in common: head h of all of them is one unit.

    Raises:
        InputError: if they have not the same number of heads, so that none can go alone.
    """
    first = groups[0]
    found = []
    for group in groups:
        if group.heads != first.heads or not group.heads:
            raise InputError(
                f"heads of {first.id} cannot be taken whole, {group.id} has {group.heads or 'none'} "
                f"of {first.heads or 'none'}: take channels, without --heads"
            )
        for member in scored_members(group, table):
            found.append(ScoredMember(member.module, member.axis, member.index.reshape(group.heads, -1)))
    return found


def with_partners(group: CouplingGroup, by_id: Mapping[str, CouplingGroup]) -> list[CouplingGroup]:
    """The groups that have heads in common with `group`, itself first, partners' partners too."""
    found = [group.id]
    for name in found:  # grows on the way
        found += [partner for partner in by_id[name].partners if partner in by_id and partner not in found]
    return [by_id[name] for name in found]


def member_scores(members: Sequence[ScoredMember], table: ScoreTable, group_reduction: str = "mean") -> Tensor:
    """Scores of units, float32 ``(units,)``: each member's part is the sum over its indices of a unit."""
    if group_reduction not in REDUCTIONS:
        raise unknown_name("group reduction", group_reduction, REDUCTIONS)
    parts = [table.scores[member.module][member.axis][member.index].sum(dim=1) for member in members]
    return REDUCTIONS[group_reduction](torch.stack(parts))


def channel_scores(
    group: CouplingGroup, table: ScoreTable, group_reduction: str = "mean", normalizer: str = "none"
) -> Tensor:
    """Scores of a group's channels, float32 ``(size,)``.

    A member's part is the sum over its indices of a channel; `group_reduction` (``sum``, ``mean``, ``max``) joins the
    members and `normalizer` scales the channels, as in Torch-Pruning. The tests compare both with Torch-Pruning's
    magnitude importance.
    """
    members = scored_members(group, table)
    if not members:
        raise InputError(f"group {group.id} has no scored rows or columns")
    return normalize(member_scores(members, table, group_reduction), normalizer)
