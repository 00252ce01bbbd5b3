"""Rows and columns over packed weights: the delta form, with the gradients of the dequantised weight."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from rowscope import InputError, RowsConfig
from rowscope.finetune.quantised import QuantisedLinear
from rowscope.quant.layers import dequantise

bitsandbytes = pytest.importorskip("bitsandbytes")


def packed(kind, bias=True):
    """A layer of 4 or 8 bits in a model of its own."""
    torch.manual_seed(0)
    full = nn.Linear(64, 48, bias=bias)
    settings = {"compute_dtype": torch.float32, "quant_type": "nf4"} if kind == "Linear4bit" else {}
    if kind == "Linear8bitLt":
        settings = {"has_fp16_weights": False}
    layer = getattr(bitsandbytes.nn, kind)(64, 48, bias=bias, **settings)
    layer.load_state_dict(full.state_dict())
    return nn.Sequential(layer.to("cpu")).requires_grad_(False)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_the_delta_acts_apart_with_the_gradients_of_dense_autograd(kind, axis):
    """Output and gradient are the packed layer's plus a dense delta's; the packed weight keeps every bit."""
    model = packed(kind)
    model(torch.randn(2, 64))  # 8-bit layers pack at their first use
    base = model[0]
    before = base.weight.data.clone()
    adapted = get_peft_model(model, RowsConfig(target_modules=["0"], num_rows=3, axis=axis, init_weights=False))
    layer = adapted.base_model.model[0]
    assert isinstance(layer, QuantisedLinear)
    x = torch.randn(5, 64, requires_grad=True)
    weighting = torch.randn(5, 48)
    (adapted(x) * weighting).sum().backward()

    index = layer.rows_index["default"].long()
    delta = torch.zeros(48, 64)
    delta.index_copy_(0 if axis == "row" else 1, index, layer.rows_delta["default"].detach())
    delta.requires_grad_()
    own = x.detach().clone().requires_grad_()
    expected = base(own) + functional.linear(own, delta)
    (expected * weighting).sum().backward()
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(x.grad, own.grad)
    wanted = delta.grad[index] if axis == "row" else delta.grad[:, index]
    torch.testing.assert_close(layer.rows_delta["default"].grad, wanted)
    assert torch.equal(base.weight.data, before)


def test_rows_alone_are_those_of_largest_norm_of_the_dequantised_weight():
    """Without a selection the packed bytes are not taken for weights."""
    model = get_peft_model(packed("Linear4bit"), RowsConfig(target_modules=["0"], num_rows=4))
    layer = model.base_model.model[0]
    norms = dequantise(layer.base_layer).norm(dim=1)
    assert layer.rows_index["default"].tolist() == sorted(norms.topk(4).indices.tolist())
    assert layer.rows_delta["default"].shape == (4, 64)


def test_an_evaluation_forward_pass_leaves_the_packed_weight_readable():
    """Where the processor would have bitsandbytes repack the weight, what it dequantises to stays the same."""
    model = get_peft_model(packed("Linear4bit").bfloat16(), RowsConfig(target_modules=["0"], num_rows=4)).eval()
    base = model.base_model.model[0].base_layer
    before = dequantise(base)
    with torch.no_grad():
        model(torch.randn(3, 64, dtype=torch.bfloat16))
    assert torch.equal(dequantise(base), before)


def test_merging_is_refused():
    """A merged weight would be quantised again, which rounds the adapter away."""
    model = get_peft_model(packed("Linear4bit"), RowsConfig(target_modules=["0"], num_rows=4))
    with pytest.raises(InputError, match="merge it into the full model"):
        model.merge_and_unload()
