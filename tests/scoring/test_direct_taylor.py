"""The direct gradient: exact where it must be, near Taylor where it may differ, and refused where it has no sense."""

import pytest
import torch
from scipy.stats import spearmanr
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
)

from rowscope import InputError, criterion, scoring
from rowscope.models import layers, linear_modules


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (3, 2, 9), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in tokens]


def llama(blocks: int, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks, pad_token_id=0, **settings)).eval()


def assert_scores(table, name, products):
    for axis, dim in (("row", 1), ("column", 0)):
        torch.testing.assert_close(table.scores[name][axis], products.mean(0).sum(dim), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(table.halves[1][name][axis], products[1].sum(dim), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_exact_with_one_block(batches, tied):
    """Guards exactness where no block is skipped: equal to plain autograd, for the head too; and its passes."""
    model = llama(1, tie_word_embeddings=tied)
    table = scoring.score(model, criterion("direct-taylor"), batches, target_modules=["up_proj", "q_proj", "lm_head"])
    if tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # the head's part alone
    for name in table.scores:
        weight = model.get_submodule(name).weight
        gradients = [torch.autograd.grad(model(**batch).loss, weight)[0] for batch in batches]
        assert_scores(table, name, torch.stack([(weight * g).abs().detach() for g in gradients]))
    assert list(table.scores)[-1] == "lm_head"
    assert (table.provenance.forward_passes, table.provenance.backward_passes) == (6, 3)


def test_formula_with_three_blocks(batches):
    """Guards d = ∂h_l/∂w · ∂loss/∂h_L: each block alone, differentiated by torch.autograd.grad against the head's."""
    model = llama(3)
    products = {name: [] for name in linear_modules(model)}
    for batch in batches:
        outputs = {}
        blocks = layers(model)
        hooks = [
            block.register_forward_hook(lambda _, __, output, name=name, to=outputs: to.update({name: output}))
            for name, block in blocks.items()
        ]
        loss = model(**batch).loss
        head = torch.autograd.grad(loss, outputs["model.layers.2"], retain_graph=True)[0]
        for name in products:
            block = name[: len("model.layers.0")]
            weight = model.get_submodule(name).weight
            # the graph below h_l is block l's: no weight of it occurs elsewhere
            (gradient,) = torch.autograd.grad(outputs[block], weight, head, retain_graph=True)
            products[name].append((weight * gradient).abs().detach())
        for hook in hooks:
            hook.remove()
    table = scoring.score(model, criterion("direct-taylor"), batches)
    for name, found in products.items():
        assert_scores(table, name, torch.stack(found))


def test_close_to_taylor_on_the_demo_model(demo, demo_batches):
    """Guards what it is for: on a trained model it ranks rows much as the exact gradient does."""
    exact = scoring.score(demo.model, criterion("taylor"), demo_batches)
    direct = scoring.score(demo.model, criterion("direct-taylor"), demo_batches)
    ranks = [spearmanr(exact.scores[name]["row"], direct.scores[name]["row"]).statistic for name in exact.scores]
    assert torch.tensor(ranks).median() > 0.6


def test_leaves_the_model_alone(tiny_llama, batches):
    """Guards flags, hooks, forwards, gradients and the mode of autograd, also after a failure in either pass."""
    tiny_llama.model.norm.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in tiny_llama.parameters()]
    scoring.score(tiny_llama, criterion("direct-taylor"), batches)
    batches[1]["labels"][:] = -100  # the mean over no token is NaN
    with pytest.raises(InputError, match="loss of batch 1 is nan"):
        scoring.score(tiny_llama, criterion("direct-taylor"), batches)
    with pytest.raises(InputError, match=r"no signal for model.embed_tokens"):
        scoring.score(tiny_llama, criterion("direct-taylor"), batches[:1], target_modules=["embed_tokens", "q_proj"])
    assert torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in tiny_llama.parameters()] == flags
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in tiny_llama.parameters())
    for module in tiny_llama.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_one_graph_at_a_time(batches):
    """Guards the memory claim: what autograd keeps at once does not grow with the number of blocks."""

    def kept(blocks: int, rule: str) -> int:
        live, peak = {}, [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor
                live[id(self)] = tensor.numel()
                peak[0] = max(peak[0], sum(live.values()))

            def __del__(self):
                live.pop(id(self), None)

        model = llama(blocks)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            scoring.score(model, criterion(rule), batches[:1])
        return peak[0]

    assert kept(8, "direct-taylor") == kept(2, "direct-taylor") > 0


def test_refusals(batches):
    """Guards the one-line answers where there is no stream to go down."""
    torch.manual_seed(0)
    flat = torch.nn.Linear(4, 3)
    with pytest.raises(InputError, match="needs a model of blocks"):
        scoring.score(
            flat, criterion("direct-taylor"), [{"x": torch.randn(2, 4)}], loss=lambda m, batch: m(batch["x"]).sum()
        )
    swin = SwinForImageClassification(
        SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4)
    )
    pictures = [{"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([0, 1])}]
    with pytest.raises(InputError, match="needs blocks of one shape: use --criterion taylor"):
        scoring.score(swin, criterion("direct-taylor"), pictures)
