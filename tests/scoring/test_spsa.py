"""The published zero-order estimator against a naive one, and the weights it must not touch."""

import math

import pytest
import torch
from torch import nn

from rowscope import InputError, criterion, scoring
from rowscope.models import linear_modules
from rowscope.scoring.spsa import draw


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (3, 2, 9), generator=generator)
    labels = tokens.clone()
    labels[:, 0, :4] = -100
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(tokens, labels, strict=True)
    ]


def test_naive(tiny_llama, batches):
    """Guards the estimator: the same draws, written naively with the whole perturbed model, give the same scores."""
    tiny_llama.double()
    modules = linear_modules(tiny_llama)
    passes, epsilon, seed = 12, 1e-3, 5
    rule = criterion(f"zo-taylor:estimator=spsa,passes={passes},epsilon={epsilon}")
    table = scoring.score(tiny_llama, rule, batches, seed=seed)
    first = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed)))
    weights = [module.weight for module in modules.values()]
    originals = [weight.detach().clone() for weight in weights]
    estimate = [torch.zeros_like(weight) for weight in originals]
    slopes = []
    for probe in range(passes // 2):
        zs = [draw(w, first + probe * len(modules) + n) for n, w in enumerate(originals)]
        losses = []
        for sign in (1, -1):
            for weight, original, z in zip(weights, originals, zs, strict=True):
                weight.data = original + sign * epsilon * z
            with torch.no_grad():
                losses.append(tiny_llama(**batches[probe % 3]).loss)
        slopes.append((losses[0] - losses[1]) / (2 * epsilon))
        estimate = [e + slopes[-1] * z / (passes // 2) for e, z in zip(estimate, zs, strict=True)]
    sigma = torch.stack(slopes).square().mean().sqrt() / math.sqrt(passes // 2)
    for number, name in enumerate(modules):
        product = originals[number].abs() * estimate[number].abs()
        torch.testing.assert_close(table.scores[name]["row"], product.sum(1).float(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(table.scores[name]["column"], product.sum(0).float(), rtol=1e-4, atol=1e-7)
        expected = originals[number].abs().sum(1) * sigma * math.sqrt(2 / math.pi)
        torch.testing.assert_close(table.noise[name]["row"], expected.float(), rtol=1e-4, atol=1e-7)
    energy = sum(float(e.square().sum()) for e in estimate)
    count = sum(e.numel() for e in estimate)
    ratio = math.sqrt(max(0.0, energy / (count * float(sigma) ** 2) - 1))
    assert table.provenance.signal_to_noise == pytest.approx(ratio, abs=1e-3)
    assert table.provenance.forward_passes == passes


def test_slopes_follow_the_gradient(tiny_llama, batches):
    """Guards the estimate's scale: a slope along z is g·z, its mean square the gradient's squared norm."""
    modules = linear_modules(tiny_llama.double())
    weights = [module.weight for module in modules.values()]
    gradients = torch.autograd.grad(tiny_llama(**batches[0]).loss, weights)
    rule = criterion("zo-taylor:estimator=spsa,passes=400")
    table = scoring.score(tiny_llama, rule, batches[:1], seed=0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    name = next(iter(modules))
    sizes = modules[name].weight.detach().abs().sum(1).float()
    sigma = float((table.noise[name]["row"] / sizes).mean()) / math.sqrt(2 / math.pi)
    assert sigma * math.sqrt(200) == pytest.approx(norm, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restores_the_weights(tiny_llama, batches, dtype):
    """Guards the weights bit for bit, in bf16 too, also when a forward pass fails midway."""
    tiny_llama.to(dtype)
    rule = criterion("zo-taylor:estimator=spsa,passes=4")
    before = {name: parameter.detach().clone() for name, parameter in tiny_llama.named_parameters()}
    scoring.score(tiny_llama, rule, batches)
    del batches[1]["attention_mask"]
    batches[1]["input_ids"] = torch.full((2, 9), 10**6)
    with pytest.raises(InputError, match="rejects batch 1"):
        scoring.score(tiny_llama, rule, batches)
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(before[name], parameter)
        assert not parameter.is_inference()
    for module in tiny_llama.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_forward_only(tiny_llama, batches):
    """Guards 'forward passes only': every pass runs in inference mode, and there are as many as were asked for."""
    seen = []
    tiny_llama.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    table = scoring.score(tiny_llama, criterion("zo-taylor:estimator=spsa,passes=10"), batches)
    assert seen == [True] * 10
    assert table.provenance.forward_passes == 10
    for part in (table.scores, table.noise, *table.halves):
        assert not any(values.is_inference() for axes in part.values() for values in axes.values())


def test_quantised(tiny_llama, batches):
    """Guards bitsandbytes layers: scores are those of a full model that holds the dequantised weights."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    rule, held = criterion("zo-taylor:estimator=spsa,passes=12,epsilon=0.01"), {}
    for name, module in linear_modules(tiny_llama).items():
        sizes = (module.in_features, module.out_features)
        layer = Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(module.state_dict())
        layer = layer.to("cpu").eval()
        held[name] = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        tiny_llama.set_submodule(name, layer)
    packed = {name: tiny_llama.get_submodule(name).weight.detach().clone() for name in held}
    table = scoring.score(tiny_llama, rule, batches)
    for name, values in held.items():
        assert torch.equal(tiny_llama.get_submodule(name).weight, packed[name])
        layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
        layer.weight.data = values
        tiny_llama.set_submodule(name, layer)
    full = scoring.score(tiny_llama, rule, batches)
    for name, axes in full.scores.items():
        for axis, expected in axes.items():
            torch.testing.assert_close(table.scores[name][axis], expected, rtol=1e-2, atol=1e-6)


def test_weights_outside_of_blocks(tiny_llama, batches):
    """Guards what it can do that the other estimator cannot: embeddings and heads, also where there are no blocks."""
    rule = criterion("zo-taylor:estimator=spsa,passes=4")
    table = scoring.score(tiny_llama, rule, batches, target_modules=["embed_tokens", "lm_head"])
    assert list(table.scores) == ["model.embed_tokens", "lm_head"]
    assert all(bool((axes["row"] > 0).all()) for axes in table.scores.values())


def test_few_probes_are_noise_on_the_demo_model(demo, demo_batches):
    """Guards the warning: against a real gradient a few directions have next to no signal, and say so."""
    guess = scoring.score(demo.model, criterion("zo-taylor:estimator=spsa,passes=8"), demo_batches)
    assert guess.provenance.signal_to_noise < 0.5
