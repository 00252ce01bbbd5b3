"""Experts taken out of 3-D parameters: the same numbers in the same memory, and a way back."""

import copy

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from rowscope import models
from rowscope.experts import SeparateExperts, fuse, is_fused, linears, separate, separated, submodule

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = torch.arange(3, 21).reshape(2, 9)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fused_experts(model):
    return [module for module in model.modules() if is_fused(module)]


class Config:
    _experts_implementation = "batched_mm"


def own_experts(experts=3, **layout):
    """Experts of a class of our own with random numbers, in a layout that transformers' decorator describes."""

    @use_experts_implementation(**layout)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            first = ("gate_up_proj", 10) if layout.get("has_gate", True) else ("up_proj", 5)
            for name, rows, columns in ((*first, 4), ("down_proj", 4, 5)):
                shape = (columns, rows) if layout.get("is_transposed") else (rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(experts, *shape)))
                if layout.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, rows)))
            self.act_fn = nn.SiLU()
            if layout.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(4)
            self.num_experts = experts

        def forward(self, *_):
            raise NotImplementedError

    torch.manual_seed(0)
    return Experts(Config())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_separate_experts_compute_the_same(make_mixture, kind, implementation):
    """Guards the forward pass: logits are those of each of transformers' own implementations, to 1e-6."""
    model = make_mixture(kind)
    model.set_experts_implementation(implementation)
    expected = logits(model)
    with separated(model):
        found = logits(model)
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"has_gate": False},
        {"is_transposed": True},
        {"has_bias": True},
        {"has_gate": False, "is_transposed": True, "has_bias": True},
        {"has_post_expert_norm": True},
    ],
)
def test_every_layout(layout):
    """Guards the layouts that the decorator knows: without gate, transposed, with biases, with a norm behind."""
    experts = own_experts(**layout)
    x, weights = torch.randn(7, 4), torch.rand(7, 2)
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [0, 2], [2, 0], [2, 0], [0, 2]])  # none for expert 1
    with torch.no_grad():
        torch.testing.assert_close(
            SeparateExperts(experts)(x, index, weights), experts(x, index, weights), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_that_is_trained(make_mixture, kind):
    """Guards the backward pass: gradients of experts, router, attention and embeddings are the fused model's."""
    model = make_mixture(kind)
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    separate(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        owner, _, part = name.rpartition(".")
        projection, _, expert = owner.rpartition(".")
        if projection.rpartition(".")[0].endswith("experts"):
            gradient = expected[projection + ("_bias" if part == "bias" else "")][int(expert)]
            gradient = gradient.T if kind == "gpt_oss" and part == "weight" else gradient
            found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
        else:
            gradient, found = expected[name], parameter.grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_shared_and_counted_once(make_mixture, kind):
    """Guards memory: no number is copied, no parameter counted twice, and what a layer writes the fused one has."""
    model = make_mixture(kind)
    fused, count = fused_experts(model), model.num_parameters()
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    separate(model)
    assert model.num_parameters() == count
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages
    layer = model.get_submodule("model.layers.1.mlp.experts.down_proj.2")
    layer.weight.data[5, 3] = 7
    place = (2, 3, 5) if kind == "gpt_oss" else (2, 5, 3)
    assert fused[1].down_proj[place].item() == 7


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_puts_everything_back(make_mixture, kind):
    """Guards the way back: the same modules in the same order with the same names, flags and bits."""
    model = make_mixture(kind)
    fused_experts(model)[0].down_proj.requires_grad_(False)
    modules = list(model.named_modules())
    flags = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(separate(model)) == 2
    assert not fused_experts(model)
    fuse(model)
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(model.named_modules(), modules, strict=True))
    found = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
    assert all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(found, flags, strict=True))
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def test_what_was_separate_before_stays_so(make_mixture):
    """Guards `separated` on a model whose experts someone else has taken apart."""
    model = make_mixture()
    mine = separate(model)
    with separated(model):
        pass
    assert [module for module in model.modules() if isinstance(module, SeparateExperts)] == mine


