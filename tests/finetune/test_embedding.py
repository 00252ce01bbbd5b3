"""Embeddings, opted in by name: features and tokens, padding, and a table that is tied to the output head."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rowscope import InputError, RowsConfig
from rowscope.finetune import RowsLayer
from rowscope.finetune.embedding import Embedding

IDS = torch.tensor([[0, 3, 3, 8], [5, 0, 1, 3]])
INDEX = {"row": (1, 4), "column": (0, 3, 5)}
EVERY_TOKEN = torch.arange(24).reshape(3, 8)  # of the language models below


def adapted(axis, **settings):
    """A table of nine tokens with an adapter of random values, and the dense table with the delta in it."""
    torch.manual_seed(0)
    base = nn.Embedding(9, 6, **settings).requires_grad_(False)
    index = torch.tensor(INDEX[axis])
    layer = Embedding(base, "default", axis=axis, num_rows=len(index), index=index, init_weights=False)
    layer.rows_delta["default"].data.mul_(20)
    table = base.weight.clone()
    for position, number in enumerate(INDEX[axis]):
        if axis == "row":
            table[:, number] += layer.rows_delta["default"].data[position]
        else:
            table[number] += layer.rows_delta["default"].data[:, position]
    return layer, table.requires_grad_()


@pytest.mark.parametrize(
    "settings", [{}, {"padding_idx": 0}, {"padding_idx": -1}, {"scale_grad_by_freq": True}], ids=str
)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_every_setting_of_the_base(axis, settings):
    """Repeated tokens, padding without a gradient and gradients by frequency are as in torch's own embedding."""
    layer, table = adapted(axis, **settings)
    output = layer(IDS)
    expected = functional.embedding(IDS, table, **settings)
    torch.testing.assert_close(output, expected)
    target = torch.randn_like(output)
    (output * target).sum().backward()
    (expected * target).sum().backward()
    gradient = table.grad.T[list(INDEX[axis])] if axis == "row" else table.grad[list(INDEX[axis])].T
    torch.testing.assert_close(layer.rows_delta["default"].grad, gradient)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_any_shape_and_integer_of_tokens(axis):
    """One token, none, and 32-bit token numbers look up what 64-bit ones do."""
    layer, table = adapted(axis)
    for ids in (torch.tensor(3), torch.empty(0, 2, dtype=torch.long), IDS.int()):
        torch.testing.assert_close(layer(ids), functional.embedding(ids, table))


def test_dropout_takes_whole_tokens_of_the_delta():
    """Dropout acts on the one-hot input: a token's change is dropped whole or scaled, in training alone."""
    layer, table = adapted("row")
    layer.rows_dropout["default"] = 0.5
    ids = torch.arange(9).repeat(20)
    change = (layer(ids) - layer.base_layer(ids))[:, list(INDEX["row"])]
    full = 2 * layer.rows_delta["default"].detach().T[ids]
    kept = (change.abs() > 0).all(-1)
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(change[kept], full[kept])
    assert not change[~kept].any()
    change.sum().backward()
    expected = torch.zeros(9).index_add(0, ids, 2 * kept.float())
    torch.testing.assert_close(layer.rows_delta["default"].grad, expected.expand(2, 9))
    layer.eval()
    torch.testing.assert_close(layer(ids), functional.embedding(ids, table))


def test_a_table_that_renormalises_itself_is_refused():
    """max_norm writes to the weight in every forward pass; merging could not be undone."""
    with pytest.raises(InputError, match="max_norm"):
        Embedding(nn.Embedding(9, 6, max_norm=1.0), "default", axis="row", num_rows=2)


# ------------------------------------------------------------------------------------------ in a language model


def gpt2():
    """Tied table and head, positions beside them."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=8, resid_pdrop=0.0, attn_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def llama():
    """Table and head of their own."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=24, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def make_model(family, dtype=torch.float32):
    torch.manual_seed(0)
    return family().to(dtype).eval()


def logits(model):
    return model(input_ids=EVERY_TOKEN).logits


def test_all_linear_leaves_embeddings_alone():
    """Embeddings and head are trained only where someone names them."""
    for family in (gpt2, llama):
        model = get_peft_model(make_model(family), RowsConfig(target_modules="all-linear", num_rows=2))
        base = model.get_base_model()
        assert not isinstance(base.get_input_embeddings(), RowsLayer)
        assert not isinstance(base.get_output_embeddings(), RowsLayer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize(
    ("family", "targets"),
    [(gpt2, ["wte"]), (gpt2, ["lm_head"]), (gpt2, ["wte", "lm_head", "wpe"]), (llama, ["embed_tokens", "lm_head"])],
    ids=lambda value: value.__name__ if callable(value) else "-".join(value),
)
def test_named_embeddings_and_heads(family, targets, axis, dtype, tmp_path):
    """A named table or head trains alone: its tied partner keeps the base's numbers, through merging and saving."""
    base = make_model(family, dtype)
    model = get_peft_model(make_model(family, dtype), RowsConfig(target_modules=targets, axis=axis, num_rows=3))
    assert torch.equal(logits(model), logits(base))
    for name, parameter in model.named_parameters():
        if "rows_delta" in name:
            nn.init.normal_(parameter.data, std=0.1)
    trained = logits(model)
    assert not torch.equal(trained, logits(base))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, atol=tolerance, rtol=tolerance)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(family, dtype), tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=tolerance, rtol=tolerance)
    merged.save_pretrained(tmp_path / "merged")
    again = family().from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("axis", ["row", "column"])
def test_gradients_of_a_tied_table_and_head(axis):
    """Tied weights: a delta gets the gradient of its own use of the weight, the partner's use gives none."""
    model = get_peft_model(make_model(gpt2), RowsConfig(target_modules=["wte", "lm_head"], axis=axis, num_rows=3))
    model(input_ids=EVERY_TOKEN, labels=EVERY_TOKEN).loss.backward()
    untied = make_model(gpt2)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied(input_ids=EVERY_TOKEN, labels=EVERY_TOKEN).loss.backward()
    layers = model.get_base_model()
    table, head = untied.transformer.wte.weight.grad, untied.lm_head.weight.grad
    dim = 0 if axis == "row" else 1
    for layer, gradient in ((layers.transformer.wte, table.T), (layers.lm_head, head)):
        expected = gradient.index_select(dim, layer.rows_index["default"])
        torch.testing.assert_close(layer.rows_delta["default"].grad, expected)


def test_inputs_that_require_gradients():
    """The hook that activation checkpointing needs on the table works on a trained one too."""
    model = make_model(llama)
    get_peft_model(model, RowsConfig(target_modules=["embed_tokens", "up_proj"], num_rows=3))
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(input_ids=EVERY_TOKEN, labels=EVERY_TOKEN).loss.backward()
    for layer in (model.model.embed_tokens, model.model.layers[0].mlp.up_proj):
        assert layer.rows_delta["default"].grad.any()
