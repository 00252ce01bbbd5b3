"""Every kind of layer, on every axis and in every form, against dense linear algebra."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_kinds import CASES, KINDS, dense_equivalent, make_base, make_inputs, make_layer, randomise, slice_of
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rowscope.errors import InputError
from rowscope.finetune.layer import Linear, largest_rows

DTYPES = [torch.float32, torch.bfloat16]
LINEAR = [(kind, axis) for kind, axis in CASES if KINDS[kind].layer is Linear]


def as_it_is(layer):
    """The layer as made: held in the weight, where the kind can be."""


def tied(layer):
    """Another module uses the weight too."""
    layer.is_tied = True


def replaced_weight(layer):
    """The weight is another object than it was, as after sharding or offloading."""
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.clone(), requires_grad=False)


def hooked(layer):
    """Someone looks at the base layer's output."""
    layer.base_layer.register_forward_hook(lambda module, args, output: None)


def looked_at_backwards(layer):
    """Someone looks at the gradient of the base layer's output."""
    layer.base_layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def with_a_second(layer):
    """Two adapters are active, overlapping."""
    axis = layer.rows_axis["default"]
    layer.update_layer("second", axis=axis, num_rows=2, index=torch.tensor([3, 4]))
    layer.set_adapter(["default", "second"])
    randomise(layer)


FORMS = [as_it_is, tied, replaced_weight, hooked, looked_at_backwards, with_a_second]


