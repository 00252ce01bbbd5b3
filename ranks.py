"""Sharing the work between processes: torch.distributed where it is initialised, else one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor
from tqdm import tqdm

from .errors import TOLD, ElsewhereError, InputError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def mine(work: Sequence[T]) -> Sequence[T]:
    """This rank's share of `work`: every ``world``-th piece, from its rank on."""
    rank, size = world()
    return work[rank::size]


def progress(work: Sequence[T], description: str) -> Iterator[T]:
    """This rank's share of `work`, one after the other; the first rank shows a progress bar."""
    return iter(tqdm(mine(work), desc=description, disable=None if world()[0] == 0 else True, delay=2))


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place, on every rank."""
    if world()[1] > 1:
        _agree(None)
        reached = tensor.cuda() if distributed.get_backend() == "nccl" else tensor  # which knows no other memory
        distributed.all_reduce(reached)
        tensor.copy_(reached)
    return tensor


# ---------------------------------------------------------------------------------------------- failing together


@contextmanager
def together() -> Iterator[None]:
    """Within it a failure of one rank ends all: the others learn of it at their next sum, or at the end.

    No rank waits for one that will not come: before every sum, and at the end, each says whether it has failed. Where
    several meet the same wrong input, the first of them raises it, the others :class:`ElsewhereError`.
    """
    try:
        yield
    except ElsewhereError:
        raise
    except Exception as error:
        if not hasattr(error, TOLD):
            _agree(error)
        raise
    _agree(None)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first rank, which alone calls it, on every rank; its failure is everyone's."""
    with together():
        value = make() if world()[0] == 0 else None
    return gathered(value)[0]  # type: ignore[return-value]


def _agree(failure: Exception | None) -> None:
    """Tell the others of this rank's `failure`, or raise :class:`ElsewhereError` for one of theirs."""
    reports = gathered(None if failure is None else _told(failure))
    first = next((rank for rank, report in enumerate(reports) if report is not None), None)
    if failure is not None:
        setattr(failure, TOLD, True)
    if first is None or first == world()[0]:
        return
    if failure is None or (isinstance(failure, InputError) and reports[first] == str(failure)):
        raise ElsewhereError(reports[first]) from failure


def _told(failure: Exception) -> str:
    if isinstance(failure, InputError):
        return str(failure)
    return f"rank {world()[0]} has failed ({type(failure).__name__}: {failure}): its own output says where"


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value)
    return values


def same_on_all_ranks(fingerprint: str) -> None:
    """Raise an InputError on every rank if their batches, told by their `fingerprint`, differ."""
    _agree(None)
    if len(set(gathered(fingerprint))) > 1:
        raise InputError("the ranks have different batches: give all of them to every rank, the ranks divide them")


# ---------------------------------------------------------------------------------------------- starting and ending


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` has started, if so; leave them at the end.

    Args:
        device: as torch names it. ``cuda`` is, of several processes on one machine, each one's own GPU.

    Returns:
        This process's device.

    Raises:
        InputError: if there are more processes than GPUs, they do not find each other, or not each loads the weights.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdigit() or int(size) < 2 or world()[1] > 1:
        yield device
        return
    if os.environ.get("ACCELERATE_USE_FSDP") == os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "") == "true":
        raise InputError(
            "accelerate has the first process alone load the weights: add --fsdp_cpu_ram_efficient_loading false"
        )
    backend = "gloo"
    if device.startswith("cuda"):
        device, backend = _own_gpu(device), "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"WORLD_SIZE={size}, but no other process is found ({reason}): start with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _own_gpu(device: str) -> str:
    if device != "cuda":
        raise InputError(f"--device {device} is one GPU for all processes: use --device cuda, each takes its own")
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(f"{gpus} GPUs are too few for process {number + 1} of this machine: start one a GPU")
    torch.cuda.set_device(number)
    return f"cuda:{number}"
