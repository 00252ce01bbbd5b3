"""Checkpoints of a training run: find one that is whole, and publish one as the run's adapter."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..records import atomic_folder


def checkpoint_step(checkpoint: Path) -> int:
    """The N of ``checkpoint-N``; -1 for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_by_step(folder: Path) -> list[Path]:
    """All ``checkpoint-N`` folders in `folder`, whole or torn, oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if checkpoint_step(path) >= 0), key=checkpoint_step)


def is_valid(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to the end: its files are there and open, and its state parses."""
    # Of a sharded model the optimizer's state has another name.
    optimizer = OPTIMIZER_NAME if (checkpoint / OPTIMIZER_NAME).exists() else OPTIMIZER_NAME_BIN
    saved_by_torch = [checkpoint / optimizer, checkpoint / SCHEDULER_NAME, *checkpoint.glob("rng_state*.pth")]
    try:
        # The Trainer writes its state last.
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if state["global_step"] != checkpoint_step(checkpoint):
            return False
        json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
        with safe_open(checkpoint / SAFETENSORS_WEIGHTS_NAME, framework="pt"):
            pass  # Opening compares the file's length with its header.
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    # A zip archive has its directory at the end: what was cut off is none.
    return len(saved_by_torch) > 2 and all(map(zipfile.is_zipfile, saved_by_torch))


def newest_valid_checkpoint(folder: Path) -> Path | None:
    """The ``checkpoint-N`` of largest N that was written to the end; None if there is none."""
    return next(filter(is_valid, reversed(checkpoints_by_step(folder))), None)


def publish_adapter(checkpoint: Path, adapter: Path, base_model: str | None) -> None:
    """Copy the adapter of `checkpoint` to the folder `adapter`, which appears whole or not at all.

    Args:
        checkpoint: a ``checkpoint-N`` folder.
        adapter: the folder to make; an older one is replaced.
        base_model: what ``adapter_config.json`` names as the base model.
    """
    config = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model
    if isinstance(config.get("target_modules"), list):
        # PEFT writes a set, in another order each time.
        config["target_modules"].sort()
    with atomic_folder(adapter, replace=True) as whole:
        shutil.copyfile(checkpoint / SAFETENSORS_WEIGHTS_NAME, whole / SAFETENSORS_WEIGHTS_NAME)
        (whole / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