def assert_dense_gradients(kind, layer, output, x, target, repeats=1):
    """Gradients of ``(output · target).sum()`` that `layer` holds are those of a plain layer of the same weight."""
    names = layer.active_adapters
    dense = dense_equivalent(kind, layer, names, x.dtype if x.is_floating_point() else torch.float64)
    dense_x = x.detach().clone()
    dense_x = dense_x.requires_grad_() if dense_x.is_floating_point() else dense_x
    dense_output = dense(dense_x)
    (dense_output * target).sum().backward()
    torch.testing.assert_close(output, dense_output)
    if x.is_floating_point():
        torch.testing.assert_close(x.grad, repeats * dense_x.grad)
    for name in names:
        axis, index = layer.rows_axis[name], layer.rows_index[name]
        expected = repeats * slice_of(kind, dense.weight.grad, axis, index)
        torch.testing.assert_close(layer.rows_delta[name].grad, expected)
        if name in layer.rows_bias:
            torch.testing.assert_close(layer.rows_bias[name].grad, repeats * dense.bias.grad[index.long()])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_output_and_gradients_equal_dense_autograd(kind, axis, form):
    """Held or apart: output and gradients are those of a dense layer W + delta, in double to double's precision."""
    layer = make_layer(kind, axis, train_bias=True)
    form(layer)
    layer.double()
    if isinstance(layer, Linear):
        assert layer.can_hold(layer.active_adapters) == (form is as_it_is)
    x = make_inputs(kind, torch.float64)
    output = layer(x)
    target = torch.randn_like(output)
    (output * target).sum().backward()
    assert_dense_gradients(kind, layer, output, x, target)
    assert torch.equal(layer.get_base_layer().weight, make_base(kind, torch.float32).weight.double())
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_bfloat16_gradients(kind, axis):
    """On a bf16 base, output and gradients are a dense bf16 layer's to bf16's rounding; the delta's are fp32."""
    layer = make_layer(kind, axis, torch.bfloat16)
    x = make_inputs(kind, torch.bfloat16)
    output = layer(x)
    target = torch.randn_like(output)
    (output * target).sum().backward()
    dense = dense_equivalent(kind, layer, ["default"], torch.bfloat16)
    dense_output = dense(x.detach())
    (dense_output * target).sum().backward()
    torch.testing.assert_close(output, dense_output, atol=0.05, rtol=0.02)
    expected = slice_of(kind, dense.weight.grad, axis, layer.rows_index["default"]).float()
    torch.testing.assert_close(layer.rows_delta["default"].grad, expected, atol=0.1, rtol=0.02)
    assert layer.rows_delta["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_a_new_adapter_changes_nothing(kind, axis, dtype):
    """Training starts from the base bit for bit, with an fp32 delta whatever the base's dtype."""
    layer = make_layer(kind, axis, dtype, train_bias=True)
    for parameter in (*layer.rows_delta.values(), *layer.rows_bias.values()):
        assert parameter.dtype == torch.float32
        parameter.data.zero_()
    x = make_inputs(kind, dtype)
    expected = make_base(kind, dtype)(x)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    layer.is_tied = True
    assert torch.equal(layer(x), expected)
    assert layer.rows_index["default"].dtype == torch.int32


@pytest.mark.parametrize("axis", ["row", "column"])
def test_conv1d_keeps_its_own_arithmetic(axis):
    """Conv1D adds the bias inside its product, nn.Linear not if its input is strided: bf16 would tell them apart."""
    torch.manual_seed(0)
    base = Conv1D(24, 16)
    nn.init.normal_(base.bias)
    base = base.to(torch.bfloat16).requires_grad_(False)
    layer = Linear(copy.deepcopy(base), "default", axis=axis, num_rows=3)
    x = torch.randn(8, 5, 32).bfloat16()[..., ::2]
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_merging_and_unmerging_are_exact(kind, axis, dtype, is_tied):
    """Merging gives W + delta rounded once; unmerging gives back the base weight and bias exactly, in bf16 too."""
    layer = make_layer(kind, axis, dtype, train_bias=True)
    layer.is_tied = is_tied
    shared = layer.base_layer.weight
    original = make_base(kind, dtype)
    x = make_inputs(kind, dtype)
    adapted = layer(x)
    layer.merge(safe_merge=True)
    effective = dense_equivalent(kind, layer, ["default"])
    # Summed in float64 and in float32, a number may round to neighbours, one bf16 apart at most.
    torch.testing.assert_close(
        layer.get_base_layer().weight.float(),
        effective.weight.data,
        atol=1e-6,
        rtol=1e-6 if dtype.itemsize == 4 else 2**-8,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(layer(x), adapted, atol=tolerance, rtol=tolerance)
    if is_tied:
        assert torch.equal(shared, original.weight)
    layer.unmerge()
    assert layer.base_layer.weight is shared
    assert torch.equal(layer.get_base_layer().weight, original.weight)
    if getattr(original, "bias", None) is not None:
        assert torch.equal(layer.get_base_layer().bias, original.bias)
    assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_disjoint_adapters_merge_exactly(kind, axis, dtype):
    """Disjoint adapters merged together give each its own merged slice, bit for bit."""
    layer = make_layer(kind, axis, dtype, index=(0, 3))
    layer.update_layer("second", axis=axis, num_rows=3, index=torch.tensor([1, 2, 6]))
    randomise(layer)
    alone = {}
    for name in ("default", "second"):
        layer.merge(adapter_names=[name])
        alone[name] = layer.get_base_layer().weight.clone()
        layer.unmerge()
    layer.merge(adapter_names=["default", "second"])
    together = layer.get_base_layer().weight
    for name in ("default", "second"):
        index = layer.rows_index[name]
        assert torch.equal(slice_of(kind, together, axis, index), slice_of(kind, alone[name], axis, index))
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, make_base(kind, dtype).weight)


@pytest.mark.parametrize("kind", [kind for kind, how in KINDS.items() if len(how.axes) == 2])
def test_adapters_of_different_axes_add_up(kind):
    """Two active adapters, overlapping and of different axes, act as the sum of their dense deltas, merged or not."""
    layer = make_layer(kind, "row")
    layer.update_layer("second", axis="column", num_rows=3, index=torch.tensor([2, 3, 5]))
    layer.set_adapter(["default", "second"])
    randomise(layer)
    x = make_inputs(kind)
    expected = dense_equivalent(kind, layer, ["default", "second"])(x)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, make_base(kind).weight)


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_safe_merge_refuses_nan_and_leaves_the_weight(kind, axis):
    """A broken adapter cannot reach the base weight by a safe merge."""
    layer = make_layer(kind, axis)
    layer.rows_delta["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, make_base(kind).weight)
    assert not layer.merged


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_disabled_adapters_leave_the_base(kind, axis):
    """A disabled layer computes what the base computes, held or merged before; enabled it adapts again."""
    layer = make_layer(kind, axis)
    x = make_inputs(kind)
    expected, adapted = make_base(kind)(x), layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_delta_weight_is_dense(kind, axis):
    """get_delta_weight, which PEFT's tools read, is what the adapter adds to the weight in the weight's own shape."""
    layer = make_layer(kind, axis)
    expected = dense_equivalent(kind, layer, ["default"]).weight - make_base(kind).weight
    torch.testing.assert_close(layer.get_delta_weight("default"), expected.detach())


@pytest.mark.parametrize("axis", ["row", "column"])
def test_delta_weight_is_a_lora(axis):
    """The dense delta is B A of the LoRA that row tuning promises to be."""
    layer = make_layer("linear", axis)
    delta = layer.rows_delta["default"].detach()
    one_hot = functional.one_hot(layer.rows_index["default"].long(), 10 if axis == "row" else 7).float()
    lora = one_hot.T @ delta if axis == "row" else delta @ one_hot
    assert torch.equal(layer.get_delta_weight("default"), lora)
    assert layer.supports_lora_conversion("default")


# ------------------------------------------------------------------------------------------ held in the weight


def train_step(layer, x, target):
    (layer(x) * target).sum().backward()


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_two_forward_passes_before_one_backward(kind, axis):
    """A layer used twice in one graph gets both gradients, and two small batches give what one big one gives."""
    layer = make_layer(kind, axis).double()
    x = make_inputs(kind, torch.float64)
    output = layer(x)
    target = torch.randn_like(output)
    ((output + layer(x)) * target).sum().backward()
    assert_dense_gradients(kind, layer, output, x, target, repeats=2)
    for parameter in (layer.rows_delta["default"], x):
        parameter.grad = None
    for part, part_target in zip(x.split(1), target.split(1), strict=True):
        train_step(layer, part, part_target)
    assert_dense_gradients(kind, layer, output, x, target)


def use_second(layer, x):
    layer.set_adapter("second")
    layer(x).sum().backward()
    layer.rows_delta.requires_grad_()  # PEFT freezes what is not active


def generate(layer, x):
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()


def generate_in_inference_mode(layer, x):
    with torch.inference_mode():
        layer(x)


def use_disabled(layer, x):
    layer.enable_adapters(False)
    layer(x)
    layer.enable_adapters(True)


def merge_for_a_moment(layer, x):
    layer.merge()
    layer(x)
    layer.unmerge()


def save(layer, x):
    layer.state_dict()


def deep_copy(layer, x):
    copied = copy.deepcopy(layer)
    copied.rows_delta["default"].data.mul_(2)
    copied(x)


BETWEEN = [use_second, generate, generate_in_inference_mode, use_disabled, merge_for_a_moment, save, deep_copy]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_what_happens_between_forward_and_backward(kind, axis, between):
    """The backward pass is that of its own forward pass, whatever the layer is used for in between."""
    layer = make_layer(kind, axis).double()
    layer.update_layer("second", axis="row", num_rows=2, index=torch.tensor([0, 4]))
    randomise(layer)
    layer.double()
    x = make_inputs(kind, torch.float64)
    output = layer(x)
    target = torch.randn_like(output)
    between(layer, x.detach())
    (output * target).sum().backward()
    layer.set_adapter("default")
    assert_dense_gradients(kind, layer, output, x, target)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("kind", "axis"), [case for case in CASES if case[0] != "embedding"])
