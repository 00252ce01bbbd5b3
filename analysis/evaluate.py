"""Evaluation: perplexity of held-out text, and exact match of generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import data
from ..errors import InputError, unknown_name

LanguageModel = PreTrainedModel | PeftModel
ANSWER_MARK = "####"
MOST_NATS = 700  # e to more is no float


@dataclass(frozen=True)
class Evaluation:
    """One task's result.

    Attributes:
        value: perplexity (of the completions where there are prompts), or the fraction of exact matches.
        standard_error: of `value`.
        samples: examples evaluated.
    """

    value: float
    standard_error: float
    samples: int


UNITS = {"perplexity": "perplexity", "exact-match": "fraction"}


def evaluate(
    task: str, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, *, max_length: int = 512
) -> Evaluation:
    """Run the task called ``perplexity`` or ``exact-match`` on a causal language model in evaluation mode.

    Args:
        rows: with columns ``prompt`` and ``completion``, or (perplexity only) ``text``.
        max_length: tokens of an example; longer ones are cut.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return TASKS[task](model, tokenizer, rows, max_length)
    finally:
        model.train(training)


def perplexity(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int) -> Evaluation:
    """``exp`` of the mean negative log-likelihood per predicted token, all tokens weighing the same.

    The standard error is by the delta method from the examples' summed losses, a ratio estimator's.
    """
    losses, counts = [], []
    examples = [data.tokenise(example, tokenizer, max_length) for example in rows]
    for start in tqdm(range(0, len(examples), 16), desc="perplexity", disable=None, delay=2):
        batch = data.collate(examples[start : start + 16], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        token_losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        losses.append(token_losses.sum(dim=1).double().cpu())
        counts.append((labels != data.IGNORED_LABEL).sum(dim=1).double().cpu())
    loss, count = torch.cat(losses), torch.cat(counts)
    if count.sum() == 0:
        raise InputError(f"no example has a token to predict within {max_length}: raise --max-length")
    mean = float(loss.sum() / count.sum())
    spread = float((loss - mean * count).square().sum().sqrt() / count.sum())
    if mean > MOST_NATS:
        raise InputError(f"the mean loss is {mean:.0f} nats per token: no perplexity of that can be written")
    value = math.exp(mean)
    return Evaluation(value, value * spread, len(rows))


def exact_match(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, _: int) -> Evaluation:
    """The fraction of greedily generated completions whose :func:`answer` equals the reference's."""
    if "prompt" not in rows.column_names:
        raise InputError("exact-match needs 'prompt' and 'completion': use --tasks perplexity for plain text")
    examples = sorted(rows, key=lambda example: len(example["prompt"]))
    hits = 0
    for start in tqdm(range(0, len(examples), 50), desc="exact-match", disable=None, delay=2):
        part = examples[start : start + 50]
        completions = generate(model, tokenizer, [example["prompt"] for example in part], _new_tokens(tokenizer, part))
        hits += sum(
            answer(completion) == answer(example["completion"])
            for completion, example in zip(completions, part, strict=True)
        )
    share = hits / len(rows)
    return Evaluation(share, math.sqrt(share * (1 - share) / len(rows)), len(rows))


def _new_tokens(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, str]]) -> int:
    """Room for the longest reference and a half more: a model that has not stopped by then is wrong anyway."""
    longest = max(len(tokenizer(text=example["completion"])["input_ids"]) for example in examples)
    return longest + longest // 2 + 1


def generate(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy completions of `prompts`, without the prompts."""
    token_ids = tokenizer(text=prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    generated = model.generate(  # type: ignore[operator]
        input_ids=token_ids["input_ids"],
        attention_mask=token_ids["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new = generated[:, token_ids["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def answer(completion: str) -> str:
    """What is graded: the text after the last ``####`` on its line, or the whole completion where there is none."""
    if ANSWER_MARK not in completion:
        return completion.strip()
    return completion.rsplit(ANSWER_MARK, 1)[1].strip().partition("\n")[0].strip()


Task = Callable[[LanguageModel, PreTrainedTokenizerBase, Dataset, int], Evaluation]
TASKS: dict[str, Task] = {"perplexity": perplexity, "exact-match": exact_match}