@pytest.mark.parametrize("kind", KINDS)
def test_moving_keeps_the_memory_shared(make_mixture, kind):
    """Guards `.to`: after a change of dtype layers and fused parameters are one memory, and hold the moved numbers."""
    model = make_mixture(kind)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    (first, _) = separate(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    first.down_proj[1].weight.data.fill_(2)
    assert bool((first.fused.down_proj[1] == 2).all())
    expected["model.layers.0.mlp.experts.down_proj"][1] = 2
    fuse(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_deep_copy_has_its_own_memory(make_mixture):
    """Guards copies: layers and fused parameters of a copy are one memory again, apart from the original's."""
    model = make_mixture()
    separate(model)
    copied = copy.deepcopy(model)
    experts = copied.model.layers[0].mlp.experts
    experts.gate_up_proj[3].weight.data.fill_(5)
    assert bool((experts.fused.gate_up_proj[3] == 5).all())
    assert not bool((model.model.layers[0].mlp.experts.gate_up_proj[3].weight == 5).any())


def test_a_replaced_weight_is_not_lost(make_mixture):
    """Guards against a weight that is another tensor meanwhile: moving and fusing take its numbers."""
    model = make_mixture()
    separate(model)
    model.get_submodule("model.layers.1.mlp.experts.down_proj.0").weight = nn.Parameter(torch.full((24, 16), 2.0))
    model.to(torch.bfloat16)
    model.get_submodule("model.layers.0.mlp.experts.gate_up_proj.1").weight = nn.Parameter(torch.full((32, 24), 3.0))
    fuse(model)
    assert bool((model.model.layers[0].mlp.experts.gate_up_proj[1] == 3).all())
    assert bool((model.model.layers[1].mlp.experts.down_proj[0] == 2).all())


def test_experts_in_two_places():
    """Guards a module that a model uses twice: both places get the same layers, and the module back."""
    experts = own_experts()
    model = nn.ModuleDict({"a": nn.ModuleDict({"experts": experts}), "b": nn.ModuleDict({"experts": experts})})
    separate(model)
    assert isinstance(model["a"]["experts"], SeparateExperts)
    assert model["a"]["experts"] is model["b"]["experts"]
    fuse(model)
    assert model["a"]["experts"] is model["b"]["experts"] is experts


def test_others_are_left_alone():
    """Guards what is not recognised: no attributes, eight bits, spread over devices, or a forward of someone else."""
    plain = nn.Module()
    plain.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
    plain.down_proj = nn.Parameter(torch.zeros(2, 4, 3))
    small, spread, hooked, more = (own_experts() for _ in range(4))
    for name in ("gate_up_proj", "down_proj"):
        setattr(small, name, nn.Parameter(getattr(small, name).data.to(torch.float8_e4m3fn), requires_grad=False))
    spread._is_expert_parallel = True
    hooked.forward = lambda *args: args[0]
    more.scales = nn.Parameter(torch.ones(3))
    assert is_fused(own_experts())
    assert not any(is_fused(module) for module in (plain, small, spread, hooked, more, nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_linear_modules(make_mixture, kind):
    """Guards the house's names: every expert is a linear module of its block with its shape and its numbers."""
    model = make_mixture(kind)
    found = models.linear_modules(model)
    assert len(found) == 2 * (4 + 2 * 4)
    for expert in range(4):
        layer = found[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape) == (32, 24)
    assert layer.weight.data_ptr() == model.model.layers[1].mlp.experts.gate_up_proj[3].data_ptr()
    assert torch.equal(submodule(model, "model.layers.1.mlp.experts.gate_up_proj.3").weight, layer.weight)
    assert submodule(model, "model.layers.1.self_attn.q_proj") is model.model.layers[1].self_attn.q_proj
    with separated(model):
        assert list(models.linear_modules(model)) == list(found)


def test_making_layers_draws_no_random_numbers():
    """Guards reproducible runs: what is drawn afterwards does not depend on whether there are experts."""
    experts = own_experts()
    state = torch.get_rng_state()
    linears(experts)
    assert torch.equal(torch.get_rng_state(), state)


def test_experts_are_no_blocks():
    """Guards a single mixture without a stack of blocks: its experts are not taken for one."""
    model = nn.ModuleDict({"experts": own_experts()})
    separate(model)
    assert models.layers(model) == {}