def test_activation_checkpointing(kind, axis, use_reentrant):
    """Both kinds of activation checkpointing give the same gradients, with another adapter used in between."""
    layer = make_layer(kind, axis).double()
    layer.update_layer("second", axis="row", num_rows=2, index=torch.tensor([0, 4]))
    randomise(layer)
    layer.double()
    x = make_inputs(kind, torch.float64)
    output = checkpoint(layer, x, use_reentrant=use_reentrant)
    target = torch.randn_like(output)
    (output * target).sum().backward()
    assert_dense_gradients(kind, layer, output, x, target)


@pytest.mark.parametrize(("kind", "axis"), LINEAR)
def test_a_used_layer_saves_the_base_weight(kind, axis):
    """state_dict and .weight give the base's own numbers while the weight holds an adapter, and training goes on."""
    layer = make_layer(kind, axis, torch.bfloat16, train_bias=True)
    original, x = make_base(kind, torch.bfloat16), make_inputs(kind, torch.bfloat16)
    adapted = layer(x)
    assert not torch.equal(layer.base_layer.weight, original.weight)
    assert torch.equal(nn.Sequential(layer).state_dict()["0.base_layer.weight"], original.weight)
    assert torch.equal(layer(x), adapted)
    assert torch.equal(layer.weight, original.weight)
    layer(x)
    state = copy.deepcopy(layer.state_dict())
    state["base_layer.weight"] += 1
    layer(x)
    layer.load_state_dict(state)
    layer(x)
    assert torch.equal(layer.get_base_layer().weight, original.weight + 1)


