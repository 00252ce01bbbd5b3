"""A convolution of which some output or input channels are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from .layer import RowsLayer


class Convolution(RowsLayer):
    """``torch.nn.Conv1d`` or ``Conv2d``: a row is an output channel, a column an input channel.

    The weight `(out_channels, in_channels / groups, *kernel)` is its own matrix. With ``*`` the convolution that the
    base layer does, and of the same groups:

        rows:     y = x * W;  y[:, index] += x * delta          delta (k, in_channels / groups, *kernel)
        columns:  y = x * W + x[:, index] * delta               delta (out_channels, k, *kernel)

    Columns of a grouped convolution are refused: an input channel meets the output channels of its own group only.
    """

    def update_layer(self, adapter_name: str, axis: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as :meth:`RowsLayer.update_layer` does.

        Raises:
            InputError: if `index` does not fit the weight, or columns of a grouped convolution are asked for.
        """
        groups = self._convolution.groups
        if axis == "column" and groups > 1:
            raise InputError(f"columns of a convolution of {groups} groups cannot be trained: use its rows")
        super().update_layer(adapter_name, axis, *args, **kwargs)

    @property
    def _convolution(self) -> nn.Conv1d | nn.Conv2d:
        return self.base_layer  # type: ignore[return-value]

    @property
    def _channel_dim(self) -> int:
        return -1 - len(self._convolution.kernel_size)  # counted from the end: the batch may be missing

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """`x` through a convolution with the base's stride, padding and dilation, but these weights and groups."""
        base = self._convolution
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x = functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        convolve: Any = functional.conv1d if isinstance(base, nn.Conv1d) else functional.conv2d
        return convolve(x, weight, bias, base.stride, padding, base.dilation, groups)

    def with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """The base layer's `result` for `x (…, in_channels, *size)`, plus what the adapter adds to it."""
        index = self.rows_index[adapter_name].long()
        delta = self.rows_delta[adapter_name].to(x.dtype)
        if not self.trains_rows(adapter_name):
            # index_select copies: what autograd keeps is k channels, not the whole input.
            chosen = x.index_select(self._channel_dim, index)
            return result + self._convolve(chosen, delta, None, groups=1).to(result.dtype)
        bias = self.rows_bias[adapter_name].to(x.dtype) if adapter_name in self.rows_bias else None
        groups = 1
        if self._convolution.groups > 1:
            x, groups = x.index_select(self._channel_dim, self._seen_channels(index)), index.numel()
        change = self._convolve(x, delta, bias, groups)
        return result.index_add(self._channel_dim, index, change.to(result.dtype))

    def _seen_channels(self, index: Tensor) -> Tensor:
        """The input channels that each output channel of `index (k,)` sees, one after the other.

        Returns:
            `(k · in_channels / groups,)`.
        """
        base = self._convolution
        width = base.in_channels // base.groups
        group = index // (base.out_channels // base.groups)
        return (group.unsqueeze(1) * width + torch.arange(width, device=index.device)).flatten()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts linear layers only."""
        return False
