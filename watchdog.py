"""A time limit around work that may never end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import InputError

Result = TypeVar("Result")
GRACE = 10.0  # seconds


class _TimeUp(BaseException):
    """Raised inside work that is over its limit; no handler for errors catches it."""


def within(seconds: float, what: str, work: Callable[[], Result]) -> Result:
    """``work()`` in a thread of its own, stopped after `seconds`.

    Raises:
        InputError: if the work is not done by then.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    worker = threading.Thread(target=run, name=what, daemon=True)
    worker.start()
    try:
        worker.join(seconds)
    finally:
        if worker.is_alive():  # over time, or the user interrupts
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_TimeUp))
            worker.join(GRACE)  # a thread that lives on when the program ends would abort it
    if worker.is_alive() or isinstance(outcome.get("error"), _TimeUp):
        raise InputError(f"{what} did not end within {seconds:g} seconds: it is not supported")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
