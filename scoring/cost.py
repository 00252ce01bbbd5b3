"""What a scoring costs: wall time, and the peak of its memory above the state before it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass
class Cost:
    """Filled in when the measured block ends.

    Attributes:
        seconds: wall time.
        peak_memory: bytes above the state before; None where that is not known, see :func:`measured`.
    """

    seconds: float = 0.0
    peak_memory: int | None = None


@contextmanager
def measured(model: nn.Module) -> Iterator[Cost]:
    """Measure what happens within it to the memory of the model's device.

    On CUDA that is what torch's allocator gave out, summed over the model's devices (their peak statistics are reset).
    Elsewhere it is the process's resident set, as no allocator keeps count there: it includes what libraries load and
    what the C library keeps after it was freed, so a second scoring in one process shows less than the first. The
    system knows the highest mark only of the whole process: where an earlier moment had been higher, all that is
    known is that the scoring stayed below it, and the peak is None.
    """
    cost = Cost()
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    allocated = sum(torch.cuda.memory_allocated(device) for device in devices)
    (resident, mark), started = _resident_set(), time.perf_counter()
    yield cost
    for device in devices:
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - started
    if devices:
        cost.peak_memory = sum(torch.cuda.max_memory_allocated(device) for device in devices) - allocated
    else:
        highest = _resident_set()[1]
        cost.peak_memory = highest - resident if highest > mark else None


def _resident_set() -> tuple[int, int]:
    """The process's resident set and its highest mark so far, in bytes; twice the mark where only that is known."""
    status = Path("/proc/self/status")
    if status.is_file():
        sizes = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        if "VmRSS" in sizes and "VmHWM" in sizes:
            # VmHWM is getrusage's ru_maxrss, without what the parent process had before it started this one
            return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows: nothing is known
        return 0, 0
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return mark, mark
