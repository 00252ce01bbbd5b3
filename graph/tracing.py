"""From a model to its coupled groups: Torch-Pruning traces a weightless skeleton, the meaning is ours.

A group is a connected component of the graph of ports (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning",
section 3), refined index by index where ports are split; attention comes from the probe's layouts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import models
from ..errors import InputError
from .attention import AttentionLayout, AttentionTrace, Projection
from .backend import PortGraph, port_graph
from .channels import channel_tables
from .indices import IndexMap
from .structure import CouplingGroup, Member, ModelGraph, Port

Axes = dict[Port, str]


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the meta device: same modules, shapes and ties, no weight memory, everything trainable."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.is_floating_point()) if is_parameter else empty
    return copy.deepcopy(model, memo).train(False)


def trace(model: PreTrainedModel) -> ModelGraph:
    """Coupled groups of a decoder language model; the model itself is not touched.

    Groups: per block the feed-forward channels (``mlp``), value/output (``attention-vo``) and query/key channels
    (``attention-qk``); the residual stream (``residual``). The vocabulary is no group: it cannot vanish.

    Raises:
        InputError: if the model's structure cannot be read or is not supported, by name and reason.
    """
    bones = skeleton(model)
    attention = AttentionTrace(bones)
    with attention.active():
        ports = port_graph(bones)
        layouts = {name: attention.layout(name) for name in attention.seen}
    found = []
    for vertices in _components(ports):
        found += _groups_of(bones, ports, vertices, layouts)
    groups = tuple(sorted(found, key=lambda group: _order(bones, group)))
    shapes = {name: tuple(parameter.shape) for name, parameter in bones.named_parameters()}
    return ModelGraph(groups, shapes, blocks=tuple(models.layers(bones)))


def _components(ports: PortGraph) -> list[set[Hashable]]:
    """Connected sets of vertices; a port that hangs on two vertices (a tie) connects them."""
    graph: networkx.Graph = networkx.Graph()
    graph.add_nodes_from(ports.ports)
    graph.add_edges_from((edge.source, edge.target) for edge in ports.edges)
    graph.add_edges_from((vertex, port) for vertex, entries in ports.ports.items() for port, _ in entries)
    return [{vertex for vertex in found if vertex in ports.ports} for found in networkx.connected_components(graph)]


def _groups_of(
    bones: PreTrainedModel, ports: PortGraph, vertices: set[Hashable], layouts: dict[str, AttentionLayout]
) -> list[CouplingGroup]:
    axes: Axes = dict(
        sorted(
            (entry for vertex in vertices for entry in ports.ports[vertex]),
            key=lambda entry: (entry[0].parameter, entry[0].dim),
        )
    )
    owners = [name for name, vertex in ports.attention.items() if vertex in vertices]
    vocabulary = bones.get_output_embeddings().weight
    if not axes or any(bones.get_parameter(p.parameter) is vocabulary and p.dim == 0 for p in axes):
        return []
    if owners:
        return _attention_groups(bones, owners, axes, layouts)
    if _is_projection_of(axes, layouts):
        return []
    edges = [edge for edge in ports.edges if edge.source in vertices]
    if not any(edge.maps for edge in edges):
        return [_whole_group(bones, axes)]
    sizes = {port: bones.get_parameter(port.parameter).shape[port.dim] for port in axes}
    at = {vertex: max((sizes[port] for port, _ in ports.ports[vertex]), default=0) for vertex in vertices}
    groups = []
    for number, tables in enumerate(channel_tables({vertex: size for vertex, size in at.items() if size}, edges)):
        members = [
            Member(port, axis, IndexMap(table))
            for vertex, table in tables.items()
            for port, axis in ports.ports[vertex]
        ]
        size = len(next(iter(tables.values())))
        name, kind = _name_and_kind(bones, [member.module for member in members])
        groups.append(CouplingGroup(f"{name}.{number}" if number else name, kind, size, _unique(members)))
    return groups


def _unique(members: list[Member]) -> tuple[Member, ...]:
    return tuple(sorted(dict.fromkeys(members), key=lambda member: (member.port.parameter, member.port.dim)))


def _attention_groups(
    bones: nn.Module, owners: list[str], outputs: Axes, layouts: dict[str, AttentionLayout]
) -> list[CouplingGroup]:
    """Value/output and query/key groups of one attention: per key/value channel all query heads that share it."""
    if len(owners) != 1:
        raise InputError(f"{' and '.join(owners)} feed one projection: shared attention outputs are not supported yet")
    name = owners[0]
    layout = layouts[name]
    kv_heads, head_dim = layout.value.rows.shape
    query_heads, query_dim = layout.query.rows.shape
    if query_heads % kv_heads:
        raise InputError(f"{name}: {query_heads} query heads do not divide by {kv_heads} key/value heads")
    repeat = query_heads // kv_heads
    columns = torch.arange(query_heads * head_dim).view(kv_heads, repeat, head_dim).transpose(1, 2).reshape(-1, repeat)
    queries = layout.query.rows.view(kv_heads, repeat, query_dim).transpose(1, 2).reshape(-1, repeat)
    value_output = _row_members(bones, layout.value, layout.value.rows.reshape(-1, 1))
    value_output += [Member(port, axis, IndexMap(columns)) for port, axis in outputs.items()]
    query_key = _row_members(bones, layout.query, queries)
    query_key += _row_members(bones, layout.key, layout.key.rows.reshape(-1, 1))
    return [
        CouplingGroup(f"{name}.vo", "attention-vo", kv_heads * head_dim, tuple(value_output)),
        CouplingGroup(f"{name}.qk", "attention-qk", kv_heads * query_dim, tuple(query_key)),
    ]


def _row_members(bones: nn.Module, projection: Projection, rows: Tensor) -> list[Member]:
    index = IndexMap(rows)
    layer = bones.get_submodule(projection.module)
    out_dim = 1 if isinstance(layer, Conv1D) else 0
    return [
        Member(Port(f"{projection.module}.{name}", out_dim if parameter.ndim > 1 else 0), "row", index)
        for name, parameter in layer.named_parameters(recurse=False)
    ]


def _is_projection_of(axes: Axes, layouts: dict[str, AttentionLayout]) -> bool:
    """Whether the component is what the cut left of a query, key or value projection."""
    projections = {p.module for layout in layouts.values() for p in (layout.query, layout.key, layout.value)}
    return all(port.parameter.rpartition(".")[0] in projections and axis == "row" for port, axis in axes.items())


def _whole_group(bones: nn.Module, axes: Axes) -> CouplingGroup:
    sizes = {bones.get_parameter(port.parameter).shape[port.dim] for port in axes}
    modules = [port.parameter.rpartition(".")[0] for port in axes]
    if len(sizes) != 1:
        raise InputError(f"{', '.join(modules[:3])}: coupled sizes {sorted(sizes)} differ, which is not supported yet")
    name, kind = _name_and_kind(bones, modules)
    size = sizes.pop()
    return CouplingGroup(
        name, kind, size, tuple(Member(port, axis, IndexMap.identity(size)) for port, axis in axes.items())
    )


def _name_and_kind(bones: nn.Module, modules: list[str]) -> tuple[str, str]:
    """Within one block it is its feed-forward part, across blocks the residual stream."""
    blocks = {block for block in models.layers(bones) for module in modules if module.startswith(f"{block}.")}
    if len(blocks) != 1 or not all(module.startswith(f"{next(iter(blocks))}.") for module in modules):
        return "residual", "residual"
    parts = zip(*(module.split(".") for module in modules), strict=False)
    name = ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, parts))
    return (f"{name}.mlp" if name in blocks else name), "mlp"  # layers may stand in the block itself


def _order(bones: nn.Module, group: CouplingGroup) -> tuple[int, str]:
    blocks = list(models.layers(bones))
    numbers = [number for number, block in enumerate(blocks) if group.id.startswith(f"{block}.")]
    return (numbers[0] if numbers else -1, group.id)
