"""The layer against dense linear algebra."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from rowscope.errors import InputError
from rowscope.finetune.layer import Linear, largest_rows

OUT, IN = 10, 7


def make_layer(axis="row", index=(1, 4, 6), dtype=torch.float32, adapter_name="default", init_weights=False, seed=0):
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT).to(dtype).requires_grad_(False)
    return Linear(
        base, adapter_name, axis=axis, num_rows=len(index), index=torch.tensor(index), init_weights=init_weights
    )


def dense_delta(layer, adapter_name="default"):
    """The adapter as a dense matrix, built entry by entry."""
    delta = torch.zeros(OUT, IN)
    for position, number in enumerate(layer.rows_index[adapter_name].tolist()):
        if layer.rows_axis[adapter_name] == "row":
            delta[number, :] = layer.rows_delta[adapter_name][position, :]
        else:
            delta[:, number] = layer.rows_delta[adapter_name][:, position]
    return delta


@pytest.mark.parametrize("axis", ["row", "column"])
def test_forward_and_gradients_equal_dense_autograd(axis):
    """Output, input gradient and delta gradient are those of a dense layer with weight W + delta."""
    layer = make_layer(axis)
    x = torch.randn(2, 5, IN, requires_grad=True)
    target = torch.randn(2, 5, OUT)
    (layer(x) * target).sum().backward()

    weight = (layer.get_base_layer().weight + dense_delta(layer)).detach().requires_grad_()
    dense_x = x.detach().clone().requires_grad_()
    dense_output = functional.linear(dense_x, weight, layer.base_layer.bias)
    (dense_output * target).sum().backward()

    torch.testing.assert_close(layer(x), dense_output)
    torch.testing.assert_close(x.grad, dense_x.grad)
    index = torch.tensor([1, 4, 6])
    expected = weight.grad[index] if axis == "row" else weight.grad[:, index]
    torch.testing.assert_close(layer.rows_delta["default"].grad, expected)
    assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_new_adapter_changes_nothing(axis, dtype):
    """Training starts from the base model bit for bit, with an fp32 delta whatever the base's dtype."""
    layer = make_layer(axis, dtype=dtype, init_weights=True)
    x = torch.randn(3, IN, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.rows_delta["default"].dtype == torch.float32
    assert layer.rows_index["default"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_unmerge_restores_every_bit(axis, dtype):
    """Merging gives W + delta to rounding; unmerging gives back the base weight exactly, in bf16 too."""
    layer = make_layer(axis, dtype=dtype)
    original = layer.get_base_layer().weight.clone()
    x = torch.randn(3, IN, dtype=dtype)
    adapted = layer(x)
    layer.merge(safe_merge=True)
    exact = (original.float() + dense_delta(layer)).to(dtype)
    assert torch.equal(layer.get_base_layer().weight, exact)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(layer(x), adapted, atol=tolerance, rtol=tolerance)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)
    assert torch.equal(layer(x), adapted)


def test_safe_merge_refuses_nan_and_leaves_the_weight():
    """A broken adapter cannot reach the base weight by a safe merge."""
    layer = make_layer()
    original = layer.get_base_layer().weight.clone()
    layer.rows_delta["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, original)
    assert not layer.merged


def test_adapters_of_different_axes_add_up():
    """Two active adapters, overlapping and of different axes, act as the sum of their dense deltas, merged or not."""
    layer = make_layer("row", (0, 3))
    layer.update_layer("second", axis="column", num_rows=3, index=torch.tensor([2, 3, 5]), init_weights=False)
    layer.set_adapter(["default", "second"])
    original = layer.get_base_layer().weight.clone()
    x = torch.randn(4, IN)
    total = dense_delta(layer) + dense_delta(layer, "second")
    expected = functional.linear(x, original + total, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)


def test_disabled_adapters_leave_the_base():
    """A disabled layer computes what the base computes, even if it was merged before."""
    layer = make_layer()
    x = torch.randn(4, IN)
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)


def test_column_tuning_keeps_k_columns_not_the_input():
    """Autograd saves a copy of the chosen columns; a view would keep the whole input alive."""
    layer = make_layer("column", (1, 4))
    x = torch.randn(50, IN)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in kept)
    assert (50, 2) in [tuple(tensor.shape) for tensor in kept]


@pytest.mark.parametrize("axis", ["row", "column"])
def test_delta_weight_is_a_lora(axis):
    """get_delta_weight is the dense delta, and B A of the LoRA that row tuning promises to be."""
    layer = make_layer(axis)
    delta = layer.rows_delta["default"].detach()
    size = OUT if axis == "row" else IN
    one_hot = functional.one_hot(layer.rows_index["default"].long(), size).float()
    lora = one_hot.T @ delta if axis == "row" else delta @ one_hot
    assert torch.equal(layer.get_delta_weight("default"), dense_delta(layer))
    assert torch.equal(layer.get_delta_weight("default"), lora)
    assert layer.supports_lora_conversion("default")


def test_largest_rows_by_norm():
    """Without a selection the rows and columns of largest L2 norm are taken, sorted by number."""
    weight = torch.tensor([[3.0, 0.0, 0.1], [0.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.5, 0.0]])
    assert largest_rows(weight, 0, 2).tolist() == [0, 2]
    assert largest_rows(weight, 1, 1).tolist() == [0]


@pytest.mark.parametrize("index", [[0, OUT], [-1, 2], [3, 2], [2, 2], [], [0.5]])
def test_a_wrong_index_is_refused(index):
    """Indices outside the weight, unsorted, repeated, missing or fractional never reach the layer."""
    with pytest.raises(InputError):
        make_layer(index=index)