@pytest.mark.parametrize(("kind", "axis"), LINEAR)
def test_a_deep_copy_while_held(kind, axis):
    """A copy of a layer that holds an adapter is one of its own: same output, same base, and it holds too."""
    layer = make_layer(kind, axis)
    original, x = make_base(kind).weight, make_inputs(kind)
    adapted = layer(x)
    copied = copy.deepcopy(layer)
    copied.rows_delta["default"].data.zero_()
    assert copied.can_hold(["default"])
    assert torch.equal(copied(x), make_base(kind)(x))
    assert torch.equal(layer(x), adapted)
    for one in (layer, copied):
        assert torch.equal(one.get_base_layer().weight, original)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("kind", "axis"), LINEAR)
def test_a_cast_while_held(kind, axis, merged):
    """`.to(dtype)` casts the base's own numbers, not those that an adapter has written over them."""
    layer = make_layer(kind, axis)
    layer(make_inputs(kind))
    if merged:
        layer.merge()
    layer.to(torch.bfloat16)
    output = layer(make_inputs(kind, torch.bfloat16))
    if not merged:
        unused = make_layer(kind, axis).to(torch.bfloat16)
        assert torch.equal(output, unused(make_inputs(kind, torch.bfloat16)))
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, make_base(kind, torch.bfloat16).weight)
    assert layer.can_hold(["default"])


def test_a_trained_base_gets_its_gradients():
    """Where the base's weight or bias is trained beside the adapter, both get what autograd gives."""
    for trained in ("weight", "bias"):
        layer = make_layer("linear", "row")
        getattr(layer.base_layer, trained).requires_grad_()
        x = make_inputs("linear")
        dense = dense_equivalent("linear", layer, ["default"])
        layer(x).square().sum().backward()
        dense(x.detach()).square().sum().backward()
        torch.testing.assert_close(getattr(layer.base_layer, trained).grad, getattr(dense, trained).grad)
        torch.testing.assert_close(layer.rows_delta["default"].grad, dense.weight.grad[[1, 4, 6]])


