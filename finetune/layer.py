"""A linear layer of which some rows or columns are trained.

The base weight ``W (out_features, in_features)`` stays frozen. An adapter is an index of k rows (columns) and a delta:

    row:     y = x Wᵀ;  y[..., index] += x deltaᵀ          delta (k, in_features)
    column:  y = x Wᵀ + x[..., index] deltaᵀ               delta (out_features, k)

Merged, it is ``W[index] + delta`` or ``W[:, index] + delta``. Structured sparse tuning of rows and columns is the
parameterisation of S2FT (Yang et al., 2024, arXiv:2412.06289); here the delta is a PEFT adapter of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..records import AXES


def check_index(index: Tensor, size: int, where: str) -> None:
    """Raise InputError unless `index` holds sorted, unique whole numbers from 0 to `size` - 1."""
    if index.ndim != 1 or index.dtype.is_floating_point or index.numel() == 0:
        raise InputError(f"{where}: needs a non-empty list of whole numbers: select again")
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise InputError(f"{where}: has an index outside 0..{size - 1}: use the model it was selected on")
    if not bool((index[1:] > index[:-1]).all()):
        raise InputError(f"{where}: indices must be sorted and unique: select again")


def largest_rows(weight: Tensor, axis: str, num_rows: int) -> Tensor:
    """Sorted index `(num_rows,)` of the rows (columns) of `weight (out_features, in_features)` of largest L2 norm."""
    norms = torch.linalg.vector_norm(weight, dim=1 - AXES.index(axis), dtype=torch.float32)
    return norms.topk(num_rows).indices.sort().values


class RowsLayer(BaseTunerLayer):
    """What every layer with trained rows or columns keeps, per adapter.

    Attributes:
        rows_delta: what is added to the chosen slice of the weight, fp32: `(k, in_features)` for rows,
            `(out_features, k)` for columns.
        rows_index: which rows or columns, int32 `(k,)`.
        rows_axis: ``"row"`` or ``"column"``.
    """

    adapter_layer_names = ("rows_delta",)
    other_param_names = ("rows_index", "rows_axis")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.rows_delta = nn.ParameterDict()
        self.rows_index = BufferDict(persistent=True)
        self.rows_axis: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._unmerged_slices: dict[str, Tensor] = {}
        self.out_features, self.in_features = self.weight.shape

    def update_layer(
        self,
        adapter_name: str,
        axis: str,
        num_rows: int,
        index: Tensor | None = None,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter. Without an `index`, the `num_rows` rows (columns) of largest norm are taken.

        Raises:
            InputError: if `index` does not fit the weight.
        """
        weight = self.weight
        size = weight.shape[AXES.index(axis)]
        if index is None:
            if num_rows > size:
                warnings.warn(f"num_rows={num_rows}: a weight with {size} {axis}s trains all of them", stacklevel=2)
            index = largest_rows(weight.detach(), axis, min(num_rows, size))
        else:
            check_index(index, size, f"adapter {adapter_name!r}, {axis}s of a weight {tuple(weight.shape)}")
        shape = (index.numel(), self.in_features) if axis == "row" else (self.out_features, index.numel())
        delta = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        if not init_weights:
            nn.init.normal_(delta, std=0.02)
        self.rows_delta[adapter_name] = nn.Parameter(delta)
        self.rows_index[adapter_name] = index.to(weight.device, torch.int32)
        self.rows_axis[adapter_name] = axis
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype: in bf16 that rounds a delta that was trained in fp32.
        if adapter_name not in self.rows_delta:
            return
        device = device or self.weight.device
        if self.rows_delta[adapter_name].device.type != "meta":
            self.rows_delta[adapter_name] = self.rows_delta[adapter_name].to(device)
        self.rows_index[adapter_name] = self.rows_index[adapter_name].to(device)

    def _dim_and_index(self, adapter_name: str) -> tuple[int, Tensor]:
        return AXES.index(self.rows_axis[adapter_name]), self.rows_index[adapter_name].long()


class Linear(nn.Module, RowsLayer):
    """``torch.nn.Linear`` of which some rows or columns are trained."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        RowsLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x (..., in_features)` -> `(..., out_features)` with the active adapters, in the dtype of the base."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name not in self.rows_delta:
                continue
            delta, index = self.rows_delta[adapter_name], self.rows_index[adapter_name].long()
            if self.rows_axis[adapter_name] == "row":
                change = functional.linear(x.to(delta.dtype), delta)
                result = result.index_add(-1, index, change.to(result.dtype))
            else:
                # index_select copies: what autograd keeps is k columns, not the whole input.
                change = functional.linear(x.index_select(-1, index).to(delta.dtype), delta)
                result = result + change.to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight, keeping the replaced slices for :meth:`unmerge`.

        Raises:
            ValueError: if `safe_merge` is set and a merged weight would not be finite; nothing is changed then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.rows_delta:
                continue
            weight = self.weight.data
            dim, index = self._dim_and_index(adapter_name)
            delta = self.rows_delta[adapter_name].detach()
            original = weight.index_select(dim, index)
            merged = (original.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not bool(merged.isfinite().all()):
                raise ValueError(f"merging adapter {adapter_name!r} gives NaN or infinite weights: train it again")
            weight.index_copy_(dim, index, merged)
            self._unmerged_slices[adapter_name] = original
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit (subtracting the delta would round, in bf16 visibly)."""
        weight = self.weight.data
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            dim, index = self._dim_and_index(adapter_name)
            weight.index_copy_(dim, index, self._unmerged_slices.pop(adapter_name).to(weight.device))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the weight, dense: `(out_features, in_features)`, fp32."""
        dim, index = self._dim_and_index(adapter_name)
        delta = self.rows_delta[adapter_name].detach()
        return delta.new_zeros(self.out_features, self.in_features).index_copy_(dim, index, delta)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: rows are a LoRA with A = delta and one-hot B, columns one with one-hot A and B = delta."""
        return True

    def __repr__(self) -> str:
        return "rows." + super().__repr__()
