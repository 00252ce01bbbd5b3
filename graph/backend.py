"""What is read of Torch-Pruning: the port graph of a traced skeleton.

Only ``module2node`` and ``Node.dependencies`` are read: its own groups are wrong or endless on models with
grouped-query attention. Edges into an attention are cut here; the probed layouts take their place.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from .attention import OpaqueAttention
from .channels import Edge
from .structure import Port

TRACED_TOKENS = 4

Node = Any
"""A node of Torch-Pruning's graph: a module, a parameter or an operation."""


@dataclass
class PortGraph:
    """Vertices are the sides of traced nodes; ports of weights hang on them.

    Attributes:
        ports: vertex -> its ports with their axes.
        edges: every dependency between two vertices, in both directions.
        attention: name of an attention module -> the vertex of its output.
    """

    ports: dict[Hashable, list[tuple[Port, str]]] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    attention: dict[str, Hashable] = field(default_factory=dict)


class Conv1DPruner(torch_pruning.pruner.function.BasePruningFunc):
    """Tells Torch-Pruning that transformers' Conv1D, weight ``(in_features, out_features)``, has two sides."""

    TARGET_MODULES = Conv1D

    def prune_out_channels(self, layer: Conv1D, idxs: list[int]) -> Conv1D:
        """Named by dependencies, never called."""
        raise RuntimeError("the traced skeleton is not pruned")

    def prune_in_channels(self, layer: Conv1D, idxs: list[int]) -> Conv1D:
        """Named by dependencies, never called."""
        raise RuntimeError("the traced skeleton is not pruned")

    def get_out_channels(self, layer: Conv1D) -> int:
        """Output features."""
        return layer.nf

    def get_in_channels(self, layer: Conv1D) -> int:
        """Input features."""
        return layer.nx


def port_graph(bones: PreTrainedModel) -> PortGraph:
    """Trace a skeleton whose attention is opaque.

    Raises:
        InputError: if the forward fails or an unknown kind of layer holds weights.
    """
    backend = _traced(bones)
    names: dict[Tensor, str] = {parameter: name for name, parameter in bones.named_parameters()}
    graph = PortGraph()
    for node in backend.module2node.values():
        for side in ("in", "out") if _has_two_sides(node) else ("both",):
            graph.ports[node, side] = _ports(node, side, names)
        if _is_attention(node):
            graph.attention[node.grad_fn.module_name] = (node, "both")
        for dependency in node.dependencies:
            if not _enters_attention(dependency):
                maps = tuple(mapping for mapping in dependency.index_mapping if mapping is not None)
                source = _vertex(backend, dependency.source, dependency.trigger)
                target = _vertex(backend, dependency.target, dependency.handler)
                graph.edges.append(Edge(source, target, maps))
    return graph


def _traced(bones: PreTrainedModel) -> torch_pruning.DependencyGraph:
    token_ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.long, device="meta")
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "use_cache": False}
    backend = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # RMSNorm weights are "unwrapped parameters": what we want
            backend.build_dependency(
                bones,
                inputs,
                output_transform=lambda output: output.logits,
                customized_pruners={Conv1D: Conv1DPruner()},
                verbose=False,
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{type(bones).__name__} cannot be traced ({reason}): it is not supported yet") from None
    return backend


def _is_attention(node: Node) -> bool:
    return isinstance(node.grad_fn, OpaqueAttention._backward_cls)


def _enters_attention(dependency: Any) -> bool:
    source, target = dependency.source, dependency.target
    return (_is_attention(source) and target not in source.outputs) or (
        _is_attention(target) and source not in target.outputs
    )


def _has_two_sides(node: Node) -> bool:
    return isinstance(node.module, nn.Linear | Conv1D)


def _vertex(backend: torch_pruning.DependencyGraph, node: Node, function: Any) -> Hashable:
    if not _has_two_sides(node):
        return (node, "both")
    is_output = function == backend.get_pruner_of_module(node.module).prune_out_channels
    return (node, "out" if is_output else "in")


def _ports(node: Node, side: str, names: Mapping[Tensor, str]) -> list[tuple[Port, str]]:
    """Ports of a node's `side`; ties are one port, because ports are named by parameter."""
    module = node.module
    if isinstance(module, nn.Linear | Conv1D):
        out_dim = 0 if isinstance(module, nn.Linear) else 1
        if side == "in":
            return [(Port(names[module.weight], 1 - out_dim), "column")]
        biases = [] if module.bias is None else [(Port(names[module.bias], 0), "row")]
        return [(Port(names[module.weight], out_dim), "row"), *biases]
    if isinstance(module, nn.Embedding):
        return [(Port(names[module.weight], 1), "column")]
    if isinstance(module, nn.Parameter):
        return [(Port(names[module], node.pruning_dim % module.ndim), "row")]
    if isinstance(module, nn.LayerNorm):
        return [(Port(names[parameter], 0), "row") for parameter in module.parameters()]
    if isinstance(module, nn.Module) and next(module.parameters(), None) is not None:
        raise InputError(f"{node.name}: a {type(module).__name__} is not supported yet")
    return []
