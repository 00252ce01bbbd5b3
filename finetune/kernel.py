"""The linear map of a layer whose weight holds an adapter's slice: one matrix product forward, and no dense gradient.

With ``W`` the effective weight, ``index`` its k trained rows (columns) and ``g`` the gradient of the output:

    y = x Wᵀ + b;    dx = g W;    rows: d_delta = g[..., index]ᵀ x;    columns: d_delta = gᵀ x[..., index]

The weight is frozen and shared by all passes, so it is no saved tensor: when the gradient comes it is put into the
state that the pass saw, whichever adapter has been used in between. Autograd keeps `x` for rows, a copy of k of its
columns for columns, and neither where `x` can be made again (:mod:`rowscope.finetune.recipes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .recipes import Recipe, recipe_of

if TYPE_CHECKING:
    from .layer import Linear


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        bias_delta: Tensor | None,
        layer: Linear,
        adapter_name: str | None,
        recipe: Recipe | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.adapter_name, ctx.recipe, ctx.dtype = layer, adapter_name, recipe, x.dtype
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward()
        elif recipe is not None:
            ctx.save_for_backward(*inputs)
        elif adapter_name is not None and layer.trains_rows(adapter_name):
            ctx.save_for_backward(x)
        else:
            # A copy of k columns; a view would keep all of x alive.
            ctx.save_for_backward(x.index_select(-1, layer.rows_index[adapter_name]))
        layer.hold(adapter_name)
        return layer.base_layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.layer.held(ctx.adapter_name)
        needs_x, needs_delta, needs_bias, *rest = ctx.needs_input_grad
        x_gradient = gradient @ weight.to(gradient.dtype) if needs_x else None
        delta_gradient = bias_gradient = None
        if needs_delta or needs_bias:
            index = ctx.layer.rows_index[ctx.adapter_name]
            trains_rows = ctx.layer.trains_rows(ctx.adapter_name)
            rows = gradient.reshape(-1, weight.shape[0])
            if trains_rows:
                rows = rows.index_select(-1, index)
            if needs_delta:  # autograd casts it to the delta's dtype
                x = _kept(ctx, index)
                # With the k features first: thin products are half as fast the other way round.
                delta_gradient = rows.T @ x if trains_rows else (x.T @ rows).T
            if needs_bias:
                bias_gradient = rows.sum(dim=0, dtype=ctx.layer.rows_bias[ctx.adapter_name].dtype)
        return x_gradient, delta_gradient, bias_gradient, *(None for _ in rest)


def _kept(ctx: Any, index: Tensor) -> Tensor:
    """What the forward pass kept of `x`, or its recipe makes: `(tokens, in_features)`, of columns `(tokens, k)`."""
    if ctx.recipe is None:
        (x,) = ctx.saved_tensors
    else:
        x = ctx.recipe.replay(ctx.saved_tensors)[0].detach().to(ctx.dtype)
        if not ctx.layer.trains_rows(ctx.adapter_name):
            x = x.index_select(-1, index)
    return x.reshape(-1, x.shape[-1])


def held_linear(x: Tensor, layer: Linear, adapter_name: str | None) -> Tensor:
    """`x (..., in_features)` through the layer with one adapter, or with none: `(..., out_features)`."""
    delta = bias_delta = None
    if adapter_name is not None:
        delta = layer.rows_delta[adapter_name]
        bias_delta = layer.rows_bias.get(adapter_name)
    recipe, inputs = recipe_of(x) or (None, ())
    return _HeldLinear.apply(
        x, delta, bias_delta, layer, adapter_name, recipe, *(tensor.detach() for tensor in inputs)
    )
