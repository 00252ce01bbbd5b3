"""What holds of every group, checked before anyone uses one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..errors import InputError
from .indices import IndexMap
from .structure import CouplingGroup, Member


def check(groups: Iterable[CouplingGroup], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check groups against the model's shapes.

    Raises:
        InputError: if an index is out of range or in two channels, a member has other channels than its group, heads
            do not divide it, a partner is missing, or nothing is written or read.
    """
    groups = list(groups)
    partners = {group.id: group.partners for group in groups}
    unique: dict[IndexMap, bool] = {}
    for group in groups:
        for member in group.members:
            table = member.index.table
            if len(table) != group.size:
                raise _broken(group, f"{member.port.parameter} has {len(table)} channels, not {group.size}")
            if table.min() < 0 or table.max() >= shapes[member.port.parameter][member.port.dim]:
                raise _broken(group, f"{member.port.parameter} has no index {table.max()}")
            if not member.shared and not _is_unique(member, unique):
                raise _broken(group, f"an index of {member.port.parameter} is in two channels")
        axes = {member.axis for member in group.members}
        if group.kind in ("mlp", "attention-vo", "residual") and axes != {"row", "column"}:
            raise _broken(group, f"it has only {axes.pop()}s")
        if group.heads is not None and group.size % group.heads:
            raise _broken(group, f"{group.heads} heads do not divide {group.size} channels")
        if any(group.id not in partners.get(partner, ()) for partner in group.partners):
            raise _broken(group, "its partners do not know it")
    if len(partners) != len(groups):
        raise InputError("the graph is inconsistent: two groups have one name")


def _is_unique(member: Member, known: dict[IndexMap, bool]) -> bool:
    if member.index not in known:
        known[member.index] = len(np.unique(member.index.table)) == member.index.table.size
    return known[member.index]


def _broken(group: CouplingGroup, reason: str) -> InputError:
    return InputError(f"the graph is inconsistent at {group.id}: {reason}")
