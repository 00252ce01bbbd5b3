"""From a model to its graph: Torch-Pruning traces a weightless skeleton while labels run along."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from ..errors import InputError
from ..watchdog import within
from .backend import dataflow, dependency_graph, disagreement
from .dispatch import LabelTrace, ListIndices
from .grouping import coupled_groups
from .invariants import check
from .labels import Untraceable
from .skeleton import blocks, made_up, skeleton
from .structure import ModelGraph

TIME_LIMIT = 300.0
"""Seconds for one trace; a 70B needs a few."""


def trace(model: nn.Module, example_inputs: Any = None, *, time_limit: float = TIME_LIMIT) -> ModelGraph:
    """The graph of a model: its coupled groups and its dataflow. The model itself is not touched.

    Args:
        model: a transformers model, or any module if `example_inputs` are given. It may be frozen, quantised,
            offloaded, or on the meta device.
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or one tensor; small ones suffice.
            For a transformers model a few tokens (or an image, or sound) are made up.
        time_limit: seconds after which a trace that does not end is refused.

    Raises:
        InputError: if the forward fails or does something of which the coupling is not known, by name and reason.
    """
    bones = skeleton(model)
    name = type(bones).__name__
    tries = made_up(bones) if example_inputs is None else [_as_dict_or_tuple(example_inputs)]
    for number, inputs in enumerate(tries, start=1):
        try:
            graph = within(time_limit, f"the trace of {name}", partial(_traced, bones, tree_map(_weightless, inputs)))
            break
        except ForwardFails as error:
            if number == len(tries):
                own = "check its configuration, or give trace example_inputs"
                mend = own if example_inputs is None else "check example_inputs"
                raise InputError(f"{name} cannot be traced, its forward fails ({error}): {mend}") from None
    if graph.unreached:
        names, more = ", ".join(graph.unreached[:3]), len(graph.unreached) - 3
        warnings.warn(
            f"the traced forward does not use {names}{f' and {more} more' if more > 0 else ''}", stacklevel=2
        )
    return graph


class ForwardFails(Exception):  # noqa: N818 (says what happened)
    """The model's own forward raised."""


def _traced(bones: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> ModelGraph:
    name = type(bones).__name__

    def forward(module: nn.Module, given: Any) -> Any:
        with labels, ListIndices(), sdpa_kernel(SDPBackend.MATH):
            return module(**given) if isinstance(given, Mapping) else module(*given)

    try:
        labels = LabelTrace(bones)
        backend = dependency_graph(bones, inputs, forward)
    except Untraceable as verdict:
        raise InputError(f"{name} cannot be traced: {verdict}") from None
    except Exception as error:  # whatever a forward raises
        raise ForwardFails(" ".join(str(error).split())[:200]) from None
    labels.forget()
    stages = blocks(bones)
    groups = coupled_groups(labels, stages, _ties(bones))
    check(groups, labels.shapes)
    broken = disagreement(backend, groups)
    if broken is not None:
        group, first, second = broken
        raise InputError(
            f"{name} cannot be traced: {first.parameter} and {second.parameter} share channels ({group.id}), "
            "but Torch-Pruning finds no dependency between them"
        )
    return ModelGraph(
        groups=groups,
        shapes=labels.shapes,
        flops=labels.flops,
        inputs=_shapes(inputs),
        blocks=tuple(stages),
        unreached=tuple(name for name, _ in bones.named_parameters() if name not in labels.used),
        buffers=frozenset(labels.shapes) - {name for name, _ in bones.named_parameters()},
        dataflow=dataflow(backend),
    )


def _as_dict_or_tuple(inputs: Any) -> Mapping[str, Any] | tuple[Any, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs)
    raise InputError(f"example_inputs are a {type(inputs).__name__}: give a tensor, a tuple or a dict of tensors")


def _weightless(value: Any) -> Any:
    """Numbers as meta tensors; token ids and masks stay real, for models that branch on them."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("meta") if value.is_floating_point() else value.detach().clone()


def _shapes(inputs: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    named = inputs.items() if isinstance(inputs, Mapping) else ((str(n), value) for n, value in enumerate(inputs))
    return {name: tuple(value.shape) for name, value in named if isinstance(value, Tensor)}


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name -> all names, of parameters that have several."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return {found[0]: tuple(found) for found in names.values() if len(found) > 1}
