"""Torch-Pruning as the tracing backend: which layers depend on which.

Read are ``module2node`` and ``Node.dependencies`` of its DependencyGraph (Fang et al. 2023, "DepGraph: Towards Any
Structural Pruning", section 3). Its index maps are guessed from sizes, wrong or endless on grouped-query attention,
and not asked for; which index goes with which is in ``labels``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import networkx
import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning.dependency import index_mapping
from transformers.pytorch_utils import Conv1D

from .structure import CouplingGroup, Port

Node = Any
"""A node of Torch-Pruning's graph: a module, a parameter or an operation."""


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


def dependency_graph(model: nn.Module, inputs: Any, forward: Callable[..., Any]) -> torch_pruning.DependencyGraph:
    """Let Torch-Pruning trace ``forward(model, inputs)``."""
    backend = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad(), _without_index_maps():
        warnings.simplefilter("ignore")  # RMSNorm weights are "unwrapped parameters": what we want
        backend.build_dependency(
            model,
            inputs,
            forward_fn=forward,
            output_transform=lambda out: [
                t for t in tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None
            ],
            customized_pruners={Conv1D: Conv1DPruner()},
            ignored_layers=[module for module in model.modules() if _is_unusual(module)],
            verbose=False,
        )
    return backend


def _is_unusual(module: nn.Module) -> bool:
    """A linear layer in name only (a router): Torch-Pruning expects one tensor to come out of it."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


@contextmanager
def _without_index_maps() -> Iterator[None]:
    """Their recursion over sizes may never end, and their result is not read."""
    original = index_mapping.update_index_mapping
    index_mapping.update_index_mapping = lambda graph: None
    try:
        yield
    finally:
        index_mapping.update_index_mapping = original


def dataflow(backend: torch_pruning.DependencyGraph) -> networkx.DiGraph:
    """Layers, parameters and operations, with an edge wherever one feeds another."""
    parameters = {parameter: name for name, parameter in backend.model.named_parameters()}
    names: dict[Any, str] = {}
    graph: networkx.DiGraph = networkx.DiGraph()
    for number, (module, node) in enumerate(backend.module2node.items()):
        if isinstance(module, nn.Parameter):
            kind, name, type_ = "parameter", parameters[module], "Parameter"
        elif isinstance(module, nn.Module):
            operation = module not in backend._module2name
            kind, type_ = ("operation" if operation else "layer"), type(module).__name__
            name = f"operation {number}" if operation else backend._module2name[module]
        else:
            kind, name, type_ = (
                "operation",
                f"operation {number}",
                str(getattr(module, "_name", type(module).__name__)),
            )
        names[node] = name
        graph.add_node(name, kind=kind, type=type_)
    graph.add_edges_from((names[node], names[after]) for node in names for after in node.outputs)
    return graph


def disagreement(
    backend: torch_pruning.DependencyGraph, groups: Iterable[CouplingGroup]
) -> tuple[CouplingGroup, Port, Port] | None:
    """A group with two ports that Torch-Pruning's dependencies do not connect, or None.

    It treats what it does not know as passing channels on, so it may connect more than the groups do, never less. Of
    weights that are used outside of their layer it sees nothing: it is no witness for groups with such weights.
    """
    pruners = {node: backend.get_pruner_of_module(module) for module, node in backend.module2node.items()}

    def vertex(node: Node, function: Any) -> tuple[Node, str]:
        if not _has_two_sides(pruners[node]):
            return node, "both"
        return node, "out" if function == pruners[node].prune_out_channels else "in"

    graph: networkx.Graph = networkx.Graph()
    for node in pruners:
        for dependency in node.dependencies:
            graph.add_edge(vertex(node, dependency.trigger), vertex(dependency.target, dependency.handler))
    for place, port in _ports(backend):
        graph.add_edge(place, port)  # a tied weight hangs on several
    parameters = {name for name, _ in backend.model.named_parameters()}
    component = {
        place: number for number, places in enumerate(networkx.connected_components(graph)) for place in places
    }
    for group in groups:
        ports = [
            replace(m.port, expert=None) for m in group.members if not m.shared and m.port.parameter in parameters
        ]
        if all(port in component for port in ports):
            for port in ports:
                if component[port] != component[ports[0]]:
                    return group, ports[0], port
    return None


def _has_two_sides(pruner: Any) -> bool:
    return pruner.prune_in_channels != pruner.prune_out_channels


def _ports(backend: torch_pruning.DependencyGraph) -> Iterator[tuple[Hashable, Port]]:
    """Vertices of Torch-Pruning's layers and parameters with the ports that hang on them."""
    names = {parameter: name for name, parameter in backend.model.named_parameters()}
    for module, node in backend.module2node.items():
        parameters = [module] if isinstance(module, nn.Parameter) else []
        if isinstance(module, nn.Module):
            parameters = list(module.parameters(recurse=False))
        two_sided = _has_two_sides(backend.get_pruner_of_module(module))
        for parameter in parameters:
            for dim in range(parameter.ndim):
                for side in _sides(module, parameter, dim) if two_sided else ("both",):
                    yield (node, side), Port(names[parameter], dim)


def _sides(module: nn.Module, parameter: nn.Parameter, dim: int) -> tuple[str, ...]:
    """Sides of a layer that a dim of its parameter may belong to; of layers with inner states, both."""
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd | Conv1D):
        return ("in", "out")
    reading = 0 if isinstance(module, Conv1D | nn.modules.conv._ConvTransposeNd) else 1
    return ("in",) if parameter.ndim > 1 and dim == reading else ("out",)
