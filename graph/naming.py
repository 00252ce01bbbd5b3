"""Names of groups: the module that holds the group, and what it is of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

from .structure import CouplingGroup


def names(groups: Sequence[CouplingGroup], blocks: Collection[str]) -> list[str]:
    """A unique name for each group; groups of one name are numbered."""
    residuals = sum(group.kind == "residual" for group in groups)
    found = [_name(group, blocks, residuals == 1) for group in groups]
    totals, seen = Counter(found), Counter[str]()
    for number, name in enumerate(found):
        if totals[name] > 1:
            found[number] = f"{name}.{seen[name]}" if seen[name] else name
            seen[name] += 1
    return found


def block_of(module: str, blocks: Collection[str]) -> str | None:
    """The block that a module is, or is in."""
    parts = module.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in blocks), None)


def _name(group: CouplingGroup, blocks: Collection[str], only_residual: bool) -> str:
    modules = [member.module for member in group.members]
    parts = zip(*(module.split(".") for module in modules), strict=False)
    common = ".".join(p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, parts))
    if group.kind == "residual":
        return "residual" if only_residual or not common else f"{common}.residual"
    if group.kind.startswith("attention-"):
        is_layer = common in modules and group.members[0].port.parameter.endswith((".weight", ".bias"))
        holder = common.rpartition(".")[0] if is_layer else common
        return f"{holder}.{group.kind.removeprefix('attention-')}".lstrip(".")
    if group.kind == "mlp":
        scattered = any(module.count(".") > common.count(".") + 1 for module in modules)
        return f"{common}.mlp" if common in blocks or (scattered and not common.endswith("mlp")) else common
    first = next((member for member in group.members if member.axis == "row"), group.members[0])
    return first.module or first.port.parameter
