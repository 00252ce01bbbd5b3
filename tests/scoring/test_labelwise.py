"""Class by class: mean gradients of classes that are spread over batches, and every aggregator."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rowscope import InputError, criterion, scoring
from rowscope.models import linear_modules

CLASSES = 7


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_labels=CLASSES + 1,  # the last one never occurs
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def batches():
    """Unsorted, unequally many examples of a class, of two lengths."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for labels, length in (([0, 1, 2, 0], 9), ([0, 0, 3, 4], 9), ([5, 6, 0], 6)):
        tokens = torch.randint(3, 97, (len(labels), length), generator=generator)
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor(labels)})
    return made


def per_class(model, batches) -> dict[str, np.ndarray]:
    """Module name -> Σ_j |w_ij ḡ^c_ij|, ``(classes, rows)``: every example differentiated on its own."""
    modules = linear_modules(model)
    weights = [module.weight for module in modules.values()]
    gradients = {label: [] for label in range(CLASSES)}
    for batch in batches:
        for index, label in enumerate(batch["labels"].tolist()):
            one = {name: value[index : index + 1] for name, value in batch.items()}
            gradients[label].append(torch.autograd.grad(model(**one).loss, weights))
    return {
        name: np.stack(
            [
                (weights[n].detach() * torch.stack([g[n] for g in found]).mean(0)).abs().sum(1).numpy()
                for found in gradients.values()
            ]
        )
        for n, name in enumerate(modules)
    }


def largest_five(scores):
    return np.sort(scores, axis=0)[-5:].mean(0)


def quantiles(scores, first):
    return np.mean([np.quantile(scores, step / 10, axis=0) for step in range(first, 11)], axis=0)


AGGREGATORS = {
    "max": lambda scores: scores.max(0),
    "mean": lambda scores: scores.mean(0),
    "top5": largest_five,
    "top5-mean": lambda scores: (largest_five(scores) + scores.mean(0)) / 2,
    "upper-quantiles": lambda scores: quantiles(scores, 5),
    "quantiles": lambda scores: quantiles(scores, 0),
}


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_formula(model, batches, aggregator):
    """Guards mean gradients per class over batches, no class leaking into the next, and the aggregators by numpy."""
    table = scoring.score(model, criterion(f"labelwise-taylor:aggregator={aggregator}"), batches)
    for name, scores in per_class(model, batches).items():
        expected = torch.tensor(AGGREGATORS[aggregator](scores), dtype=torch.float32)
        torch.testing.assert_close(table.scores[name]["row"], expected, rtol=1e-4, atol=1e-8)
    # class 0 has four examples of one length (a chunk) and one of another; the other six classes have one each
    assert (table.provenance.forward_passes, table.provenance.backward_passes) == (8, 8)
    assert not table.halves


def test_few_classes(model, batches):
    """Guards 'the five largest' where there are fewer, and examples whose label is ignored."""
    batches = batches[:1]
    batches[0]["labels"][2] = -100
    top, mean = (
        scoring.score(model, criterion(f"labelwise-taylor:aggregator={name}"), batches) for name in ("top5", "mean")
    )
    name = next(iter(top.scores))
    torch.testing.assert_close(top.scores[name]["row"], mean.scores[name]["row"])
    assert top.provenance.forward_passes == 2


def test_leaves_the_model_alone(model, batches):
    """Guards gradients and hooks."""
    scoring.score(model, criterion("labelwise-taylor"), batches)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_refusals(model, tiny_llama, batches):
    """Guards the one-line answers to data without classes and to unknown aggregators."""
    tokens = torch.randint(3, 97, (2, 5))
    with pytest.raises(InputError, match="one class label per example"):
        scoring.score(tiny_llama, criterion("labelwise-taylor"), [{"input_ids": tokens, "labels": tokens}])
    batches[1]["labels"] = batches[1]["labels"].float()
    with pytest.raises(InputError, match="look at the labels of batch 1"):
        scoring.score(model, criterion("labelwise-taylor"), batches)
    with pytest.raises(InputError, match="did you mean 'quantiles'"):
        criterion("labelwise-taylor:aggregator=quantile")
