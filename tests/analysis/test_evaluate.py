"""Evaluation against a plain computation, one example at a time without padding."""

import math

import pytest
import torch
from datasets import Dataset

from rowscope import InputError, data
from rowscope.analysis.evaluate import answer, evaluate, generate


@pytest.fixture(scope="module")
def rows():
    return data.load("demo")["test"].select(range(20))


def test_perplexity_weighs_tokens_alike(demo, rows):
    """Guards the value and its standard error: padding, prompts and batches leave no trace in them."""
    losses, counts = [], []
    for row in rows:
        prompt = demo.tokenizer(row["prompt"])["input_ids"]
        ids = demo.tokenizer(row["prompt"] + row["completion"])["input_ids"] + [demo.tokenizer.eos_token_id]
        with torch.no_grad():
            log_probabilities = demo.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(-sum(float(log_probabilities[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        counts.append(len(ids) - len(prompt))
    mean = sum(losses) / sum(counts)
    found = evaluate("perplexity", demo.model, demo.tokenizer, rows)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-4)
    spread = math.sqrt(sum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True)))
    assert found.standard_error == pytest.approx(math.exp(mean) * spread / sum(counts), rel=1e-3)
    assert found.samples == 20


def test_exact_match_counts_answers(demo, rows):
    """Guards the count: the model's own greedy answers all match, other answers do not, order does not matter."""
    prompts = [row["prompt"] for row in rows]
    own = [generate(demo.model, demo.tokenizer, [prompt], 12)[0] for prompt in prompts]
    right = Dataset.from_dict({"prompt": prompts, "completion": [f"so\n#### {text}" for text in own]})
    graded = [answer(text) for text in right["completion"]]
    found = evaluate("exact-match", demo.model, demo.tokenizer, right)
    expected = [
        answer(generate(demo.model, demo.tokenizer, [p], 60)[0]) == g for p, g in zip(prompts, graded, strict=True)
    ]
    assert found.value == pytest.approx(sum(expected) / 20)
    half = [text if n % 2 else "no such thing" for n, text in enumerate(own)]
    mixed = Dataset.from_dict({"prompt": prompts, "completion": half})
    assert evaluate("exact-match", demo.model, demo.tokenizer, mixed).value <= 0.5


def test_left_padding_changes_nothing(demo, rows):
    """Guards batched generation: a prompt is completed alike alone and beside longer ones."""
    prompts = ["def f(x):\n", "import os\n\n\nclass Path(object):\n    def join(self, other):\n"]
    together = generate(demo.model, demo.tokenizer, prompts, 8)
    assert together == [generate(demo.model, demo.tokenizer, [prompt], 8)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("completion", "graded"),
    [
        ("3+4=7\n#### 7", "7"),
        ("#### 7\nmore", "7"),
        ("#### 1\n#### 2", "2"),
        ("####", ""),
        (" yes \n", "yes"),
        ("", ""),
    ],
)
def test_what_is_graded(completion, graded):
    """Guards the answer's extraction."""
    assert answer(completion) == graded


def test_mode_is_restored(tiny_llama, demo, rows):
    """Guards evaluation amid training: the model's mode is as before."""
    demo.model.train()
    try:
        evaluate("perplexity", demo.model, demo.tokenizer, rows.select(range(2)))
        assert demo.model.training
    finally:
        demo.model.eval()


def test_bad_tasks(demo, rows):
    """Guards the refusals."""
    with pytest.raises(InputError, match="did you mean 'exact-match'"):
        evaluate("exact-mach", demo.model, demo.tokenizer, rows)
    with pytest.raises(InputError, match="exact-match needs"):
        evaluate("exact-match", demo.model, demo.tokenizer, Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(InputError, match="raise --max-length"):
        evaluate("perplexity", demo.model, demo.tokenizer, rows, max_length=2)
