"""Whatever steps the delta, the weight that holds it follows: training equals that of a plain dense weight."""

import pytest
import torch
from layer_kinds import CASES, KINDS, make_base, make_inputs, make_layer, slice_of
from torch import nn

from rowscope.finetune.layer import Linear


class DataSGD(torch.optim.Optimizer):
    """Writes through ``.data``, as some optimizers do: the parameter's version counter does not tell of it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                version = parameter._version
                parameter.data.add_(parameter.grad.data, alpha=-group["lr"])
                assert parameter._version == version


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
    "through .data": lambda parameters: DataSGD(parameters, lr=0.01),
}


class DenseReference(nn.Module):
    """The same training without rowscope: a plain layer whose weight is made of a frozen part and a trained slice.

    Args:
        kind: of the layer.
        axis: of the slice.
        index: of the slice.
        delta: where the slice starts.
        trains_bias: whether the bias of the rows is trained too.
    """

    def __init__(self, kind, axis, index, delta, bias_delta=None):
        super().__init__()
        self.kind, self.dim, self.index = kind, ("row", "column").index(axis), index.long()
        self.base = make_base(kind)
        self.delta = nn.Parameter(delta.detach().clone())
        if bias_delta is not None:
            self.bias_delta = nn.Parameter(bias_delta.detach().clone())

    def effective(self):
        weight, row_dim = self.base.weight, KINDS[self.kind].row_dim
        change = torch.zeros_like(weight.T if row_dim == 1 else weight)
        change = change.index_add(self.dim, self.index, self.delta)
        parts = {"weight": weight + (change.T if row_dim == 1 else change)}
        if hasattr(self, "bias_delta"):
            parts["bias"] = self.base.bias.index_add(0, self.index, self.bias_delta)
        return parts

    def forward(self, x):
        return torch.func.functional_call(self.base, self.effective(), x)


def both(kind, axis, train_bias=False):
    """A layer and its dense reference, in training."""
    layer = make_layer(kind, axis, train_bias=train_bias)
    return layer, DenseReference(
        kind, axis, layer.rows_index["default"], layer.rows_delta["default"], layer.rows_bias.get("default")
    )


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, make_optimizer, x, target, steps=3, max_norm=None):
    """Losses of `steps` optimizer steps."""
    optimizer, losses = make_optimizer(trained(model)), []
    for _ in range(steps):
        loss = (model(x) - target).square().sum()
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(trained(model), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_state(layer, dense, tolerance=1e-6):
    """Deltas, effective weight and base are those of the reference."""
    torch.testing.assert_close(layer.rows_delta["default"].data, dense.delta.data, atol=tolerance, rtol=0)
    with torch.no_grad():
        parts = dense.effective()
        if isinstance(layer, Linear):
            layer.hold("default")
        else:
            layer.merge()
        torch.testing.assert_close(layer.base_layer.weight.data, parts["weight"], atol=tolerance, rtol=0)
        if "bias" in parts:
            torch.testing.assert_close(layer.base_layer.bias.data, parts["bias"], atol=tolerance, rtol=0)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, dense.base.weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_three_steps_equal_a_dense_training(kind, axis, optimizer):
    """Every optimizer trains as on a dense weight, also one that changes the delta without telling autograd."""
    train_bias = axis == "row" and getattr(make_base(kind), "bias", None) is not None
    layer, dense = both(kind, axis, train_bias)
    x = make_inputs(kind).detach()
    target = torch.randn_like(layer(x))
    losses = train(layer, OPTIMIZERS[optimizer], x, target)
    expected = train(dense, OPTIMIZERS[optimizer], x, target)
    assert losses[2] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_state(layer, dense)
    # The last step is seen by the next pass, though no pass was made in between.
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_clipped_gradients(kind, axis):
    """clip_grad_norm_ sees the slice's gradient alone and clips as on the dense slice."""
    layer, dense = both(kind, axis)
    x = make_inputs(kind).detach()
    target = torch.randn_like(layer(x))
    for model in (layer, dense):
        train(model, OPTIMIZERS["SGD"], x, target, max_norm=0.5)
    assert_same_state(layer, dense)


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_weight_decay_draws_the_slice_back_to_the_base(kind, axis):
    """Decay shrinks the delta, so trained rows go back to the base's and no other weight moves."""
    layer = make_layer(kind, axis)
    before, base = layer.rows_delta["default"].detach().clone(), make_base(kind).weight
    optimizer = torch.optim.SGD(trained(layer), lr=0.1, weight_decay=0.5)
    (0 * layer(make_inputs(kind))).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.rows_delta["default"].data, 0.95 * before)
    layer.merge()
    expected = slice_of(kind, base, axis, layer.rows_index["default"]) + layer.rows_delta["default"].data
    merged = layer.base_layer.weight.detach()
    assert torch.equal(slice_of(kind, merged, axis, layer.rows_index["default"]), expected)
    assert int((merged != base).sum()) == before.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D of transformers", "conv2d"])
def test_autocast_and_a_gradient_scaler(kind, axis, dtype):
    """Mixed precision with a scaler trains as a dense layer does, and skips a step whose gradient is infinite."""
    layer, dense = both(kind, axis)
    x = make_inputs(kind).detach()
    target = torch.randn_like(layer(x))
    for model in (layer, dense):
        optimizer = OPTIMIZERS["SGD"](trained(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for scale in (1.0, torch.inf, 1.0):
            with torch.autocast("cpu", dtype):
                output = model(x)
            scaler.scale(scale * (output.float() - target).square().mean()).backward()
            before = trained(model)[0].detach().clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(trained(model)[0], before) == (scale == torch.inf)
    assert_same_state(layer, dense, tolerance=1e-3)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D of transformers", "conv2d", "embedding"])
def test_small_updates_of_a_bfloat16_base_are_not_lost(kind, axis):
    """Fifty updates, each below bf16's resolution, add up in the fp32 delta; the weight in use is its rounding."""
    layer = make_layer(kind, axis, torch.bfloat16)
    layer.rows_delta["default"].data.zero_()
    base, index = make_base(kind, torch.bfloat16).weight, layer.rows_index["default"]
    start = slice_of(kind, base, axis, index).float()
    assert torch.equal((start + 2e-4 * start).bfloat16(), start.bfloat16())
    optimizer = torch.optim.SGD(trained(layer), lr=1.0)
    x = make_inputs(kind, torch.bfloat16)
    for _ in range(50):
        layer(x).sum().backward()
        layer.rows_delta["default"].grad.copy_(-2e-4 * start)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.rows_delta["default"].data, 0.01 * start, rtol=1e-4, atol=0)
    if isinstance(layer, Linear):
        with torch.no_grad():
            layer(x)
    else:
        layer.merge()
    effective = slice_of(kind, layer.base_layer.weight, axis, index)
    assert torch.equal(effective, (start + layer.rows_delta["default"].data).bfloat16())
    assert (effective != start).float().mean() > 0.9


def test_an_optimizer_keeps_its_hold_of_an_adapter():
    """An adapter's parameters stay the same objects when others come, act and go."""
    layer = make_layer("linear", "row")
    optimizer = torch.optim.SGD(trained(layer), lr=1e-3)
    layer.update_layer("second", axis="column", num_rows=2)
    layer.set_adapter("second")
    layer.set_adapter("default")
    layer.delete_adapter("second")
    layer.merge()
    layer.unmerge()
    x = make_inputs("linear").detach()
    before = layer(x).detach()
    layer(x).square().sum().backward()
    optimizer.step()
    assert layer(x).square().sum() < before.square().sum()
