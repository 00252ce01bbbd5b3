"""Every kind of layer that rows and columns are trained in, and its dense equivalent, built without rowscope."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rowscope.finetune.convolution import Convolution
from rowscope.finetune.embedding import Embedding
from rowscope.finetune.layer import Linear, RowsLayer


@dataclass(frozen=True)
class Kind:
    """A layer kind: how to make a small one and its input, and which dimension of its weight counts rows."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    layer: type[RowsLayer]
    row_dim: int = 0
    axes: tuple[str, ...] = ("row", "column")


KINDS = {
    "linear": Kind(lambda: nn.Linear(7, 10), lambda: torch.randn(2, 5, 7), Linear),
    "linear without bias": Kind(lambda: nn.Linear(7, 10, bias=False), lambda: torch.randn(4, 7), Linear),
    "Conv1D of transformers": Kind(lambda: Conv1D(10, 7), lambda: torch.randn(2, 5, 7), Linear, row_dim=1),
    "conv2d": Kind(
        lambda: nn.Conv2d(7, 10, (3, 2), stride=2, padding=1), lambda: torch.randn(2, 7, 6, 5), Convolution
    ),
    "conv1d": Kind(lambda: nn.Conv1d(7, 10, 3, dilation=2, padding="same"), lambda: torch.randn(2, 7, 9), Convolution),
    "grouped conv2d": Kind(
        lambda: nn.Conv2d(4, 10, 3, groups=2, padding=1, padding_mode="circular"),
        lambda: torch.randn(2, 4, 5, 5),
        Convolution,
        axes=("row",),
    ),
    "embedding": Kind(
        lambda: nn.Embedding(7, 10), lambda: torch.tensor([[0, 1, 6, 6], [5, 2, 1, 3]]), Embedding, row_dim=1
    ),
}
CASES = [(kind, axis) for kind, how in KINDS.items() for axis in how.axes]
"""Kind and axis of every layer that can be trained."""
INDEX = {"row": (1, 4, 6), "column": (1, 5)}


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same frozen layer at every call."""
    torch.manual_seed(0)
    base = KINDS[kind].make()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5)
    return base.to(dtype).requires_grad_(False)


def make_inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same input at every call, a leaf that takes gradients where it can."""
    torch.manual_seed(1)
    x = KINDS[kind].inputs()
    return x.to(dtype).requires_grad_() if x.is_floating_point() else x


def randomise(layer: nn.Module, seed: int = 2) -> None:
    """Give the deltas values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if "rows_delta" in name or "rows_bias" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def make_layer(
    kind: str, axis: str, dtype: torch.dtype = torch.float32, index: tuple[int, ...] | None = None, **kwargs
) -> RowsLayer:
    """The layer with one adapter, ``default``, of random values."""
    index = torch.tensor(INDEX[axis] if index is None else index)
    base = make_base(kind, dtype)
    layer = KINDS[kind].layer(base, "default", axis=axis, num_rows=len(index), index=index, **kwargs)
    randomise(layer)
    return layer


def dense_equivalent(kind: str, layer: RowsLayer, adapter_names: list[str], dtype: torch.dtype | None = None):
    """A plain layer, all of it trained, whose weight is the base's plus the deltas, written entry by entry."""
    dense = copy.deepcopy(make_base(kind)).to(dtype or torch.float32)
    reference = make_base(kind, layer._weight.dtype)
    weight, row_dim = reference.weight.to(torch.float64), KINDS[kind].row_dim
    for name in adapter_names:
        delta, index = layer.rows_delta[name].detach().double(), layer.rows_index[name].tolist()
        if layer.rows_axis[name] == "row":
            for position, number in enumerate(index):
                weight.select(row_dim, number).add_(delta.select(0, position))
        else:
            for position, number in enumerate(index):
                weight.select(1 - row_dim, number).add_(delta.select(1, position))
    dense.weight = nn.Parameter(weight.to(dense.weight.dtype))
    if getattr(dense, "bias", None) is not None:
        bias = reference.bias.double()
        for name in adapter_names:
            for position, number in enumerate(layer.rows_index[name].tolist()):
                if name in layer.rows_bias:
                    bias[number] += layer.rows_bias[name][position].double()
        dense.bias = nn.Parameter(bias.to(dense.weight.dtype))
    return dense


def slice_of(kind: str, weight: Tensor, axis: str, index: Tensor) -> Tensor:
    """The rows or columns `index` of a weight, in the shape of a delta."""
    row_dim = KINDS[kind].row_dim
    chosen = weight.index_select(row_dim if axis == "row" else 1 - row_dim, index.long())
    return chosen.T if row_dim == 1 else chosen
