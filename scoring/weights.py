"""The weights whose rows and columns are scored, whichever way a layer keeps them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import models
from ..errors import InputError
from ..quant.layers import dequantise, is_quantised

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight seen as a matrix of ``out_features`` rows and ``in_features`` columns.

    Attributes:
        name: of its module.
        module: the layer: linear (full or quantised), transformers' Conv1D, a convolution, or an embedding, whose rows
            are the embedding's features and whose columns are the tokens.
        out_features: rows; output channels of a convolution.
        in_features: columns; input channels of a convolution.
        transposed: whether the layer keeps it as ``(in_features, out_features)``.
        groups: of a convolution; each group's rows meet only the group's own columns.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool = False
    groups: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """What the layer keeps; packed bytes where it is quantised."""
        return self.module.weight  # type: ignore[return-value]

    @cached_property
    def is_quantised(self) -> bool:
        """Whether the layer keeps 4-bit or 8-bit numbers."""
        return is_quantised(self.module)

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return self.out_features * self.in_features if self.is_quantised else self.parameter.numel()

    def values(self) -> Tensor:
        """The weights in float32, in the layer's own layout; dequantised ones are ``(out_features, in_features)``."""
        return dequantise(self.module) if self.is_quantised else self.parameter.detach().float()

    def reduce(self, values: Tensor, finish: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, Tensor]:
        """Sum a tensor in the layout of :meth:`values` over each row, and over each column.

        Returns:
            ``row`` ``(out_features,)`` and ``column`` ``(in_features,)``, each passed through `finish`.
        """
        if self.transposed:
            row, column = values.sum(dim=0), values.sum(dim=1)
        elif values.ndim == 2:
            row, column = values.sum(dim=1), values.sum(dim=0)
        else:  # (out_features, in_features / groups, kernel…)
            row = values.flatten(1).sum(dim=1)
            column = values.flatten(2).sum(dim=2).unflatten(0, (self.groups, -1)).sum(dim=1).flatten()
        return {"row": finish(row), "column": finish(column)}

    def by_column(self, values: Tensor) -> Tensor:
        """Values of the columns ``(in_features,)``, shaped to broadcast against :meth:`values`."""
        if self.transposed:
            return values.unsqueeze(1)
        if not isinstance(self.module, CONVOLUTIONS):
            return values
        rows = values.unflatten(0, (self.groups, -1)).repeat_interleave(self.out_features // self.groups, dim=0)
        return rows.reshape(*rows.shape, *(1 for _ in self.module.kernel_size))

    def by_row(self, values: Tensor) -> Tensor:
        """Values of the rows ``(out_features,)``, shaped to broadcast against :meth:`values`."""
        if self.transposed:
            return values
        dimensions = 2 if self.is_quantised else self.parameter.ndim
        return values.reshape(-1, *(1 for _ in range(dimensions - 1)))


def view(name: str, module: nn.Module) -> Weight | None:
    """How a layer's weight is a matrix; None for layers that have none."""
    if is_quantised(module):
        # On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first forward pass in evaluation mode;
        # whoever dequantises it afterwards, the backward pass too, reads garbage.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return Weight(name, module, module.out_features, module.in_features)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return Weight(name, module, module.out_features, module.in_features)
    if isinstance(module, Conv1D):
        return Weight(name, module, module.nf, module.nx, transposed=True)
    if isinstance(module, CONVOLUTIONS):
        return Weight(name, module, module.out_channels, module.in_channels, groups=module.groups)
    if isinstance(module, nn.Embedding):
        return Weight(name, module, module.embedding_dim, module.num_embeddings, transposed=True)
    return None


def scored_weights(model: nn.Module, target_modules: Sequence[str] = ()) -> dict[str, Weight]:
    """The weights that are scored, by module name, in the model's order.

    Args:
        model: any module.
        target_modules: as PEFT's: endings of module names (``q_proj``, ``mlp.fc1``) or regular expressions for whole
            ones. By default every linear layer and convolution in the model's blocks; of a model without blocks,
            every one there is. Embeddings and heads are scored only if they are named.

    Raises:
        InputError: if a target matches nothing, or a weight cannot be read (on the meta device, or of a kind that
            rowscope does not know).
    """
    found = {name: weight for name, module in model.named_modules() if (weight := view(name, module)) is not None}
    if target_modules:
        matching = {target: {name for name in found if _matches(name, target)} for target in target_modules}
        for target, names in matching.items():
            if not names:
                example = next(iter(found), "").rpartition(".")[2]
                raise InputError(
                    f"target module {target!r} matches no linear layer, convolution or embedding: use endings of "
                    f"their names, e.g. {example}, or regular expressions for whole names"
                )
        wanted = set().union(*matching.values())
    else:
        blocks = tuple(f"{name}." for name in models.layers(model))
        wanted = {
            name
            for name, weight in found.items()
            if not isinstance(weight.module, nn.Embedding) and (not blocks or f"{name}.".startswith(blocks))
        }
    weights = {name: weight for name, weight in found.items() if name in wanted}
    if not weights:
        raise InputError("the model has no linear layer or convolution: there is nothing to score")
    for weight in weights.values():
        _check_readable(weight)
    return weights


def _matches(name: str, target: str) -> bool:
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error:
        return False


def _check_readable(weight: Weight) -> None:
    parameter = weight.parameter
    if parameter.is_meta:
        raise InputError(f"{weight.name} is on the meta device, it has no weights: load the model with its weights")
    if not weight.is_quantised and not (type(parameter) is nn.Parameter and parameter.dtype.is_floating_point):
        kind = f"{type(parameter).__name__} of {str(parameter.dtype).removeprefix('torch.')}"
        raise InputError(f"{weight.name} holds a {kind}, which cannot be read: use a full or a bitsandbytes base")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device
