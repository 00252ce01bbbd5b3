"""A time limit around work that may never end."""

from __future__ import annotations

import ctypes
import threading
import time
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
    done = threading.Event()  # an interrupted join would take the thread for ended

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    worker = threading.Thread(target=run, name=what, daemon=True)
    worker.start()
    try:
        in_time = done.wait(seconds)
    finally:
        _stop(worker, done)  # over time, or the user interrupts
    if not in_time:
        raise InputError(f"{what} did not end within {seconds:g} seconds: it is not supported")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _stop(worker: threading.Thread, done: threading.Event) -> None:
    """End a thread: one that lives on when the program ends would abort it.

    What is raised in a thread may be swallowed, by a callback for instance: so it is raised again.
    """
    deadline = time.monotonic() + GRACE
    while not done.is_set() and time.monotonic() < deadline:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_TimeUp))
        done.wait(0.2)
