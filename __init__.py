"""rowscope: see which rows of a network matter, then tune only those.

The public names are imported on first use, so that ``import rowscope`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import VERSION as __version__

if TYPE_CHECKING:
    from .errors import InputError as InputError
    from .finetune import RowsConfig as RowsConfig
    from .finetune import RowsModel as RowsModel
    from .graph import CouplingGroup as CouplingGroup
    from .graph import ModelGraph as ModelGraph
    from .graph import trace as trace
    from .models import load as load_model  # noqa: F401
    from .records import ScoreTable as ScoreTable
    from .records import Selection as Selection
    from .scoring import Budget as Budget
    from .scoring import criterion as criterion
    from .scoring import select as select

_HOMES = {
    "Budget": ("scoring", "Budget"),
    "CouplingGroup": ("graph", "CouplingGroup"),
    "InputError": ("errors", "InputError"),
    "ModelGraph": ("graph", "ModelGraph"),
    "RowsConfig": ("finetune", "RowsConfig"),
    "RowsModel": ("finetune", "RowsModel"),
    "ScoreTable": ("records", "ScoreTable"),
    "Selection": ("records", "Selection"),
    "criterion": ("scoring", "criterion"),
    "load_model": ("models", "load"),
    "select": ("scoring", "select"),
    "trace": ("graph", "trace"),
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rowscope' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
