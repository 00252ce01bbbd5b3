"""A layer of which some rows or columns are trained.

The base weight, seen as a matrix ``W (out_features, in_features)``, stays frozen. An adapter is an index of k rows
(columns) and a delta, which is added to ``W[index]`` (to ``W[:, index]``). It acts in one of two ways:

held:   the slice of the weight is replaced by original + delta, and the forward pass is that of the base layer.
apart:  the base layer's output plus what the delta makes of the input, for weights that cannot be written to.

Structured sparse tuning of rows and columns is the parameterisation of S2FT (Yang et al., 2024, arXiv:2412.06289) and
SPruFT (arXiv:2502.11439); here the delta is a PEFT adapter of its own.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..records import AXES
from .kernel import held_linear
from .recipes import cast

OWN_WEIGHT = "rowscope_own_weight"
"""Attribute of a weight that its layer may write to; what stands there later, sharded or replaced, lacks it."""


def check_index(index: Tensor, size: int, where: str) -> None:
    """Raise InputError unless `index` holds sorted, unique whole numbers from 0 to `size` - 1."""
    if index.ndim != 1 or index.dtype.is_floating_point or index.numel() == 0:
        raise InputError(f"{where}: needs a non-empty list of whole numbers: select again")
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise InputError(f"{where}: has an index outside 0..{size - 1}: use the model it was selected on")
    if not bool((index[1:] > index[:-1]).all()):
        raise InputError(f"{where}: indices must be sorted and unique: select again")


def largest_rows(weight: Tensor, dim: int, num_rows: int) -> Tensor:
    """Sorted index `(num_rows,)` of the slices of `weight` along `dim` that have the largest L2 norm."""
    others = [other for other in range(weight.ndim) if other != dim]
    norms = torch.linalg.vector_norm(weight, dim=others, dtype=torch.float32)
    return norms.topk(num_rows).indices.sort().values


@dataclass(frozen=True)
class Replaced:
    """What stood in the base weight where an adapter has been written.

    Attributes:
        adapter_name: whose slice it is.
        weight: the k original rows (columns), in the base's dtype.
        bias: the k original entries of the bias, if the adapter trains them.
        owner: the parameter they were taken from.
    """

    adapter_name: str
    weight: Tensor
    bias: Tensor | None
    owner: nn.Parameter


class RowsLayer(BaseTunerLayer, nn.Module):
    """What every layer with trained rows or columns keeps, per adapter. Subclasses say how the weight is a matrix.

    Attributes:
        rows_delta: what is added to the chosen slice of :meth:`matrix`, fp32: `(k, in_features, …)` for rows,
            `(out_features, k, …)` for columns.
        rows_bias: what is added to the bias of chosen rows, fp32 `(k,)`, where it is trained.
        rows_index: which rows or columns, int32 `(k,)`.
        rows_axis: ``"row"`` or ``"column"``.
        rows_dropout: probability with which an input of the delta is dropped in training.
        is_tied: whether another module of the model uses the same weight; it is never written to then.
    """

    adapter_layer_names = ("rows_delta", "rows_bias")
    other_param_names = ("rows_index", "rows_axis", "rows_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, is_tied: bool = False, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.is_tied = is_tied
        self.rows_delta = nn.ParameterDict()
        self.rows_bias = nn.ParameterDict()
        self.rows_index = BufferDict(persistent=True)
        self.rows_axis: dict[str, str] = {}
        self.rows_dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._replaced: list[Replaced] = []
        self._tied_weight: list[nn.Parameter] = []  # the shared one, while a merged copy stands in its place
        self.out_features, self.in_features = self.matrix().shape[:2]
        # Whoever saves or loads the base weight means the base's own numbers.
        self.register_state_dict_pre_hook(_restore)
        self.register_load_state_dict_pre_hook(_restore)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def matrix(self) -> Tensor:
        """The base weight as `(out_features, in_features)`, or with a kernel's dimensions behind; shares memory."""
        return self._weight.data

    @property
    def _weight(self) -> nn.Parameter:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    # ------------------------------------------------------------------------------------------ adapters

    def update_layer(
        self,
        adapter_name: str,
        axis: str,
        num_rows: int,
        index: Tensor | None = None,
        train_bias: bool = False,
        dropout: float = 0.0,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter. Without an `index`, the `num_rows` rows (columns) of largest norm are taken.

        Raises:
            InputError: if `index` does not fit the weight.
        """
        self.restore()
        matrix, dim = self.matrix(), AXES.index(axis)
        size = (self.out_features, self.in_features)[dim]
        if index is None:
            if num_rows > size:
                warnings.warn(f"num_rows={num_rows}: a weight with {size} {axis}s trains all of them", stacklevel=2)
            index = largest_rows(matrix, dim, min(num_rows, size))
        else:
            check_index(index, size, f"adapter {adapter_name!r}, {axis}s of a weight {tuple(matrix.shape)}")
        shape = list(matrix.shape)
        shape[dim] = index.numel()
        # A start that is drawn is for tests of PEFT's, which want an adapter that does something.
        scale = 0.0 if init_weights else 0.02
        start = partial(torch.randn if scale else torch.zeros, dtype=torch.float32, device=matrix.device)
        self.rows_delta[adapter_name] = nn.Parameter(start(shape).mul_(scale))
        if train_bias and axis == "row" and self._bias is not None:
            self.rows_bias[adapter_name] = nn.Parameter(start([index.numel()]).mul_(scale))
        self.rows_index[adapter_name] = index.to(matrix.device, torch.int32)
        self.rows_axis[adapter_name] = axis
        self.rows_dropout[adapter_name] = dropout
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def trains_rows(self, adapter_name: str) -> bool:
        """Whether the adapter is of rows, not of columns."""
        return self.rows_axis[adapter_name] == "row"

    def adapters_in_use(self) -> list[str]:
        """Those that change the base layer's output and are not merged into it."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.rows_delta]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.restore()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, trainable unless `inference_mode`."""
        self.restore()
        super().set_adapter(adapter_names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; a merged one is taken out of the weight."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        self.restore()
        super().delete_adapter(adapter_name)

    def get_base_layer(self) -> nn.Module:
        """The layer below, its weight as it was, with merged adapters only."""
        self.restore()
        return super().get_base_layer()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype: in bf16 that rounds a delta that was trained in fp32.
        device = device or self._weight.device
        for parts in (self.rows_delta, self.rows_bias, self.rows_index):
            if adapter_name in parts and parts[adapter_name].device.type != "meta":
                parts[adapter_name] = parts[adapter_name].to(device)

    # ------------------------------------------------------------------------------------------ the slice

    def _slice(self, adapter_name: str) -> tuple[int, Tensor]:
        return AXES.index(self.rows_axis[adapter_name]), self.rows_index[adapter_name].long()

    def _write(self, replaced: Replaced) -> None:
        """Put the adapter's effective slice, original + delta, into the weight."""
        dim, index = self._slice(replaced.adapter_name)
        delta, matrix = self.rows_delta[replaced.adapter_name].data, self.matrix()
        matrix.index_copy_(dim, index, (replaced.weight + delta).to(matrix.dtype))
        if replaced.bias is not None and (bias := self._bias) is not None:
            changed = replaced.bias + self.rows_bias[replaced.adapter_name].data
            bias.data.index_copy_(0, index, changed.to(bias.dtype))

    def _replace(self, adapter_name: str) -> None:
        dim, index = self._slice(adapter_name)
        bias = None
        if adapter_name in self.rows_bias and self._bias is not None:
            bias = self._bias.data.index_select(0, index)
        self._replaced.append(Replaced(adapter_name, self.matrix().index_select(dim, index), bias, self._weight))
        self._write(self._replaced[-1])

    @torch.no_grad()
    def hold(self, adapter_name: str | None) -> None:
        """Make the base weight hold this adapter as it is now, or nothing."""
        if self.merged:
            return
        if self._held_adapter() != adapter_name:
            self.restore()
            if adapter_name is not None:
                self._replace(adapter_name)
        elif adapter_name is not None:
            self._write(self._replaced[-1])

    def held(self, adapter_name: str | None) -> Tensor:
        """The matrix as :meth:`hold` left it for this adapter, whatever has been done with the layer since."""
        if self._held_adapter() != adapter_name:
            self.hold(adapter_name)
        return self.matrix()

    def _held_adapter(self) -> str | None:
        return self._replaced[-1].adapter_name if self._replaced else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what a held adapter has replaced, bit for bit; merged ones stay.

        Raises:
            InputError: if the weight has been sharded or replaced since.
        """
        if self.merged:
            return
        while self._replaced:
            if self._replaced[-1].owner is not self._weight:
                raise InputError(
                    "a weight was sharded or replaced while trained rows were written in it: do so before the first "
                    "forward pass, or call restore() of every RowsLayer first"
                )
            replaced = self._replaced.pop()
            dim, index = self._slice(replaced.adapter_name)
            matrix = self.matrix()
            matrix.index_copy_(dim, index, replaced.weight.to(matrix.device, matrix.dtype))
            if replaced.bias is not None and self._bias is not None:
                self._bias.data.index_copy_(0, index, replaced.bias.to(matrix.device, matrix.dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight, keeping the replaced slices for :meth:`unmerge`.

        A weight that is tied to another module's is replaced by a merged copy: the other module keeps the base's.

        Raises:
            ValueError: if `safe_merge` is set and a merged weight would not be finite; nothing is merged then.
        """
        self.restore()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rows_delta]
        if names and self.is_tied and not self._tied_weight:
            self._tied_weight.append(self._weight)
            self.base_layer.weight = nn.Parameter(self._weight.detach().clone(), requires_grad=False)
        for name in names:
            self._replace(name)
            self.merged_adapters.append(name)
            if safe_merge and not self._is_finite(name):
                self.unmerge()
                raise ValueError(f"merging adapter {name!r} gives NaN or infinite weights: train it again")

    def _is_finite(self, adapter_name: str) -> bool:
        dim, index = self._slice(adapter_name)
        bias = self._bias
        return bool(self.matrix().index_select(dim, index).isfinite().all()) and (
            bias is None or bool(bias.data.isfinite().all())
        )

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit (subtracting the delta would round, in bf16 visibly)."""
        self.merged_adapters.clear()
        self.restore()
        while self._tied_weight:
            self.base_layer.weight = self._tied_weight.pop()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in the weight's shape, dense, fp32."""
        dim, index = self._slice(adapter_name)
        delta = self.rows_delta[adapter_name].detach()
        return delta.new_zeros(self.matrix().shape).index_copy_(dim, index, delta)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: rows are a LoRA with A = delta and one-hot B, columns one with one-hot A and B = delta."""
        return True

    def dropped(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x` with the adapter's dropout, in training."""
        return functional.dropout(x, self.rows_dropout[adapter_name], self.training)

    # ------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters, in its dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        self.restore()
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in self.adapters_in_use():
            result = self.with_delta(result, self.dropped(x, adapter_name), adapter_name)
        return result

    @abstractmethod
    def with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """The base layer's `result` for `x`, plus what the adapter adds to it."""

    def _apply(self, fn: Any, recurse: bool = True) -> RowsLayer:
        self.restore()  # what is kept of the weight would not move with it
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return "rows." + super().__repr__()


def _restore(layer: RowsLayer, *_: Any) -> None:
    layer.restore()


class Linear(RowsLayer):
    """``torch.nn.Linear``, or transformers' ``Conv1D``, of which some rows or columns are trained."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, is_tied: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, is_tied, **kwargs)
        setattr(self._weight, OWN_WEIGHT, True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        setattr(self._weight, OWN_WEIGHT, True)  # a deep copy has a weight of its own

    def matrix(self) -> Tensor:
        """The base weight as `(out_features, in_features)`; shares memory."""
        weight = self._weight.data
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in the weight's shape, dense, fp32."""
        delta = super().get_delta_weight(adapter_name)
        return delta.T if isinstance(self.base_layer, Conv1D) else delta

    def can_hold(self, adapter_names: list[str]) -> bool:
        """Whether the adapters may act by being written into the weight."""
        base = self.base_layer
        return not (
            len(adapter_names) > 1
            or self.is_tied
            or not hasattr(self._weight, OWN_WEIGHT)
            or any(parameter.requires_grad for parameter in base.parameters())
            or (self.training and any(self.rows_dropout[name] for name in adapter_names))
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or "forward" in vars(base)
            or torch.compiler.is_compiling()
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x (..., in_features)` -> `(..., out_features)` with the active adapters, in the dtype of the base."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_names = self.adapters_in_use()
        if not self.can_hold(adapter_names):
            return super().forward(x, *args, **kwargs)
        adapter_name = adapter_names[0] if adapter_names else None
        if torch.is_grad_enabled():
            if torch.is_autocast_enabled(x.device.type):
                x = cast(x, torch.get_autocast_dtype(x.device.type))
            return held_linear(x, self, adapter_name)
        self.hold(adapter_name)
        return self.base_layer(x, *args, **kwargs)

    def with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """The base layer's `result` for `x`, plus what the adapter adds to it."""
        index = self.rows_index[adapter_name].long()
        delta = self.rows_delta[adapter_name].to(x.dtype)
        if not self.trains_rows(adapter_name):
            # index_select copies: what autograd keeps is k columns, not the whole input.
            return result + functional.linear(x.index_select(-1, index), delta).to(result.dtype)
        bias = self.rows_bias[adapter_name].to(x.dtype) if adapter_name in self.rows_bias else None
        return result.index_add(-1, index, functional.linear(x, delta, bias).to(result.dtype))
