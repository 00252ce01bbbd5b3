"""From a model to its coupled groups: Torch-Pruning traces a weightless skeleton, the meaning is ours.

Only ``module2node`` and ``Node.dependencies`` of Torch-Pruning are read: its own groups are wrong or endless on models
with grouped-query attention. A group is a connected component of the graph of ports (Fang et al. 2023, "DepGraph:
Towards Any Structural Pruning", section 3); attention is cut out and put back from the probe's layout.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import networkx
import torch
import torch_pruning
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import models
from ..errors import InputError
from .attention import AttentionLayout, AttentionTrace, OpaqueAttention
from .structure import CouplingGroup, Member, Port, compact

TRACED_TOKENS = 4

Node = Any
"""A node of Torch-Pruning's graph."""


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the meta device: same modules, shapes and ties, no weight memory, everything trainable."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.is_floating_point()) if is_parameter else empty
    return copy.deepcopy(model, memo).train(False)


def trace(model: PreTrainedModel) -> list[CouplingGroup]:
    """Coupled groups of a decoder language model; the model itself is not touched.

    Groups: per block the feed-forward channels (``mlp``), value/output (``attention-vo``) and query/key channels
    (``attention-qk``); the residual stream (``residual``). The vocabulary is no group: it cannot vanish.

    Raises:
        InputError: if the model's structure cannot be read or is not supported, by name and reason.
    """
    bones = skeleton(model)
    attention = AttentionTrace(bones)
    with attention.active():
        nodes = _trace_nodes(bones)
        layouts = {name: attention.layout(name) for name in attention.seen}
    return _groups(bones, nodes, layouts)


def _trace_nodes(bones: PreTrainedModel) -> list[Node]:
    token_ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.long, device="meta")
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "use_cache": False}
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # RMSNorm weights are "unwrapped parameters": what we want
            graph.build_dependency(bones, inputs, output_transform=lambda output: output.logits, verbose=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{type(bones).__name__} cannot be traced ({reason}): it is not supported yet") from None
    return list(graph.module2node.values())


def _groups(bones: PreTrainedModel, nodes: list[Node], layouts: dict[str, AttentionLayout]) -> list[CouplingGroup]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in bones.named_parameters()}
    ports: networkx.Graph = networkx.Graph()
    attended: dict[str, Any] = {}
    for node in nodes:
        for side in ("in", "out"):
            own_ports = _ports(node, side, names)
            key = (node, side) if _has_two_sides(node) else (node, "both")
            ports.add_node(key)
            ports.add_edges_from((key, port) for port in own_ports)
        if _is_attention(node):
            attended[node.grad_fn.module_name] = (node, "both")
        ports.add_edges_from(_edges(node))
    vocabulary = Port(names[bones.get_output_embeddings().weight], 0)
    found = []
    for component in networkx.connected_components(ports):
        if vocabulary in component:
            continue
        members = sorted(key for key in component if isinstance(key, Port))
        owners = [name for name, key in attended.items() if key in component]
        if owners:
            found += _attention_groups(bones, owners, members, layouts)
        elif not _is_projection_of(members, layouts):
            found += _plain_group(bones, members)
    return sorted(found, key=lambda group: _order(bones, group))


def _edges(node: Node) -> list[tuple[Any, Any]]:
    """Edges of the port graph at `node`; those into an attention are cut, the layouts replace them."""
    edges = []
    for dependency in node.dependencies:
        source, target = dependency.source, dependency.target
        if (_is_attention(source) and target not in source.outputs) or (
            _is_attention(target) and source not in target.outputs
        ):
            continue
        if any(mapping is not None for mapping in dependency.index_mapping):
            raise InputError(f"{source.name} to {target.name}: split or concatenated channels are not supported yet")
        edges.append((_key(source, dependency.trigger), _key(target, dependency.handler)))
    return edges


def _is_attention(node: Node) -> bool:
    return isinstance(node.grad_fn, OpaqueAttention._backward_cls)


def _has_two_sides(node: Node) -> bool:
    return isinstance(node.module, nn.Linear)


def _key(node: Node, function: Any) -> Any:
    if not _has_two_sides(node):
        return (node, "both")
    return (node, "out" if function == torch_pruning.prune_linear_out_channels else "in")


