"""Experts kept together in one 3-D parameter: as the linear layers that they are, sharing the parameter's memory.

A mixture of transformers 5 keeps all experts of a block in ``gate_up_proj (experts, 2 * intermediate, hidden)`` and
``down_proj (experts, hidden, intermediate)``. Rows and columns are scored and tuned in matrices that are called one by
one, so each expert becomes a linear layer with the module name ``….gate_up_proj.<expert>``, while nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SWITCHES = ("has_gate", "has_bias", "is_transposed")
"""What transformers' ``use_experts_implementation`` writes down of the experts' layout."""


def is_fused(module: Any) -> bool:
    """Whether `module` keeps experts in 3-D parameters, in a layout that transformers' own attributes describe.

    Left alone are experts in eight bits or less, those that are spread over devices, and those whose forward something
    else has replaced.
    """
    if not all(hasattr(module, switch) for switch in SWITCHES) or "forward" in vars(module):
        return False
    names, parameters = projections(module), module._parameters
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    return (
        parameters.keys() == {*names, *biases}
        and all(type(value) is nn.Parameter and _is_plain(value.dtype) for value in parameters.values())
        and all(parameters[name].ndim == 3 for name in names)
        and not getattr(module, "_is_expert_parallel", False)
    )


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def projections(fused: Any) -> tuple[str, str]:
    """Names of the two parameters of fused experts, in the order of their use."""
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


def _part(fused: Any, projection: str, expert: int) -> tuple[Tensor, Tensor | None]:
    """Weight `(out_features, in_features)` and bias of one expert, as views of the parameters."""
    weight = getattr(fused, projection).data[expert]
    bias = getattr(fused, f"{projection}_bias").data[expert] if fused.has_bias else None
    return weight.T if fused.is_transposed else weight, bias


def linear(fused: Any, projection: str, expert: int) -> nn.Linear:
    """One expert's linear layer; its weight and bias are views of the fused parameters."""
    weight, bias = _part(fused, projection, expert)
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")  # nothing is drawn there
    # Not registered as usual: PEFT's low_cpu_mem_usage has whatever is registered moved to the meta device.
    layer._parameters["weight"] = nn.Parameter(weight, getattr(fused, projection).requires_grad)
    if bias is not None:
        layer._parameters["bias"] = nn.Parameter(bias, getattr(fused, f"{projection}_bias").requires_grad)
    return layer


def linears(fused: Any) -> dict[str, nn.Linear]:
    """``<projection>.<expert>`` -> :func:`linear`, of all experts."""
    return {
        f"{projection}.{expert}": linear(fused, projection, expert)
        for projection in projections(fused)
        for expert in range(len(getattr(fused, projection)))
    }


def submodule(model: nn.Module, name: str) -> nn.Module:
    """``model.get_submodule(name)``, where `name` may be that of an expert in a fused parameter too.

    Raises:
        AttributeError: if there is no such module.
    """
    owner, _, rest = name.rpartition(".")
    owner, _, projection = owner.rpartition(".")
    fused = model.get_submodule(owner)
    return linear(fused, projection, int(rest)) if is_fused(fused) else model.get_submodule(name)


def tokens_of(inputs: Tensor) -> tuple[Tensor, int] | None:
    """Which tokens of a batch an expert's layer has been given, and how many the batch has; None of other layers.

    Tokens are counted through all examples of the batch, padding too: `(tokens of the expert,)`.
    """
    return getattr(inputs, "_tokens", None)


def _tagged(inputs: Tensor, tokens: tuple[Tensor, int]) -> Tensor:
    inputs._tokens = tokens  # type: ignore[attr-defined]
    return inputs