@pytest.mark.parametrize("axis", ["row", "column"])
def test_autocast(axis):
    """Under autocast the layer computes as a plain one: in bf16, gradients in the parameters' own dtype."""
    layer, x = make_layer("linear", axis), make_inputs("linear")
    dense = dense_equivalent("linear", layer, ["default"])
    with torch.autocast("cpu", torch.bfloat16):
        output, dense_output = layer(x), dense(x.detach())
        with torch.no_grad():
            assert torch.equal(layer(x), output)
    assert output.dtype == torch.bfloat16
    output.square().sum().backward()
    dense_output.square().sum().backward()
    torch.testing.assert_close(output, dense_output)
    assert layer.rows_delta["default"].grad.dtype == x.grad.dtype == torch.float32
    expected = slice_of("linear", dense.weight.grad, axis, layer.rows_index["default"])
    torch.testing.assert_close(layer.rows_delta["default"].grad, expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_autograd_keeps_no_weight_and_of_columns_no_input(axis):
    """What is kept for the backward pass: the input for rows, a copy of k columns for columns; never the weight."""
    layer, x = make_layer("linear", axis), torch.randn(50, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(50, 7) if axis == "row" else (50, 2)]
    if axis == "column":
        # A view would keep the whole input alive.
        assert kept[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_compiled(kind, axis):
    """torch.compile takes the layer as one graph, also when it held an adapter before; values and gradients stay."""
    layer = make_layer(kind, axis).double()
    x = make_inputs(kind, torch.float64)
    output = layer(x)
    target = torch.randn_like(output)
    compiled_output = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    (compiled_output * target).sum().backward()
    assert_dense_gradients(kind, layer, compiled_output, x, target)
    torch.testing.assert_close(layer(x), output)
    assert torch.equal(layer.get_base_layer().weight, make_base(kind).weight.double())


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D of transformers", "conv2d"])
def test_dropout_acts_on_the_deltas_input(kind, axis):
    """In training the delta sees an input of which a share is zero and the rest scaled; in evaluation all of it."""
    layer = make_layer(kind, axis, dropout=0.5)
    x = make_inputs(kind)
    torch.manual_seed(3)
    output = layer(x)
    torch.manual_seed(3)
    dropped = functional.dropout(x, 0.5)
    base, dense = make_base(kind), dense_equivalent(kind, layer, ["default"])
    torch.testing.assert_close(output, base(x) + dense(dropped) - base(dropped))
    layer.eval()
    torch.testing.assert_close(layer(x), dense(x))


# ------------------------------------------------------------------------------------------ indices


def test_largest_rows_by_norm():
    """Without a selection the rows and columns of largest L2 norm are taken, sorted by number."""
    weight = torch.tensor([[3.0, 0.0, 0.1], [0.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.5, 0.0]])
    assert largest_rows(weight, 0, 2).tolist() == [0, 2]
    assert largest_rows(weight, 1, 1).tolist() == [0]


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_magnitude_decides_for_every_kind(kind, axis):
    """Every kind of layer finds its rows (columns) of largest L2 norm by itself."""
    base = make_base(kind)
    layer = KINDS[kind].layer(base, "default", axis=axis, num_rows=3)
    dim = KINDS[kind].row_dim if axis == "row" else 1 - KINDS[kind].row_dim
    norms = [vector.norm().item() for vector in base.weight.unbind(dim)]
    assert layer.rows_index["default"].tolist() == sorted(sorted(range(len(norms)), key=norms.__getitem__)[-3:])


@pytest.mark.parametrize("index", [(0, 10), (-1, 2), (3, 2), (2, 2), (), (0.5,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_index_is_refused(kind, index):
    """Indices outside the weight, unsorted, repeated, missing or fractional never reach the layer."""
    with pytest.raises(InputError):
        make_layer(kind, "row", index=index)


# ------------------------------------------------------------------------------------------ any order of use


OPERATIONS = [
    "train", "evaluate", "first", "second", "both", "merge", "unmerge", "disable", "enable", "save", "copy", "delete",
]  # fmt: skip


class Dense:
    """What a layer of two adapters must compute after any sequence of operations, with whole weights alone."""

    def __init__(self, weight, deltas):
        self.original, self.deltas = weight, deltas
        self.active, self.merged, self.enabled = ["first"], [], True

    def sum_of(self, names):
        """The weight with these adapters written into it one after the other, each rounded to the weight's dtype."""
        weight = self.original
        for name in names:
            changed = (weight + self.deltas[name]).to(weight.dtype)
            weight = torch.where(self.deltas[name] != 0, changed, weight)
        return weight

    def perform(self, operation):
        if operation in ("train", "evaluate") and not self.enabled:
            self.merged = []
        elif operation in ("first", "second"):
            self.active = [operation]
        elif operation == "both":
            self.active = ["first", "second"]
        elif operation == "merge":
            self.merged += [name for name in self.active if name not in self.merged]
        elif operation == "unmerge":
            self.merged = []
        elif operation in ("disable", "enable"):
            self.enabled = operation == "enable"

    @property
    def effective(self):
        if not self.enabled:
            return self.original
        return self.sum_of(self.merged or self.active)


def perform(layer, operation):
    """`operation` on the layer itself; forward passes are done by the caller."""
    if operation in ("first", "second"):
        layer.set_adapter(operation)
    elif operation == "both":
        layer.set_adapter(["first", "second"])
    elif operation == "merge":
        layer.merge()
    elif operation == "unmerge":
        layer.unmerge()
    elif operation in ("disable", "enable"):
        layer.enable_adapters(operation == "enable")
    elif operation == "save":
        layer.state_dict()
    elif operation == "copy":
        return copy.deepcopy(layer)
    elif operation == "delete":
        layer.update_layer("third", axis="row", num_rows=1)
        layer.delete_adapter("third")
    return layer


@st.composite
def layers(draw):
    """A linear layer of any shape, class and dtype with two adapters of any indices and axes, and its dense model."""
    size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dtype, conv1d = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    base = Conv1D(*size) if conv1d else nn.Linear(size[1], size[0])
    nn.init.normal_(base.weight)
    base.to(dtype).requires_grad_(False)
    deltas, layer = {}, None
    for name in ("first", "second"):
        dim = draw(st.sampled_from([0, 1]))
        index = torch.tensor(sorted(draw(st.sets(st.integers(0, size[dim] - 1), min_size=1))))
        how = {"axis": ("row", "column")[dim], "num_rows": len(index), "index": index, "init_weights": False}
        if layer is None:
            layer = Linear(base, name, **how)
        else:
            layer.update_layer(name, **how)
        layer.rows_delta[name].data.mul_(20)
        deltas[name] = torch.zeros(size)
        target = deltas[name] if dim == 0 else deltas[name].T
        target[index] = layer.rows_delta[name].detach() if dim == 0 else layer.rows_delta[name].detach().T
    weight = base.weight.detach().clone()
    return layer, Dense(weight.T if conv1d else weight, deltas)


@given(layers(), st.lists(st.sampled_from(OPERATIONS), max_size=12))
@settings(max_examples=150)
def test_any_order_of_use(made, operations):
    """After any sequence of uses the output is that of dense weights and the base weight has every bit it had."""
    layer, dense = made
    dtype = dense.original.dtype
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.03}
    for operation in operations:
        dense.perform(operation)
        layer = perform(layer, operation)
        if operation in ("train", "evaluate"):
            x = torch.randn(3, layer.in_features).to(dtype)
            with nullcontext() if operation == "train" else torch.no_grad():
                output = layer(x)
            torch.testing.assert_close(output, functional.linear(x, dense.effective, layer._bias), **tolerance)
            if operation == "train" and output.requires_grad:
                output.square().sum().backward()
        bits = dense.sum_of(dense.merged)
        base = layer.get_base_layer().weight
        assert torch.equal(base.T if isinstance(layer.base_layer, Conv1D) else base, bits)
    layer.unmerge()
    base = layer.get_base_layer().weight
    assert torch.equal(base.T if isinstance(layer.base_layer, Conv1D) else base, dense.original)
