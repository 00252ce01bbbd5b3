"""Train a selection of rows and columns.

Importing this package teaches PEFT the method ``ROWS``: do so before loading an adapter with PEFT's own functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import RowsConfig, RowsType
from .layer import RowsLayer
from .model import RowsModel

if TYPE_CHECKING:
    from .adapters import load_adapter as load_adapter
    from .adapters import merge_adapters as merge_adapters
    from .base import OtherBaseWarning as OtherBaseWarning
    from .checkpoints import newest_valid_checkpoint as newest_valid_checkpoint
    from .export import save_as_lora as save_as_lora
    from .recompute import keep_activations as keep_activations
    from .recompute import recompute_activations as recompute_activations
    from .training import TrainingResult as TrainingResult
    from .training import TrainingSettings as TrainingSettings
    from .training import train as train

# PEFT's registration function refuses names outside its closed enumeration; what it would write are these entries.
PEFT_TYPE_TO_CONFIG_MAPPING[RowsType.ROWS] = RowsConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[RowsType.ROWS] = RowsModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[RowsType.ROWS] = RowsModel.prefix  # type: ignore[index]

# Imported on first use: loading an adapter does not need the training libraries, which take seconds to import.
_HOMES = {
    "OtherBaseWarning": "base",
    "TrainingResult": "training",
    "TrainingSettings": "training",
    "keep_activations": "recompute",
    "load_adapter": "adapters",
    "merge_adapters": "adapters",
    "newest_valid_checkpoint": "checkpoints",
    "recompute_activations": "recompute",
    "save_as_lora": "export",
    "train": "training",
}

__all__ = ["RowsConfig", "RowsLayer", "RowsModel", "RowsType", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
