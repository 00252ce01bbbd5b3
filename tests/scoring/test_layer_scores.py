"""Layer scores by forward passes, against gates that autograd differentiates."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rowscope import InputError
from rowscope.records import LayerScores
from rowscope.scoring.layer_scores import layer_of, rows, zero_order

LAYERS = 6


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Blocks of unequal importance: some attention and feed-forward outputs are scaled."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, (20, 5, 30, 3, 10, 40), strict=True):
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def batches():
    """Three batches with unequally many predicted tokens."""
    tokens = torch.randint(3, 61, (3, 2, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:2, 0, :4] = -100
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(tokens, labels, strict=True)
    ]


def token_slopes(model, batch) -> torch.Tensor:
    """∂L_p/∂γ_l by autograd, ``(tokens, layers)``, with gates on the attention's and the feed-forward's outputs."""
    gates = [torch.zeros((), requires_grad=True) for _ in model.model.layers]
    hooks = []
    for layer, gate in zip(model.model.layers, gates, strict=True):
        # the block adds attention + feed-forward; the latter sees the stream with the attention's own, unscaled
        seen = {}

        def attention(_, __, output, seen=seen):
            seen["attention"] = output[0]

        def block(_, inputs, output, seen=seen, gate=gate, layer=layer):
            stream = inputs[0] + seen["attention"]
            added = seen["attention"] + layer.mlp(layer.post_attention_layernorm(stream))
            return inputs[0] + added * (1 + gate)

        hooks += [layer.self_attn.register_forward_hook(attention), layer.register_forward_hook(block)]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")[labels.flatten() != -100]
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(torch.autograd.grad(loss, gates, retain_graph=True)) for loss in losses])


def as_tensor(values: dict[str, float]) -> torch.Tensor:
    return torch.tensor(list(values.values()))


def test_formula(model, batches):
    """Guards the scores: root mean square over all tokens of all batches of exact derivatives of their own losses."""
    found = zero_order(model, batches, seed=4, model_source="m", model_fingerprint="f", data_source="d")
    slopes = torch.cat([token_slopes(model, batch) for batch in batches])
    assert len(slopes) == 2 * (5 + 8) + 16
    assert list(found.scores) == [f"model.layers.{number}" for number in range(LAYERS)]
    expected = slopes.square().mean(0).sqrt()
    assert expected.max() > 3 * expected.min(), "a case in which layers differ"
    torch.testing.assert_close(as_tensor(found.scores), expected, rtol=0.01, atol=0)
    assert spearmanr(list(found.scores.values()), expected)[0] == pytest.approx(1)
    assert (found.forward_passes, found.backward_passes, found.seed) == (3 * (LAYERS + 1), 0, 4)
    assert (found.model_source, found.model_fingerprint, found.data_source) == ("m", "f", "d")
    assert found.criterion == "gates:passes=512,epsilon=0.001"


def test_noise(model, batches):
    """Guards the standard error: over batches by their residuals, of one batch over its halves, of one token none."""
    slopes = [token_slopes(model, batch).square().double() for batch in batches]

    def expected(groups):
        count = sum(map(len, groups))
        mean = sum(group.sum(0) for group in groups) / count
        spread = sum((group.sum(0) - mean * len(group)).square() for group in groups)
        return (spread * len(groups) / (len(groups) - 1)).sqrt() / count / (2 * mean.sqrt())

    found = as_tensor(zero_order(model, batches).noise)
    torch.testing.assert_close(found, expected(slopes).float(), rtol=0.03, atol=5e-4)
    found = as_tensor(zero_order(model, batches[:1]).noise)
    torch.testing.assert_close(found, expected([slopes[0][:7], slopes[0][7:]]).float(), rtol=0.03, atol=5e-4)
    batches[0]["labels"][:] = -100
    batches[0]["labels"][0, 3] = 5
    assert zero_order(model, batches[:1]).noise == {}


def test_passes_limit_the_batches(model, batches):
    """Guards what passes buy: whole batches, from the first on."""
    both = zero_order(model, batches, passes=3 * (LAYERS + 1) - 1)
    assert both.forward_passes == 2 * (LAYERS + 1)
    assert both.scores == zero_order(model, batches[:2]).scores
    assert both.data_fingerprint == zero_order(model, batches).data_fingerprint, "of the batches that were given"
    with pytest.raises(InputError, match="passes=6 do not suffice: a batch takes 7"):
        zero_order(model, batches, passes=LAYERS)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.35), (torch.float16, 0.1), (torch.float64, 0.01)])
def test_other_precisions(model, batches, dtype, error):
    """Guards 16-bit models, where a step of 0.001 drowns in rounding, and steps below the precision of the loss."""
    exact = torch.cat([token_slopes(model, batch) for batch in batches]).square().mean(0).sqrt()
    found = zero_order(model.to(dtype), batches, epsilon=1e-8)
    torch.testing.assert_close(as_tensor(found.scores), exact, rtol=error, atol=0)


def test_a_loss_of_your_own(model, batches):
    """Guards own losses: parts that sum to it count as tokens, a 0-D loss is one part."""

    def parts(model, batch):
        logits = model(batch["input_ids"]).logits[:, -1]
        return logits.logsumexp(-1) / len(logits)

    for loss in (parts, lambda model, batch: parts(model, batch).sum()):
        found = zero_order(model, batches[:2], loss=loss)
        assert all(math.isfinite(score) and score > 0 for score in found.scores.values())
    assert len(found.noise) == LAYERS
    assert zero_order(model, batches[:1], loss=loss).noise == {}, "one part has no spread"


class Stack(nn.Module):
    """Blocks that are called as a test wants."""

    def __init__(self, blocks, call=lambda block, x: block(x)):
        super().__init__()
        self.blocks, self.call = nn.ModuleList(blocks), call

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return type("Output", (), {"loss": x.square().mean()})


class Block(nn.Linear):
    def forward(self, hidden_states, pair=False):
        output = super().forward(hidden_states)
        return (output, None) if pair else output


def test_ways_of_calling_blocks():
    """Guards blocks that return tuples, get their input by name, or are not there; and a dead block's zero."""
    torch.manual_seed(0)
    blocks, batches = [Block(4, 4), Block(4, 4)], [{"x": torch.randn(3, 4)}]
    plain = zero_order(Stack(blocks), batches).scores
    assert zero_order(Stack(blocks, lambda block, x: block(hidden_states=x)), batches).scores == plain
    assert zero_order(Stack(blocks, lambda block, x: block(x, pair=True)[0]), batches).scores == plain
    unused = zero_order(Stack(blocks, lambda block, x: block(x) if block is blocks[0] else x), batches)
    assert unused.scores["blocks.1"] == 0
    assert unused.noise == {}


