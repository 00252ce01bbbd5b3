"""Where the loss is sensitive to the last hidden states, from forward passes of the head alone, against autograd."""

import pytest
import torch
from scipy.stats import spearmanr
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    SwinConfig,
    SwinForImageClassification,
)

from rowscope import criterion, scoring
from rowscope.models import layers
from rowscope.scoring.blocks import hidden_states, replaced
from rowscope.scoring.criteria import Task
from rowscope.scoring.head import AT_ONCE, Head, owned, sensitivity
from rowscope.scoring.variances import random_signs
from rowscope.scoring.weights import scored_weights


def text(classes=0, mask=True):
    """One batch of token ids, the second example padded at its end, the first without labels at its start."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (3, 9), generator=generator)
    real = torch.ones_like(tokens)
    real[1, 6:] = 0
    labels = tokens.masked_fill(real == 0, -100)
    labels[0, :4] = -100
    labels = torch.randint(classes, (3,), generator=generator) if classes else labels
    batch = {"input_ids": tokens, "attention_mask": real, "labels": labels}
    return batch if mask else {name: value for name, value in batch.items() if name != "attention_mask"}


def pictures(size):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(3, 3, size, size), "labels": torch.tensor([0, 1, 2])}


def found(model, batch, feature_probes=512, seed=0):
    """The head's sensitivity, None where there is no such head."""
    task = Task(model.eval(), scored_weights(model), [batch])
    with torch.inference_mode():
        head = Head.of(task, 0, list(layers(model).values()))
        return head and sensitivity(head, feature_probes, torch.Generator().manual_seed(seed))


def squared_gradients(model, batch) -> torch.Tensor:
    """Squares of the gradients of all the loss's parts at the last block's output, summed, by torch.autograd."""
    ends = []

    def cut(_, __, output):
        ends.append(hidden_states(output).detach().requires_grad_())
        return replaced(output, ends[-1])

    task = Task(model.eval(), scored_weights(model), [batch])
    handle = list(layers(model).values())[-1].register_forward_hook(cut)
    parts = task.loss_parts(0)
    handle.remove()
    gradients = [torch.autograd.grad(part, ends[-1], retain_graph=True)[0] for part in parts]
    return torch.stack(gradients).square().sum(0)


def test_owners_are_found():
    """Guards `owned`: a part's energy goes to the position it follows, that of a part of many to all real ones."""
    generator = torch.Generator().manual_seed(0)
    signs = random_signs((32, 50), generator)
    real = torch.ones(50)
    real[40:] = 0
    everything = signs @ torch.randn(50, 1, generator=generator) / 7
    changes = torch.cat([signs[:, [7, 3, 3]] * torch.tensor([2.0, 1.0, -0.5]), everything], dim=1)
    positions = owned(signs, changes, changes.square().mean(dim=0), real)
    spread = float(everything.square().mean()) / 40
    assert positions[7] == pytest.approx(4 + spread)
    assert positions[3] == pytest.approx(1.25 + spread)
    assert torch.allclose(positions[[0, 1, 20, 39]], torch.tensor(spread))
    assert not positions[40:].any()


def test_owners_are_found_in_pieces():
    """Guards large batches, whose parts are not looked at all together: their energies still add up."""
    generator = torch.Generator().manual_seed(0)
    positions, parts = 8192, 3000
    assert positions * parts > AT_ONCE
    signs, real = random_signs((32, positions), generator), torch.ones(positions)
    sizes = torch.rand(parts, generator=generator)
    changes = signs[:, :parts] * sizes
    found = owned(signs, changes, changes.square().mean(dim=0), real)
    torch.testing.assert_close(found[:parts], sizes.square())
    assert not found[parts:].any()


@pytest.mark.parametrize("mask", [True, False])
def test_positions_are_those_whose_next_token_is_labelled(tiny_llama, mask):
    """Guards where a language model's loss is sensitive: where it predicts a label, and nowhere else."""
    batch = text(mask=mask)
    sensitive = found(tiny_llama, batch)
    labelled = torch.zeros(3, 9, dtype=torch.bool)
    labelled[:, :-1] = batch["labels"][:, 1:] != -100
    assert torch.equal(sensitive.positions > 0, labelled)
    assert sensitive.positions[labelled].mean() == pytest.approx(1)
    assert sensitive.features.mean() == pytest.approx(1)


