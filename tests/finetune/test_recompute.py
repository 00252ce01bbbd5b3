"""Activations that are made again: the same numbers, fewer bytes, on any architecture that is recognised."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from rowscope import RowsConfig
from rowscope.finetune.recipes import elementwise, recipe_of
from rowscope.finetune.recompute import keep_activations, recompute_activations

torch.set_num_threads(1)

SIZES = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES, resid_pdrop=0.0),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=40, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    ),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=88, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, word_embed_proj_dim=32,
        dropout=0.0, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
METHODS = {
    "rows": {"axis": "row"},
    "columns": {"axis": "column"},
    "lora": None,
}
IDS = torch.arange(24).reshape(2, 12)


def build(architecture, method, dtype=torch.float32):
    """A small model of random weights with an adapter of random numbers, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]).to(dtype)
    fields = METHODS[method]
    if fields is None:
        config = LoraConfig(
            target_modules="all-linear", r=4, init_lora_weights=False, fan_in_fan_out=architecture == "gpt2"
        )
    else:
        config = RowsConfig(target_modules="all-linear", num_rows=4, init_weights=False, **fields)
    return get_peft_model(model, config).train()


def step(model):
    """Loss, gradients, and the shapes of what autograd kept between, one for each storage that is no weight."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, list(kept.values())


def size_of(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_same_gradients_with_fewer_bytes(architecture, method, dtype):
    """Loss bit-equal, gradients equal to 1e-6, less kept for the backward pass, whatever architecture and method."""
    model = build(architecture, method, dtype)
    loss, gradients, kept = step(model)
    changed = recompute_activations(model)
    assert any("norm" in name or "ln_" in name for name in changed)
    again, others, fewer = step(model)
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=1e-6)
    assert size_of(fewer) < size_of(kept)
    keep_activations(model)
    assert size_of(step(model)[2]) == size_of(kept)


@pytest.mark.parametrize("method", ["rows", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma2"])
def test_of_a_gated_block_only_gate_and_up_are_kept(architecture, method):
    """The floor: per gated block two tensors of its width stay for the backward pass, or one of twice the width."""
    model = build(architecture, method)
    recompute_activations(model)
    widths = [tensor.shape[-1] for tensor in step(model)[2] if tensor.ndim]
    layers, width = CONFIGS[architecture].num_hidden_layers, CONFIGS[architecture].intermediate_size
    assert widths.count(width) + 2 * widths.count(2 * width) == 2 * layers


def test_evaluation_and_generation_are_untouched():
    """Without gradients the original forward passes run, to the same bits."""
    model = build("llama", "rows").eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        recompute_activations(model)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_twice_is_once():
    """A second call finds nothing left to change."""
    model = build("llama", "rows")
    assert recompute_activations(model)
    assert recompute_activations(model) == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_activation_checkpointing(use_reentrant):
    """Both kinds of activation checkpointing give the same gradients with recomputation inside."""
    model = build("llama", "rows")
    _, gradients, _ = step(model)
    recompute_activations(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, others, _ = step(model)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-7, rtol=1e-5)


def test_under_autocast():
    """What is made again under autocast has the dtype it had."""
    model = build("llama", "rows")
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients, _ = step(model)
        recompute_activations(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()  # outside, as a Trainer does
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-2, atol=1e-3)


def test_a_trained_norm_gets_its_gradient():
    """A norm whose weight is trained is left as it is: its gradient is that of plain autograd."""
    model = build("llama", "rows")
    norm = model.get_base_model().model.layers[1].input_layernorm
    norm.weight.requires_grad_()
    _, gradients, _ = step(model)
    recompute_activations(model)
    _, others, _ = step(model)
    name = next(name for name in gradients if "layernorm" in name)
    torch.testing.assert_close(others[name], gradients[name])


def test_a_block_with_dropout_is_not_taken_for_a_product():
    """Where the forward pass of a gated block does more than the product, in training alone, it stays its own."""

    class Block(nn.Module):
        def __init__(self, probability):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act, self.dropout = nn.SiLU(), nn.Dropout(probability)

        def forward(self, x):
            return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))

    assert recompute_activations(Block(0.0).eval()) == [""]
    block = Block(0.5).eval()
    state = torch.get_rng_state()
    assert recompute_activations(block) == ["act"]
    assert not block.training
    assert torch.equal(torch.get_rng_state(), state)


def test_softmax_batch_norm_and_identity_are_neither_norm_nor_activation():
    """Modules that mix tokens or numbers, keep statistics or do nothing are left alone."""
    model = nn.Sequential(
        nn.Softmax(-1), nn.BatchNorm1d(3), nn.Identity(), nn.Dropout(0.5), nn.LayerNorm(8), nn.GELU()
    )
    statistics = model[1].running_mean.clone()
    assert recompute_activations(model) == ["4", "5"]
    assert torch.equal(model[1].running_mean, statistics)


def test_a_copied_model_recomputes_by_itself():
    """A deep copy uses its own weights in what is made again, not those of the original."""
    model = build("llama", "rows")
    recompute_activations(model)
    copied = copy.deepcopy(model)
    for weight in copied.get_base_model().model.layers[0].input_layernorm.parameters():
        weight.data.mul_(2)
    expected = build("llama", "rows")
    expected.get_base_model().model.layers[0].input_layernorm.weight.data.mul_(2)
    _, gradients, _ = step(expected)
    _, found, _ = step(copied)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)


def test_an_activation_is_made_again_once_for_all_who_need_it():
    """However many layers keep a recipe, one backward pass runs it once more, and frees what it made."""
    runs = []

    def double(x):
        runs.append(1)
        return 2 * x

    x = torch.randn(3, requires_grad=True)
    y = elementwise(double, x)
    recipe, inputs = recipe_of(y)
    first = recipe.replay(inputs)[0]
    assert recipe.replay(inputs)[0] is first
    y.sum().backward()
    assert len(runs) == 2
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert recipe._replayed is None


def test_recipes_keep_no_tensor_under_saved_tensor_hooks():
    """All that is kept goes through autograd: checkpointing and offloading see it and can drop it."""
    x = torch.randn(4, 8, requires_grad=True)
    norm = nn.LayerNorm(8).requires_grad_(False)
    result = checkpoint(lambda x: elementwise(norm, x), x, use_reentrant=False)
    result.sum().backward()
    expected = torch.autograd.grad(norm(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
