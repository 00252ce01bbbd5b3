"""How much of a model hangs on each group, and who writes to it and reads from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .savings import remaining, total_parameters, vanishing
from .structure import CouplingGroup, Member, ModelGraph


@dataclass(frozen=True)
class GroupStatistics:
    """What hangs on one group.

    Attributes:
        id: of the group.
        parameters: numbers that vanish if all channels do. A weight whose rows are in one group and whose columns in
            another counts in both.
        parameters_per_channel: numbers that vanish with one channel (the first; all have alike shares), those with
            several channels left out: the weight of a per-head norm goes only with all of them.
        share: `parameters` over those of the model. As most weights count in two groups, shares add up to more than
            1: a share is how much of the model a group can shrink, not a slice of a cake.
        writers: layers whose output is the group: a weight with rows in it, or the table of an embedding.
        readers: layers whose input is the group: a weight with columns in it.
    """

    id: str
    parameters: int
    parameters_per_channel: int
    share: float
    writers: tuple[str, ...]
    readers: tuple[str, ...]


def statistics(graph: ModelGraph) -> list[GroupStatistics]:
    """One entry per group, in the order of the graph."""
    total = total_parameters(graph)
    return [_of_group(graph, group, total) for group in graph.groups]


def _of_group(graph: ModelGraph, group: CouplingGroup, total: int) -> GroupStatistics:
    parameters = _lost(graph, group, slice(None))
    first = _lost(graph, group, np.zeros(1, dtype=np.int64)) if group.size else 0
    layers = [(module, _side(graph, member, module)) for member in group.members for module in _owners(group, member)]
    writers, readers = (tuple(dict.fromkeys(m for m, where in layers if where == side)) for side in ("out", "in"))
    return GroupStatistics(group.id, parameters, first, parameters / max(1, total), writers, readers)


def _lost(graph: ModelGraph, group: CouplingGroup, channels: np.ndarray | slice) -> int:
    gone = vanishing(graph, group, channels)
    return sum(
        math.prod(graph.shapes[name]) - remaining(graph.shapes[name], lost)
        for name, lost in gone.items()
        if name not in graph.buffers
    )


def _owners(group: CouplingGroup, member: Member) -> list[str]:
    """Names of the modules that own a member: several where the parameter is tied."""
    for names in group.ties:
        if member.port.parameter in names:
            return [name.rpartition(".")[0] for name in names]
    return [member.module]


def _side(graph: ModelGraph, member: Member, module: str) -> str | None:
    """``out`` if the module writes to the group through this member, ``in`` if it reads; None for biases and norms."""
    if len(graph.shapes[member.port.parameter]) < 2:
        return None
    if graph.dataflow.nodes.get(module, {}).get("type") == "Embedding":
        return "out"
    return "out" if member.axis == "row" else "in"
