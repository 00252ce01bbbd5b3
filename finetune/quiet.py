"""Keep the libraries below from talking over the command line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets

LIBRARIES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the logs and warnings of the training libraries, and their progress bars where no one watches."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    hide_bars = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if hide_bars:
            datasets.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            datasets.enable_progress_bars()
