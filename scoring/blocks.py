"""A model as a stack of blocks: running it with other blocks, and what a block hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .. import models
from ..errors import InputError

Forward = Callable[..., Any]


@contextmanager
def overridden(modules: Iterable[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Within it each module's forward is ``wrap(module, forward)``, also of a module that is in several places."""
    changed: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module in dict.fromkeys(modules):
            changed.append((module, module.__dict__.get("forward")))  # accelerate's hooks, if any, live there
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module, own in changed:
            if own is None:
                del module.forward  # the class's own is seen again
            else:
                module.forward = own


def blocks_of(model: nn.Module, criterion: str) -> dict[str, nn.Module]:
    """The model's blocks by name. Raises InputError, in the name of `criterion`, if it has none."""
    blocks = models.layers(model)
    if not blocks:
        raise InputError(f"{criterion} needs a model of blocks, this one has none: use --criterion taylor")
    return blocks


def outside(names: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """Which of the modules are in no block."""
    prefixes = tuple(f"{block}." for block in blocks)
    return [name for name in names if not f"{name}.".startswith(prefixes)]


def inside(names: Iterable[str], block: str) -> list[str]:
    """Which of the modules are in the block."""
    return [name for name in names if f"{name}.".startswith(f"{block}.")]


def hidden_states(output: Any) -> Tensor:
    """What a block hands on: its output, or the first of its outputs."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise InputError(f"the blocks return a {type(output).__name__}, not hidden states: use --criterion taylor")
    return hidden


def replaced(output: Any, hidden: Tensor | None) -> Any:
    """A block's output with other hidden states, or with none."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
