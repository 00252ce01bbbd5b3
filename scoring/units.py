"""What is picked: families of alike units, each a row, a column, a coupled channel, or a head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..graph import CouplingGroup
from ..records import Provenance, ScoreTable
from ..settings import AXIS_CHOICES
from .budget import Share
from .competition import Floats
from .groups import ScoredMember, head_members, member_scores, normalize, scored_members, with_partners
from .layer_scores import layer_of

COUPLED_KINDS = ("mlp", "attention-vo", "attention-qk")

Axis = str | Mapping[str, str]
"""``row``, ``column`` or ``auto``, for every module or by the endings of their names."""


@dataclass(frozen=True)
class Family:
    """Alike units of which some are picked: one axis of a module, or the channels or heads of a coupled group.

    Attributes:
        name: of the module or the group.
        scores: float32 ``(units,)``.
        members: what a unit consists of.
        cost: weights of one unit.
        layer: the block it is in (the first, if a unit reaches over several); empty if it is in none.
    """

    name: str
    scores: Tensor
    members: list[ScoredMember]
    cost: int
    layer: str

    @classmethod
    def of(cls, name: str, members: list[ScoredMember], table: ScoreTable, group_reduction: str) -> Family:
        """Score and price the units that `members` make up. Raises InputError if a score is no number to work with."""
        scores = member_scores(members, table, group_reduction)
        if not bool((scores.isfinite() & (scores >= 0)).all()):
            raise InputError(f"scores of {name} hold NaN, infinity or a negative number: score again")
        provenance = table.provenance
        cost = sum(member.index.shape[1] * provenance.unit_cost(member.module, member.axis) for member in members)
        return cls(name, scores, members, cost, layer_of(members[0].module, provenance.layers))

    def exact_scores(self) -> Floats:
        """The scores in float64."""
        return self.scores.double().numpy()

    def values(self, normalizer: str) -> Floats:
        """What a unit is worth beside those of other families: its cost times its normalised score per weight.

        Per weight, because a unit of twice the weights uses up twice the budget; the cost is the same for all units of
        a family, so a normaliser that divides makes the score per weight what it makes of the score itself.
        """
        return self.cost * normalize(self.scores.double() / self.cost, normalizer).numpy()


def module_families(table: ScoreTable, axis: Axis) -> list[Family]:
    """The rows, or the columns, of every module."""
    axes = _axes(table.provenance, list(table.scores), axis)
    families = []
    for module, scores in table.scores.items():
        own = axes[module]
        if own not in scores:
            raise InputError(f"no {own} scores of {module}: score again with --axis both")
        every = torch.arange(len(scores[own])).unsqueeze(1)
        families.append(Family.of(module, [ScoredMember(module, own, every)], table, "sum"))
    return families


def _axes(provenance: Provenance, modules: Sequence[str], axis: Axis) -> dict[str, str]:
    """Which axis of each module; modules that no ending names have rows."""
    patterns = {"": axis} if isinstance(axis, str) else {"": "row", **axis}
    for ending, choice in patterns.items():
        if choice not in AXIS_CHOICES:
            raise unknown_name("axis", choice, AXIS_CHOICES)
        if not any(_ends(module, ending) for module in modules):
            raise InputError(f"axis: no scored module ends in {ending!r}: name the end of one, e.g. {modules[-1]!r}")
    chosen = {}
    for module in modules:
        own = patterns[max((ending for ending in patterns if _ends(module, ending)), key=len)]
        rows, columns = provenance.shapes[module]
        chosen[module] = ("column" if columns > rows else "row") if own == "auto" else own
    return chosen


def _ends(module: str, ending: str) -> bool:
    return not ending or module == ending or module.endswith(f".{ending}")


def coupled_families(
    table: ScoreTable, groups: Sequence[CouplingGroup], heads: bool, group_reduction: str
) -> list[Family]:
    """The channels of the groups within a block; with `heads` the heads of all groups that have them in common."""
    by_id = {group.id: group for group in groups}
    families: list[Family] = []
    done: set[str] = set()
    for group in groups:
        if group.kind not in COUPLED_KINDS or group.id in done:
            continue
        if heads and group.heads:
            whole = with_partners(group, by_id)
            done.update(partner.id for partner in whole)
            members = head_members(whole, table)
        else:
            members = scored_members(group, table)
        if members:
            families.append(Family.of(group.id, members, table, group_reduction))
    if not families:
        raise InputError("scope coupled found no coupled groups in this model: use --scope layer")
    return families


def shares(families: Sequence[Family], provenance: Provenance) -> list[Share]:
    """What the budget needs to know. A module in several families has one LoRA: each has its part of the cost."""
    parts = [Counter[str]() for _ in families]
    for family, own in zip(families, parts, strict=True):
        for member in family.members:
            own[member.module] += member.index.numel() * provenance.unit_cost(member.module, member.axis)
    whole = sum(parts, Counter[str]())
    loras = [
        sum((Fraction(provenance.lora_cost(name) * part, whole[name]) for name, part in own.items()), Fraction(0))
        for own in parts
    ]
    return [
        Share(family.name, len(family.scores), family.cost, lora) for family, lora in zip(families, loras, strict=True)
    ]


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of one family: what is drawn for it does not depend on the others."""
    return np.random.default_rng([seed, *name.encode()])