class SeparateExperts(nn.Module):
    """Stands in for fused experts: a linear layer for each, whose weights are views of the fused parameters.

    Children are those of the fused module (its activation function, its norm) and, under the names of its parameters,
    lists of ``nn.Linear``. The fused module itself is no child: its parameters are not counted twice.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self._fused = (fused,)
        self._linears = linears(fused)
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name in projections(fused):
            own = [layer for key, layer in self._linears.items() if key.startswith(f"{name}.")]
            self.add_module(name, nn.ModuleList(own).train(fused.training))
        self.training = fused.training

    @property
    def fused(self) -> Any:
        """The module that this one stands in for."""
        return self._fused[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What transformers' ``batched_mm`` computes, an expert at a time; experts without a token are not called.

        Args:
            hidden_states: `(tokens, hidden)`.
            top_k_index: each token's experts, `(tokens, k)`.
            top_k_weights: how much each of them counts, `(tokens, k)`.

        Returns:
            `(tokens, hidden)`, in the dtype of `hidden_states`.
        """
        first, down = (list(self.get_submodule(name).children()) for name in projections(self.fused))
        k, weights, experts = top_k_index.shape[-1], top_k_weights.reshape(-1, 1), top_k_index.flatten()
        order = experts.argsort(stable=True)
        outputs = []
        for expert, places in enumerate(order.split(experts.bincount(minlength=len(first)).tolist())):
            if len(places):
                tokens = (places // k, len(hidden_states))
                # Gathered for each expert: of slices of one tensor, a single one would keep all of it for autograd.
                inner = self._activated(first[expert](_tagged(hidden_states[tokens[0]], tokens)))
                outputs.append(self._normed(down[expert](_tagged(inner, tokens))) * weights[places])
        result = torch.cat(outputs)[order.argsort()]
        return result.unflatten(0, (-1, k)).sum(dim=1).to(hidden_states.dtype)

    def _activated(self, x: Tensor) -> Tensor:
        return self.fused._apply_gate(x) if self.fused.has_gate else self.fused.act_fn(x)

    def _normed(self, x: Tensor) -> Tensor:
        return self.fused.post_expert_norm(x) if getattr(self.fused, "has_post_expert_norm", False) else x

    # ------------------------------------------------------------------------------------------ shared memory

    def _shared(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The layers' parameters, each with the part of a fused parameter that it is to be a view of."""
        for key, layer in self._linears.items():
            projection, _, expert = key.rpartition(".")
            weight, bias = _part(self.fused, projection, int(expert))
            yield layer.weight, weight
            if bias is not None:
                yield layer.bias, bias

    @torch.no_grad()
    def share(self) -> None:
        """Make the weights views of the fused parameters again where they are not, keeping their numbers."""
        for parameter, part in self._shared():
            if parameter.data_ptr() != part.data_ptr():
                part.copy_(parameter)
                parameter.data = part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeparateExperts:
        if not recurse:  # it has no tensors of its own
            return super()._apply(fn, recurse)
        super()._apply(lambda tensor: tensor)  # whoever has written to a weight takes that back before it moves
        self.share()
        self.fused._apply(fn, recurse=False)
        moved = {id(parameter): part for parameter, part in self._shared()}
        return super()._apply(lambda tensor: moved[id(tensor)] if id(tensor) in moved else fn(tensor))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.share()  # a deep copy has a memory of its own for each

    # ------------------------------------------------------------------------------------------ the way back

    def is_whole(self) -> bool:
        """Whether every expert's layer is still in its place, with no adapter around it."""
        return all(self.get_submodule(key) is layer for key, layer in self._linears.items())

    def joined(self) -> nn.Module:
        """The fused module, with all that the layers' weights hold."""
        self.share()
        fused = self.fused
        fused.training = self.training
        for name in projections(fused):
            layers = [layer for key, layer in self._linears.items() if key.startswith(f"{name}.")]
            getattr(fused, name).requires_grad_(any(layer.weight.requires_grad for layer in layers))
            if fused.has_bias:
                getattr(fused, f"{name}_bias").requires_grad_(any(layer.bias.requires_grad for layer in layers))
        return fused


def separate(model: nn.Module) -> list[SeparateExperts]:
    """Put :class:`SeparateExperts` in the place of all fused experts within `model`; these are returned."""
    made = {module: SeparateExperts(module) for module in model.modules() if is_fused(module)}
    _replace(model, made)
    return list(made.values())


def fuse(model: nn.Module, separated: Iterable[SeparateExperts] | None = None) -> None:
    """Undo :func:`separate`, for all of `model` or only for those given; where an adapter is, nothing is changed."""
    every = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    chosen = every if separated is None else separated
    _replace(model, {module: module.joined() for module in chosen if module.is_whole()})


@contextmanager
def separated(model: nn.Module) -> Iterator[None]:
    """Within it the experts of `model` are separate; afterwards it is as it was, module for module."""
    made = separate(model)
    try:
        yield
    finally:
        fuse(model, made)


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules wherever those of `new` are, also where one is in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