def test_refusals(model, batches):
    """Guards one line: no blocks, blocks that change the shape, no data, a bad step, a loss that is NaN."""
    with pytest.raises(InputError, match="the model has no layers"):
        zero_order(nn.Linear(4, 4), batches)
    with pytest.raises(InputError, match="another shape than its input"):
        zero_order(Stack([Block(4, 3), Block(3, 4)]), [{"x": torch.randn(3, 4)}])
    with pytest.raises(InputError, match="need data"):
        zero_order(model, [])
    with pytest.raises(InputError, match="must be greater than 0"):
        zero_order(model, batches, epsilon=0.0)
    batches[1]["labels"][:] = -100
    with pytest.raises(InputError, match="loss of batch 1 is nan"):
        zero_order(model, batches)


def test_leaves_the_model_alone(model, batches):
    """Guards forwards, modes and flags, also after a failure; and that no graph is ever built."""
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    grads = []
    model.lm_head.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    zero_order(model, batches)
    batches[2]["labels"][:] = -100
    with pytest.raises(InputError):
        zero_order(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert grads
    assert not any(grads)


def test_rows_for_people():
    """Guards the table: shares of the sum, a dash where there is no error, no division by zero."""
    assert rows(LayerScores({"a": 1.0, "b": 3.0}, "x", noise={"a": 0.5}))[1] == [
        ["a", "1", "0.5", "25.0%"],
        ["b", "3", "-", "75.0%"],
    ]
    assert rows(LayerScores({"a": 0.0}, "x"))[1] == [["a", "0", "-", "0.0%"]]


def test_layer_of():
    """Guards whole names: block 1 is not the block of what is in block 11."""
    blocks = ["h.1", "h.11"]
    assert [layer_of(name, blocks) for name in ("h.11.mlp", "h.1.mlp", "h.1", "head")] == ["h.11", "h.1", "h.1", ""]