def _ports(node: Node, side: str, names: Mapping[Tensor, str]) -> list[Port]:
    """Ports of a node's `side`; ties are one port, because ports are named by parameter."""
    module = node.module
    if isinstance(module, nn.Linear):
        if side == "in":
            return [Port(names[module.weight], 1)]
        return [Port(names[parameter], 0) for parameter in (module.weight, module.bias) if parameter is not None]
    if isinstance(module, nn.Embedding):
        return [Port(names[module.weight], 1)]
    if isinstance(module, nn.Parameter):
        return [Port(names[module], node.pruning_dim % module.ndim)]
    if isinstance(module, nn.LayerNorm):
        return [Port(names[parameter], 0) for parameter in module.parameters()]
    if isinstance(module, nn.Module) and next(module.parameters(), None) is not None:
        raise InputError(f"{node.name}: a {type(module).__name__} is not supported yet")
    return []


def _attention_groups(
    bones: nn.Module, owners: list[str], outputs: list[Port], layouts: dict[str, AttentionLayout]
) -> list[CouplingGroup]:
    """Value/output and query/key groups of one attention: per key/value channel all query heads that share it."""
    if len(owners) != 1:
        raise InputError(f"{' and '.join(owners)} feed one projection: shared attention outputs are not supported yet")
    name = owners[0]
    layout = layouts[name]
    kv_heads, head_dim = layout.value.rows.shape
    query_heads = layout.query.rows.shape[0]
    if query_heads % kv_heads:
        raise InputError(f"{name}: {query_heads} query heads do not divide by {kv_heads} key/value heads")
    repeat = query_heads // kv_heads
    columns = torch.arange(query_heads * head_dim).view(kv_heads, repeat, head_dim).transpose(1, 2).reshape(-1, repeat)
    query_dim = layout.query.rows.shape[1]
    queries = layout.query.rows.view(kv_heads, repeat, query_dim).transpose(1, 2).reshape(-1, repeat)
    value_output = _row_members(bones, layout.value.module, layout.value.rows.reshape(-1, 1))
    value_output += [Member(port, compact(columns.tolist())) for port in outputs]
    query_key = _row_members(bones, layout.query.module, queries)
    query_key += _row_members(bones, layout.key.module, layout.key.rows.reshape(-1, 1))
    return [
        CouplingGroup(f"{name}.vo", "attention-vo", kv_heads * head_dim, tuple(value_output)),
        CouplingGroup(f"{name}.qk", "attention-qk", kv_heads * query_dim, tuple(query_key)),
    ]


def _row_members(bones: nn.Module, module_name: str, rows: Tensor) -> list[Member]:
    index = compact(rows.tolist())
    parameters = bones.get_submodule(module_name).named_parameters(recurse=False)
    return [Member(Port(f"{module_name}.{name}", 0), index) for name, _ in parameters]


def _is_projection_of(members: list[Port], layouts: dict[str, AttentionLayout]) -> bool:
    """Whether the component is what the cut left of a query, key or value projection."""
    projections = {p.module for layout in layouts.values() for p in (layout.query, layout.key, layout.value)}
    return bool(members) and all(
        port.parameter.rpartition(".")[0] in projections and port.dim == 0 for port in members
    )


def _plain_group(bones: nn.Module, members: list[Port]) -> list[CouplingGroup]:
    if not members:
        return []
    sizes = {bones.get_parameter(port.parameter).shape[port.dim] for port in members}
    modules = [port.parameter.rpartition(".")[0] for port in members]
    if len(sizes) != 1:
        raise InputError(f"{', '.join(modules[:3])}: coupled sizes {sorted(sizes)} differ, which is not supported yet")
    blocks = {block for block in models.layers(bones) for module in modules if module.startswith(f"{block}.")}
    if len(blocks) == 1 and all(module.startswith(tuple(f"{block}." for block in blocks)) for module in modules):
        name, kind = _common_name(modules), "mlp"
        if name in blocks:  # the layers stand in the block itself
            name = f"{name}.mlp"
    else:
        name, kind = "residual", "residual"
    return [CouplingGroup(name, kind, sizes.pop(), tuple(Member(port) for port in members))]


def _common_name(modules: list[str]) -> str:
    """The innermost module that holds all of them."""
    parts = zip(*(module.split(".") for module in modules), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, parts))


def _order(bones: nn.Module, group: CouplingGroup) -> tuple[int, str]:
    blocks = list(models.layers(bones))
    numbers = [number for number, block in enumerate(blocks) if group.id.startswith(f"{block}.")]
    return (numbers[0] if numbers else -1, group.id)
