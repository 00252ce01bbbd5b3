"""Channels of a convolution: every setting that nn.Conv1d and nn.Conv2d have, and a whole network under PEFT."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from rowscope import InputError, RowsConfig, Selection
from rowscope.finetune.convolution import Convolution

SETTINGS = [
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular", "stride": (1, 2)},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "zeros", "dilation": 2},
    {"bias": False},
]


def adapted(base, axis, num_rows=3, **kwargs):
    """The layer with an adapter of random values, and a plain copy of it with the adapter in its weight and bias."""
    base.requires_grad_(False)
    layer = Convolution(base, "default", axis=axis, num_rows=num_rows, init_weights=False, **kwargs)
    layer.rows_delta["default"].data.mul_(20)
    dense = copy.deepcopy(base)
    index = layer.rows_index["default"].tolist()
    for position, channel in enumerate(index):
        if axis == "row":
            dense.weight[channel] += layer.rows_delta["default"].data[position]
        else:
            dense.weight[:, channel] += layer.rows_delta["default"].data[:, position]
    if "default" in layer.rows_bias:
        dense.bias[index] += layer.rows_bias["default"].data
    return layer, dense.requires_grad_()


def assert_equal_to(dense, layer, axis, x):
    """Output and gradients of `layer` are those of the plain convolution `dense`."""
    dense_x, x = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, dense_output = layer(x), dense(dense_x)
    torch.testing.assert_close(output, dense_output, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(output)
    (output * target).sum().backward()
    (dense_output * target).sum().backward()
    torch.testing.assert_close(x.grad, dense_x.grad, atol=1e-5, rtol=1e-5)
    expected = dense.weight.grad.index_select(("row", "column").index(axis), layer.rows_index["default"])
    torch.testing.assert_close(layer.rows_delta["default"].grad, expected, atol=1e-4, rtol=1e-4)
    if "default" in layer.rows_bias:
        expected = dense.bias.grad[layer.rows_index["default"].long()]
        torch.testing.assert_close(layer.rows_bias["default"].grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", SETTINGS, ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_every_setting_of_the_base(axis, arguments):
    """The delta goes through the stride, padding, its mode, and dilation of the base layer."""
    torch.manual_seed(0)
    layer, dense = adapted(nn.Conv2d(5, 8, 3, **arguments), axis)
    assert_equal_to(dense, layer, axis, torch.randn(2, 5, 7, 8))


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("train_bias", [False, True])
def test_rows_of_groups(groups, train_bias):
    """Each trained output channel sees the input channels of its own group, down to one (depthwise)."""
    torch.manual_seed(0)
    layer, dense = adapted(nn.Conv2d(8, 16, 3, groups=groups), "row", num_rows=5, train_bias=train_bias)
    assert_equal_to(dense, layer, "row", torch.randn(2, 8, 6, 6))


def test_columns_of_groups_are_refused():
    """An input channel of a grouped convolution is no column of its weight: an input error that names the mend."""
    with pytest.raises(InputError, match=r"4 groups.*use its rows"):
        Convolution(nn.Conv2d(8, 8, 3, groups=4), "default", axis="column", num_rows=1)


@pytest.mark.parametrize(("base", "shape"), [(nn.Conv2d(5, 8, 3), (5, 6, 6)), (nn.Conv1d(5, 8, 3), (5, 9))])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_an_input_without_a_batch(axis, base, shape):
    """As in torch, the batch dimension may be missing."""
    layer, dense = adapted(copy.deepcopy(base), axis)
    assert_equal_to(dense, layer, axis, torch.randn(shape))


@pytest.mark.parametrize("axis", ["row", "column"])
def test_autocast(axis):
    """Under autocast the output is in the lower dtype, and the delta's gradient in fp32."""
    layer, dense = adapted(nn.Conv2d(5, 8, 3), axis)
    x = torch.randn(2, 5, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, dense_output = layer(x), dense(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, dense_output, atol=0.05, rtol=0.02)
    output.sum().backward()
    assert layer.rows_delta["default"].grad.dtype == torch.float32


def test_columns_keep_k_channels_of_the_input():
    """Autograd keeps a copy of the trained channels only, beside what a frozen convolution keeps."""
    layer, _ = adapted(nn.Conv2d(16, 8, 3), "column", num_rows=2)
    x = torch.randn(4, 16, 6, 6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert (4, 2, 6, 6) in [tuple(tensor.shape) for tensor in kept]
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in kept)


class Net(nn.Module):
    """A residual network in small: plain, grouped and depthwise convolutions, 1-D ones, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.along = nn.Conv1d(12, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.pointwise(self.depthwise(self.grouped(self.stem(x).relu()).relu())).relu()
        return self.head(self.along(x.flatten(2)).relu().mean(-1))


SELECTION = Selection(
    {
        "stem": {"row": torch.tensor([0, 5])},
        "grouped": {"row": torch.tensor([1, 6])},
        "depthwise": {"row": torch.tensor([7])},
        "pointwise": {"column": torch.tensor([2, 3])},
        "along": {"column": torch.tensor([0, 11])},
        "head": {"row": torch.tensor([3])},
    },
    {"stem": (8, 3), "grouped": (8, 4), "depthwise": (8, 1), "pointwise": (12, 8), "along": (6, 12), "head": (4, 6)},
)


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_trains_saves_loads_and_merges(dtype, tmp_path):
    """A selection of mixed axes starts as the base, learns, and comes back bit for bit; unloaded it is a plain net."""
    x = torch.randn(4, 3, 5, 5).to(dtype)
    base, model = make_net(dtype), get_peft_model(make_net(dtype), RowsConfig.from_selection(SELECTION))
    original = base(x)
    assert torch.equal(model(x), original)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_net(dtype), tmp_path)
    assert torch.equal(loaded(x), trained)
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), original)
    merged = loaded.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base.named_parameters()}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(merged(x), trained, atol=tolerance, rtol=tolerance)
