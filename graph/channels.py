"""Channels of coupled ports, index by index, where a split, a slice or a concatenation lies between them.

Most components of the port graph are coupled index by index as they stand. Where they are not (a fused gate and up
projection, a concatenation), every index of every port becomes a node of its own, and a channel is a connected
component of those.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch_pruning._helpers import _HybridIndex

Table = list[list[int]]
"""Channel -> indices of one port."""


@dataclass(frozen=True)
class Edge:
    """A directed dependency between two vertices of the port graph.

    Attributes:
        source: vertex.
        target: vertex.
        maps: Torch-Pruning's index mappings along it, in order; none for the identity.
    """

    source: Hashable
    target: Hashable
    maps: tuple[Any, ...] = ()


def channel_tables(sizes: Mapping[Hashable, int], edges: Iterable[Edge]) -> list[dict[Hashable, Table]]:
    """Channels of one component, in sets of alike channels.

    Args:
        sizes: vertices that are ports of weights -> their size. Other vertices of the edges only pass indices on.
        edges: both directions of every dependency; where they disagree the pair is not coupled (a mapping is
            defined beyond the width of what it maps).

    Returns:
        for each set, port -> table; channels have the same number of indices of each port throughout a set.
    """
    width = max(sizes.values())
    edges = list(edges)
    vertices = dict.fromkeys(sizes) | {v: None for edge in edges for v in (edge.source, edge.target)}
    position = {vertex: number for number, vertex in enumerate(vertices)}
    pairs: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for edge in edges:
        found = pairs.setdefault((position[edge.source], position[edge.target]), set())
        found.update(_pairs(edge.maps, sizes.get(edge.source, width), sizes.get(edge.target, width)))
    rows, columns = [], []
    for (source, target), there in pairs.items():
        back = pairs.get((target, source), set())
        for first, second in there:
            if (second, first) in back:
                rows.append(source * width + first)
                columns.append(target * width + second)
    shape = (len(vertices) * width, len(vertices) * width)
    _, labels = connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=shape), directed=False)
    channels: dict[int, dict[Hashable, list[int]]] = {}
    for vertex, size in sizes.items():
        start = position[vertex] * width
        for index, label in enumerate(labels[start : start + size].tolist()):
            channels.setdefault(label, {}).setdefault(vertex, []).append(index)
    alike: dict[tuple[Any, ...], list[dict[Hashable, list[int]]]] = {}
    for channel in channels.values():
        alike.setdefault(tuple((vertex, len(indices)) for vertex, indices in channel.items()), []).append(channel)
    return [{vertex: [channel[vertex] for channel in group] for vertex in group[0]} for group in alike.values()]


def _pairs(maps: tuple[Any, ...], source_size: int, target_size: int) -> list[tuple[int, int]]:
    indices = [_HybridIndex(idx=index, root_idx=index) for index in range(source_size)]
    for mapping in maps:
        indices = mapping(indices)
    return [(int(i.root_idx), int(i.idx)) for i in indices if i.root_idx is not None and 0 <= i.idx < target_size]
