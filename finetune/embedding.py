"""An embedding of which some features, or the vectors of some tokens, are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from .layer import RowsLayer


class Embedding(RowsLayer):
    """``torch.nn.Embedding``: a row is a feature, a column is a token.

    The matrix is the transposed weight `(features, tokens)`, as that of a linear map of one-hot tokens:

        rows:     y = W[:, ids];  y[..., index] += delta[:, ids]                       delta (k, tokens)
        columns:  y = W[:, ids], plus delta[:, position of id in index] if it is one   delta (features, k)

    As in the base layer, the vector of ``padding_idx`` gets no gradient.

    Raises:
        InputError: if the base renormalises its weight in every forward pass (``max_norm``).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, is_tied: bool = False, **kwargs: Any) -> None:
        if base_layer.max_norm is not None:
            raise InputError("an embedding with max_norm changes its weight in use: leave it out of target_modules")
        super().__init__(base_layer, adapter_name, is_tied, **kwargs)

    def matrix(self) -> Tensor:
        """The base weight as `(features, tokens)`; shares memory."""
        return self._weight.data.T

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, `(tokens, features)`, dense, fp32."""
        return super().get_delta_weight(adapter_name).T

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts linear layers only."""
        return False

    def dropped(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x` as it is: tokens are numbers; :meth:`with_delta` drops what the delta makes of them."""
        return x

    def with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """The base layer's `result` for tokens `x (…)`, plus what the adapter adds to it."""
        index = self.rows_index[adapter_name].long()
        if self.trains_rows(adapter_name):
            change = self._drop(self._row_change(x, adapter_name), adapter_name)
            return result.index_add(-1, index, change.to(result.dtype))
        return result + self._drop(self._column_change(x, index, adapter_name), adapter_name).to(result.dtype)

    def _drop(self, change: Tensor, adapter_name: str) -> Tensor:
        """`change (…, features)` without the tokens that dropout takes, as if they were the one-hot inputs."""
        if not (self.training and self.rows_dropout[adapter_name]):
            return change
        return change * super().dropped(change.new_ones(*change.shape[:-1], 1), adapter_name)

    def _row_change(self, x: Tensor, adapter_name: str) -> Tensor:
        base: Any = self.base_layer
        table = self.rows_delta[adapter_name].T
        return functional.embedding(x, table, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def _column_change(self, x: Tensor, index: Tensor, adapter_name: str) -> Tensor:
        base: Any = self.base_layer
        table = self.rows_delta[adapter_name].T
        if base.padding_idx is not None:
            table = torch.where(index.unsqueeze(1) == base.padding_idx, table.detach(), table)
        # A token that is not trained looks up the zeros behind the others: no shape depends on the data.
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        position = torch.searchsorted(index, x.long()).clamp(max=index.numel() - 1)
        position = torch.where(index[position] == x, position, index.numel())
        return functional.embedding(position, table, scale_grad_by_freq=base.scale_grad_by_freq)