def test_positions_have_the_gradients_size(tiny_llama):
    """Guards the positions' weights: over many directions they are the squared gradients."""
    batch = text()
    exact = squared_gradients(tiny_llama, batch).sum(-1)
    many = torch.stack([found(tiny_llama, batch, 0, seed).positions for seed in range(60)]).mean(0)
    labelled = exact > 0
    assert spearmanr(many[labelled], exact[labelled]).statistic > 0.6
    assert (many / many.sum() - exact / exact.sum()).abs().sum() < 0.3


def test_features_against_autograd(tiny_llama):
    """Guards the features' weights: with many probes they rank as squared gradients do, with none they are alike."""
    batch = text()
    exact = squared_gradients(tiny_llama, batch).sum((0, 1))
    sensitive = found(tiny_llama, batch)
    assert spearmanr(sensitive.features, exact).statistic > 0.8
    assert torch.equal(found(tiny_llama, batch, feature_probes=0).features, torch.ones(48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_precision(tiny_llama, dtype):
    """Guards the size of the movements: hidden states of a coarse dtype are moved by more than it rounds off."""
    batch = text()
    exact = squared_gradients(tiny_llama, batch).sum((0, 1))
    sensitive = found(tiny_llama.to(dtype), batch)
    assert spearmanr(sensitive.features, exact).statistic > 0.5
    assert int((sensitive.positions > 0.01).sum()) >= 14


def test_gpt2_has_a_part_for_every_token():
    """Guards models that leave their kind of loss to transformers' default: still one part a token."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=3)).eval()
    batch = text()
    assert Task(model, scored_weights(model), [batch]).loss_parts(0).shape == ((batch["labels"][:, 1:] != -100).sum(),)
    assert torch.equal(found(model, batch).positions[0, :3], torch.zeros(3))


def test_class_token():
    """Guards classifiers that look at one token only: it has all the sensitivity."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=3, num_labels=4, pad_token_id=0))
    batch = text(classes=4)
    sensitive = found(model, batch)
    assert bool((sensitive.positions[:, 0] > 0).all())
    assert not sensitive.positions[:, 1:].any()
    exact = squared_gradients(model, batch).sum((0, 1))
    assert spearmanr(sensitive.features, exact).statistic > 0.5


def test_pooled_classifier():
    """Guards classifiers that pool: no position owns the loss, so that it is spread over all alike."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = BeitConfig(**sizes, num_attention_heads=3, num_labels=3, out_indices=[1], use_mean_pooling=True)
    sensitive = found(BeitForImageClassification(config), pictures(16))
    torch.testing.assert_close(sensitive.positions, torch.ones(3, 17))
    assert sensitive.features.std() > 0.1


def test_pooling_leaves_padding_out(tiny_llama):
    """Guards padding: what is spread over positions, here by a loss that is one number, is not spread over it."""
    batch = text()

    def one_number(model, batch):
        return model(**batch, use_cache=False).loss

    task = Task(tiny_llama, scored_weights(tiny_llama), [batch], own_loss=one_number)
    with torch.inference_mode():
        head = Head.of(task, 0, list(layers(tiny_llama).values()))
        sensitive = sensitivity(head, 64, torch.Generator().manual_seed(0))
    assert torch.equal(sensitive.positions > 0, batch["attention_mask"] != 0)


def test_other_shapes():
    """Guards models whose blocks differ in shape: there is no such head, and the criterion works all the same."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4, num_labels=3
    )
    model, batch = SwinForImageClassification(config).eval(), pictures(64)
    assert found(model, batch) is None
    table = scoring.score(model, criterion("zo-taylor:passes=64"), [batch])
    assert all(values.isfinite().all() for axes in table.scores.values() for values in axes.values())
    assert all(bool((axes["row"] > 0).all()) for axes in table.scores.values())


def test_the_model_is_left_alone(tiny_llama):
    """Guards blocks and weights: after the head has run alone, the model gives what it gave before."""
    batch = text()
    before = tiny_llama(**batch).loss
    found(tiny_llama, batch)
    assert torch.equal(tiny_llama(**batch).loss, before)
    assert not any("forward" in module.__dict__ for module in tiny_llama.modules())
