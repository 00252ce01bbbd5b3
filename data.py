"""Datasets: from files, folders, the hub or the demo to splits, and from splits to tokenised batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .settings import CalibrationSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
FORMATS: dict[str, str] = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
IGNORED_LABEL = -100
DEFAULT_CALIBRATION = CalibrationSettings()

Batch = dict[str, "Tensor"]
"""``input_ids``, ``attention_mask`` and ``labels``, each int64 ``(batch, tokens)``; padding has mask 0, label -100."""


@dataclass(frozen=True)
class Splits:
    """A dataset's splits by name, each with the columns ``prompt`` and ``completion``, or ``text``."""

    source: str
    splits: dict[str, Dataset]

    def __getitem__(self, name: str) -> Dataset:
        if name not in self.splits:
            have = ", ".join(self.splits)
            raise InputError(f"{self.source} has no split {name!r}: it has {have}; add one, or choose with --split")
        return self.splits[name]

    def held_out(self) -> Dataset | None:
        """The validation split if there is one."""
        return self.splits.get("validation")


def load(source: str) -> Splits:
    """Read a dataset: ``demo`` (questions), ``demo-text`` (prose), a file, a folder of one file a split, or a hub id.

    Raises:
        InputError: if it cannot be read, is empty, or has neither ``prompt`` and ``completion`` nor ``text``.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log is raised, and said, below
    path = _demo_folder(source) or Path(source).expanduser()
    if path.is_file():
        splits = {"train": _read_file(path)}
    elif path.is_dir():
        splits = {name: _read_file(file) for name in SPLITS for file in _split_files(path, name)}
        if "train" not in splits:
            raise InputError(f"{path} holds no train.jsonl (or .json, .csv, .parquet, .txt): name a file or add one")
    else:
        splits = _read_hub(source)
    return Splits(source, {name: _checked_columns(f"{source} ({name})", rows) for name, rows in splits.items()})


def _demo_folder(source: str) -> Path | None:
    from .demo import TASK_FOLDER, TEXT_FOLDER

    return {"demo": TASK_FOLDER, "demo-text": TEXT_FOLDER}.get(source)


def _split_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}{suffix}" for suffix in FORMATS if (folder / f"{name}{suffix}").is_file()][:1]


def _read_file(path: Path) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    if path.suffix not in FORMATS:
        raise InputError(f"{path}: unknown kind of file: use one of {', '.join(FORMATS)}")
    if path.suffix == ".jsonl":
        _check_json_lines(path)
    try:
        import tempfile

        with tempfile.TemporaryDirectory() as cache:
            reader = getattr(Dataset, f"from_{FORMATS[path.suffix]}")
            rows = reader(str(path), cache_dir=cache, keep_in_memory=True)
    except (DatasetGenerationError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise InputError(f"{path} cannot be read ({reason}): mend the file") from None
    return rows


def _check_json_lines(path: Path) -> None:
    """Find the first broken line ourselves: the reader's own message names no line."""
    import json

    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError("another kind of value")
            except ValueError as error:  # broken JSON and broken UTF-8 too
                raise InputError(f"{path} line {number} is not a JSON object ({error}): mend or remove it") from None
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: write at least one line")


def _read_hub(source: str) -> dict[str, Dataset]:
    if source.startswith((".", "/", "~")) or Path(source).suffix in FORMATS:
        raise InputError(f"dataset {source} does not exist: name a file, a folder, a hub id or 'demo'")
    from datasets import load_dataset

    try:
        return {name: rows for name, rows in load_dataset(source).items() if name in SPLITS}
    except Exception as error:  # the hub's client raises many unrelated types
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"no dataset {source!r} here or on the hub ({reason}): name a file or 'demo'") from None


def _checked_columns(where: str, rows: Dataset) -> Dataset:
    columns = set(rows.column_names)
    wanted = ["prompt", "completion"] if {"prompt", "completion"} <= columns else ["text"]
    if not set(wanted) <= columns:
        found = ", ".join(sorted(columns)) or "no columns"
        raise InputError(f"{where} has {found}: rowscope reads 'prompt' and 'completion', or 'text'")
    if len(rows) == 0:
        raise InputError(f"{where} is empty: write at least one example")
    for column in wanted:
        if rows.features[column].dtype not in ("string", "large_string"):
            raise InputError(f"{where}: column {column!r} holds {rows.features[column].dtype}: it must hold text")
        if any(value is None for value in rows[column]):
            raise InputError(f"{where}: column {column!r} has missing values: fill or remove those examples")
    return rows.select_columns(wanted)


def tokenise(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels of one example, as TRL's SFTTrainer makes them: end token added, prompts not trained on.

    Returns:
        ``input_ids`` and ``labels``, at most `max_length` long; labels of the prompt are -100.
    """
    prompt = example.get("prompt", "")
    text = prompt + (example["completion"] if "completion" in example else example["text"])
    token_ids = list(tokenizer(text=text)["input_ids"])
    if tokenizer.eos_token_id is not None and token_ids[-1:] != [tokenizer.eos_token_id]:
        token_ids.append(tokenizer.eos_token_id)
    masked = len(tokenizer(text=prompt)["input_ids"]) if "completion" in example else 0
    labels = [IGNORED_LABEL] * masked + token_ids[masked:]
    return {"input_ids": token_ids[:max_length], "labels": labels[:max_length]}


def collate(examples: list[dict[str, list[int]]], pad_token_id: int) -> Batch:
    """Pad tokenised examples on the right to their longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([row["input_ids"] for row in examples], pad_token_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in examples], 0),
        "labels": padded([row["labels"] for row in examples], IGNORED_LABEL),
    }


def calibration_batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: CalibrationSettings = DEFAULT_CALIBRATION,
    seed: int = 0,
) -> list[Batch]:
    """The batches that criteria see: a seeded sample of `rows`, the same for every criterion at one seed.

    Fewer batches if there are fewer examples.

    Raises:
        InputError: if an example batch has no token to learn from (every label masked).
    """
    size = settings.score_batch_size
    sample = rows.shuffle(seed=seed, keep_in_memory=True).select(range(min(len(rows), settings.score_batches * size)))
    tokenised = [tokenise(example, tokenizer, settings.score_tokens) for example in sample]
    result = [
        collate(tokenised[start : start + size], tokenizer.pad_token_id) for start in range(0, len(tokenised), size)
    ]
    for number, batch in enumerate(result):
        if not bool((batch["labels"][:, 1:] != IGNORED_LABEL).any()):
            within = settings.score_tokens
            raise InputError(
                f"batch {number} has no token to learn from within {within}: raise --score-tokens, or fill empty ones"
            )
    return result


def fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """SHA-256 of everything in the batches."""
    import torch

    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {batch[name].dtype} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
