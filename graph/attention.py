"""Attention, read through transformers' attention interface: which rows of which projections reach which head.

Torch-Pruning cannot follow heads (GQA repeats, per-head norms, rotary embeddings). So during a trace every attention
is one opaque node, and a *probe* recovers the layout: the projections inside an attention module are made to return
their own row numbers, and what arrives at the attention function as query, key and value is read back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from ..errors import InputError

INTERFACE = "rowscope_probe"
PROJECTION_STRIDE = 10**7  # larger than any number of rows, small enough to stay exact in float64


LINEAR_LAYERS = (nn.Linear, Conv1D)


def out_features(layer: nn.Module) -> int:
    """Output features of one of :data:`LINEAR_LAYERS`."""
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features  # type: ignore[return-value]


@dataclass(frozen=True)
class Projection:
    """Where query, key or value comes from: ``rows[head, channel]`` are rows of the weight of `module`."""

    module: str
    rows: Tensor


@dataclass(frozen=True)
class AttentionLayout:
    """Query, key and value projections of one attention module; query heads are a multiple of key/value heads."""

    query: Projection
    key: Projection
    value: Projection


class OpaqueAttention(torch.autograd.Function):
    """Attention as one node of the autograd graph, which carries the module's name for whoever walks the graph."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, module_name: str) -> Tensor:
        """Zeros of shape ``(batch, tokens, heads, head_dim)`` from ``(batch, heads, tokens, head_dim)`` inputs."""
        ctx.module_name = module_name
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("the traced skeleton has no gradients")


class _Captured(Exception):  # noqa: N818 (a jump, not an error)
    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.tensors = (query, key, value)


class AttentionTrace:
    """What a trace sees of attention: names, call arguments, and afterwards the layouts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.seen: dict[str, nn.Module] = {}
        self.probing = False
        self._calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def _attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        if self.probing:
            raise _Captured(query, key, value)
        name = self.names[module]
        self.seen[name] = module
        return OpaqueAttention.apply(query, key, value, name), None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model's attention is opaque, rotary embeddings and per-head norms are identities."""
        AttentionInterface.register(INTERFACE, self._attention)
        AttentionMaskInterface.register(INTERFACE, lambda *_, **__: None)
        with ExitStack() as stack:
            for config in {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}.values():
                stack.enter_context(_attribute(config, "_attn_implementation_internal", INTERFACE))
            for modelling in {sys.modules[type(module).__module__] for module in self.model.modules()}:
                if hasattr(modelling, "apply_rotary_pos_emb"):
                    stack.enter_context(_attribute(modelling, "apply_rotary_pos_emb", _unrotated))
            for module in self.model.modules():
                for norm in _per_head_norms(module):
                    stack.enter_context(_instance_forward(norm, _first))
                handle = module.register_forward_pre_hook(self._record, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module] = (args, kwargs)

    def layout(self, name: str) -> AttentionLayout:
        """Probe the attention module called `name`. Only within :meth:`active`, after the traced forward.

        Raises:
            InputError: if its heads are not made of whole rows of its projections.
        """
        module = self.seen[name]
        projections = {part: child for part, child in module.named_modules() if isinstance(child, LINEAR_LAYERS)}
        args, kwargs = tree_map(_blank, self._calls[module])
        self.probing = True
        try:
            with ExitStack() as stack, torch.no_grad():
                for number, projection in enumerate(projections.values()):
                    rows = torch.arange(out_features(projection), dtype=torch.float64) + number * PROJECTION_STRIDE
                    stack.enter_context(_instance_forward(projection, _constant(rows)))
                module(*args, **kwargs)
        except _Captured as captured:
            names = [f"{name}.{child_name}" for child_name in projections]
            query, key, value = captured.tensors
            if not _whole(query):  # some models scale the query before the attention, not within
                query = query / getattr(module, "scaling", 1.0)
            return AttentionLayout(*(_read_rows(name, tensor, names) for tensor in (query, key, value)))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{name}: its heads cannot be read ({reason}): it is not supported yet") from None
        finally:
            self.probing = False
        raise InputError(f"{name} does not call transformers' attention interface: its heads cannot be traced")


def _read_rows(attention: str, tensor: Tensor, projections: list[str]) -> Projection:
    """Undo the row numbering of ``(batch, heads, tokens, head_dim)``."""
    rounded = tensor[0, :, 0].double().round()
    owners = (rounded / PROJECTION_STRIDE).floor().unique()
    if not _whole(tensor) or len(owners) != 1 or not 0 <= owners[0] < len(projections):
        raise InputError(f"{attention}: unsupported head layout, its heads are not whole rows of one projection")
    return Projection(projections[int(owners[0])], (rounded % PROJECTION_STRIDE).long())


def _whole(tensor: Tensor) -> bool:
    """Whether all numbers are whole but for rounding; relative tolerance would accept any number of that size."""
    return torch.allclose(tensor.double(), tensor.double().round(), rtol=0, atol=1e-3)


def _per_head_norms(module: nn.Module) -> list[nn.Module]:
    head_dim = getattr(module, "head_dim", None)
    return [
        child
        for child in module.children()
        if type(module).__name__.endswith("Attention")
        and "Norm" in type(child).__name__
        and [tuple(parameter.shape) for parameter in child.parameters()] == [(head_dim,)]
    ]


def _blank(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype)
    return None if isinstance(value, Cache) else value


def _unrotated(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query, key


def _first(tensor: Tensor) -> Tensor:
    return tensor


def _constant(rows: Tensor) -> Any:
    return lambda hidden: rows.expand(*hidden.shape[:-1], len(rows))


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _instance_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace the forward of one instance only: the class is shared with the user's live model."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
