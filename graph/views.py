"""Views of a model graph: networkx graphs of ports and of groups, GraphML of either, and what repeats folded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx

from ..records import atomic_path
from .naming import block_of
from .statistics import GroupStatistics, statistics
from .structure import CouplingGroup, Member, ModelGraph, Port

VIEWS = ("groups", "ports", "dataflow")


# ---------------------------------------------------------------------------------------------- networkx


def port_name(port: Port) -> str:
    """``parameter:dim``, of one expert ``parameter:dim:expert``."""
    return f"{port.parameter}:{port.dim}" + ("" if port.expert is None else f":{port.expert}")


def port_graph(graph: ModelGraph) -> networkx.Graph:
    """Ports of weights, joined where they are coupled.

    Nodes are ports by :func:`port_name`, with ``parameter``, ``dim``, ``axis``, ``size`` (and ``expert``). The ports
    of a group are a star round its first one, not a clique: connected is what matters, and a residual stream of 700
    ports would have a quarter of a million edges. An edge's ``groups`` are the ids, with a space between, of the
    groups that it belongs to: more than one where a fused weight (query, key and value in one) couples to its bias.
    """
    view = networkx.Graph()
    for group in graph.groups:
        nodes = dict.fromkeys(_add_port(graph, view, member) for member in group.members)
        centre, *others = nodes
        for node in others:
            before = view.edges.get((centre, node), {}).get("groups")
            view.add_edge(centre, node, groups=f"{before} {group.id}" if before else group.id)
    return view


def _add_port(graph: ModelGraph, view: networkx.Graph, member: Member) -> str:
    port = member.port
    expert = {} if port.expert is None else {"expert": port.expert}
    size = graph.shapes[port.parameter][port.dim]
    view.add_node(port_name(port), parameter=port.parameter, dim=port.dim, axis=member.axis, size=size, **expert)
    return port_name(port)


def condensed(graph: ModelGraph) -> networkx.DiGraph:
    """Groups, joined by the weights that lead from one to the next.

    Nodes are groups by id, with ``kind``, ``size`` and ``parameters`` (how many vanish with the group). An edge g -> h
    has the list ``parameters``: the weights with columns (their input) in g and rows (their output) in h.
    """
    view = networkx.DiGraph()
    for group, found in zip(graph.groups, statistics(graph), strict=True):
        view.add_node(group.id, kind=group.kind, size=group.size, parameters=found.parameters)
    ends: dict[str, dict[str, list[tuple[str, int | None]]]] = {}
    for group in graph.groups:
        for member in group.members:
            if len(graph.shapes[member.port.parameter]) > 1:
                sides = ends.setdefault(member.port.parameter, {"row": [], "column": []})
                sides[member.axis].append((group.id, member.port.expert))
    for parameter, sides in ends.items():
        for source, target in dict.fromkeys(_joined(sides["column"], sides["row"])):
            if not view.has_edge(source, target):
                view.add_edge(source, target, parameters=[])
            view.edges[source, target]["parameters"].append(parameter)
    return view


def _joined(
    sources: Sequence[tuple[str, int | None]], targets: Sequence[tuple[str, int | None]]
) -> Iterable[tuple[str, str]]:
    """Pairs of groups that are the two sides of one matrix: of the same expert, or of all experts."""
    by_expert: dict[int | None, list[str]] = {}
    for target, expert in targets:
        by_expert.setdefault(expert, []).append(target)
    for source, expert in sources:
        matching = (
            itertools.chain.from_iterable(by_expert.values())
            if expert is None
            else (by_expert.get(expert, []) + by_expert.get(None, []))
        )
        yield from ((source, target) for target in matching)


def write_graphml(path: Path, view: networkx.Graph) -> None:
    """Write a view as GraphML, atomically. Lists become text with spaces between, what is None is left out."""
    plain = view.__class__()
    plain.add_nodes_from((str(node), _plain(values)) for node, values in view.nodes(data=True))
    plain.add_edges_from(
        (str(source), str(target), _plain(values)) for source, target, values in view.edges(data=True)
    )
    with atomic_path(path) as temporary:
        networkx.write_graphml_xml(plain, temporary)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {str(key): _plain_value(value) for key, value in values.items() if value is not None}


def _plain_value(value: Any) -> str | int | float | bool:
    if isinstance(value, str | int | float | bool):
        return value
    return " ".join(str(part) for part in value) if isinstance(value, list | tuple | set) else str(value)


# ---------------------------------------------------------------------------------------------- folding


@dataclass(frozen=True)
class FoldedGroup:
    """Groups that are alike: one of them, and how many there are in one block.

    Attributes:
        name: relative to the block, with a range of numbers where it stands for several: ``mlp.experts.0-127``.
        times: how many groups of one block it stands for.
        group: the first of them.
        statistics: of that one.
    """

    name: str
    times: int
    group: CouplingGroup
    statistics: GroupStatistics


@dataclass(frozen=True)
class FoldedBlock:
    """Blocks with identical groups, or (with an empty name) the groups outside of blocks.

    Attributes:
        name: with the range of blocks: ``model.layers.0-31``.
        blocks: names of the blocks it stands for; none for groups outside of blocks.
        groups: of one of them.
    """

    name: str
    blocks: tuple[str, ...]
    groups: tuple[FoldedGroup, ...]


def folded(graph: ModelGraph) -> list[FoldedBlock]:
    """The groups with what repeats said once: identical blocks, and within a block identical groups (experts).

    Blocks are identical when their groups have equal names (relative to the block), kinds, sizes and members.
    """
    inside: dict[str, list[tuple[CouplingGroup, GroupStatistics]]] = {"": []}
    inside |= {block: [] for block in graph.blocks}
    known = frozenset(graph.blocks)
    for pair in zip(graph.groups, statistics(graph), strict=True):
        inside[block_of(pair[0].id, known) or ""].append(pair)
    alike: dict[Any, list[str]] = {}
    for block, pairs in inside.items():
        if pairs:
            alike.setdefault(frozenset(_signature(block, *pair) for pair in pairs), []).append(block)
    return [
        FoldedBlock(ranges(blocks), tuple(filter(None, blocks)), _folded_groups(blocks[0], inside[blocks[0]]))
        for blocks in alike.values()
    ]


def _signature(block: str, group: CouplingGroup, found: GroupStatistics, expert: str = "") -> tuple[Any, ...]:
    """What two groups have in common that are alike, each in its `block` and as its own `expert` (a relative name)."""

    def relative(name: str) -> str:
        name = name.removeprefix(f"{block}.")
        return re.sub(rf"^{re.escape(expert)}(?=\.|$)", "*", name) if expert else name

    number = int(expert.rpartition(".")[2]) if expert else None
    members = frozenset(
        (
            relative(member.port.parameter),
            member.port.dim,
            "*" if number is not None and member.port.expert == number else member.port.expert,
            member.axis,
            member.index,
            member.shared,
        )
        for member in group.members
    )
    return relative(group.id), group.kind, group.size, group.heads, group.rotary, found.parameters, members


def _folded_groups(block: str, pairs: Sequence[tuple[CouplingGroup, GroupStatistics]]) -> tuple[FoldedGroup, ...]:
    alike: dict[Any, list[tuple[CouplingGroup, GroupStatistics]]] = {}
    for group, found in pairs:
        numbered = re.match(r"(.*\.)?\d+(?=\.|$)", group.id.removeprefix(f"{block}."))
        expert = numbered[0] if block and numbered else ""
        place = expert.rpartition(".")[0]
        alike.setdefault((place, _signature(block, group, found, expert)), []).append((group, found))
    return tuple(
        FoldedGroup(ranges([group.id.removeprefix(f"{block}.") for group, _ in same]), len(same), *same[0])
        for same in alike.values()
    )


def ranges(names: Sequence[str]) -> str:
    """Names that differ in one number as one: ``model.layers.0-3,5``; as a list where they differ otherwise."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    places = [place for place, found in enumerate(zip(*parts, strict=False)) if len(set(found)) > 1]
    numbers = [part[places[0]] for part in parts] if len(places) == 1 else []
    if len({len(part) for part in parts}) > 1 or not numbers or not all(number.isdecimal() for number in numbers):
        return ", ".join(names)
    whole = sorted(map(int, numbers))
    runs = [list(run) for _, run in itertools.groupby(enumerate(whole), lambda pair: pair[1] - pair[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    text = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return ".".join([*parts[0][: places[0]], text, *parts[0][places[0] + 1 :]])
