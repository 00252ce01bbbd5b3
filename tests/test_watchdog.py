"""The time limit around work that may never end."""

import threading
import time

import pytest

from rowscope import InputError
from rowscope.watchdog import within


def test_results_and_errors_pass():
    """Guards transparency: what the work returns or raises is what the caller sees."""
    assert within(10, "work", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(10, "work", lambda: 1 // 0)


def test_endless_work_is_ended():
    """Guards the limit: one line, and no thread is left behind that would abort the program when it ends."""
    started = threading.Event()

    def endless():
        started.set()
        while True:
            time.sleep(0.01)

    with pytest.raises(InputError, match="counting did not end within"):
        within(0.2, "counting", endless)
    assert started.is_set()
    assert "counting" not in {thread.name for thread in threading.enumerate() if thread.is_alive()}
