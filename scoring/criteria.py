"""What a criterion is, the registry of criteria, and scoring a loaded model with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import data, models, settings
from ..errors import InputError
from ..models import LoadedModel
from ..records import AXES, AxisTensors, Provenance, ScoreTable


@dataclass(frozen=True)
class Measurement:
    """What a criterion found; the fields are those of :class:`rowscope.records.ScoreTable` and its provenance."""

    scores: AxisTensors
    halves: tuple[AxisTensors, AxisTensors] | tuple[()] = ()
    noise: AxisTensors = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0
    signal_to_noise: float | None = None


class Criterion(Protocol):
    """A rule that makes scores. Implementations are frozen dataclasses: their fields are the settings."""

    name: ClassVar[str]
    needs_data: ClassVar[bool]

    def measure(
        self, model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[data.Batch], seed: int
    ) -> Measurement:
        """Score rows ``(out_features,)`` and columns ``(in_features,)`` of the weights of `modules`."""
        ...


CRITERIA: dict[str, type] = {}
C = TypeVar("C", bound=type)


def register(cls: C) -> C:
    """Class decorator: make a criterion known by its ``name``."""
    CRITERIA[cls.name] = cls  # type: ignore[attr-defined]
    return cls


def criterion(text: str) -> Criterion:
    """The criterion that `text` names, e.g. ``zo-taylor:passes=128``. Raises InputError if there is none."""
    return settings.parse("criterion", text, CRITERIA)


def score(
    loaded: LoadedModel,
    rule: Criterion,
    batches: Sequence[data.Batch] = (),
    *,
    data_source: str = "",
    axes: Sequence[str] = AXES,
    seed: int = 0,
) -> ScoreTable:
    """Score the linear weights of a model's blocks. The model is left as it was found.

    Args:
        loaded: the model, in evaluation mode.
        rule: see :func:`criterion`.
        batches: see :func:`rowscope.data.calibration_batches`; not needed by criteria without data.
        data_source: what the batches came from, for the record.
        axes: which of ``row`` and ``column`` to keep.
        seed: of the criterion's own randomness.

    Raises:
        InputError: if the model has no blocks, data is missing, or a loss is NaN or infinite.
    """
    modules = models.linear_modules(loaded.model)
    if not modules:
        raise InputError(f"{loaded.source} has no blocks of nn.Linear layers: there is nothing to score")
    if rule.needs_data and not batches:
        raise InputError(f"criterion {rule.name} needs data: name some with --data")
    found = rule.measure(loaded.model, modules, batches, seed)
    weights = {name: module.weight.detach() for name, module in modules.items()}
    provenance = Provenance(
        criterion=settings.spell(rule.name, rule),
        model_source=loaded.source,
        model_fingerprint=loaded.fingerprint,
        layers=list(models.layers(loaded.model)),
        shapes={name: (module.out_features, module.in_features) for name, module in modules.items()},
        dtypes={name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()},
        data_source=data_source if rule.needs_data else "",
        data_fingerprint=data.fingerprint(list(batches)) if rule.needs_data else "",
        seed=seed,
        forward_passes=found.forward_passes,
        backward_passes=found.backward_passes,
        signal_to_noise=found.signal_to_noise,
    )
    norms = {name: reduce_weight(weight.float().square(), torch.sqrt) for name, weight in weights.items()}
    keep = _keep(list(modules), axes)
    halves = tuple(keep(half) for half in found.halves)
    return ScoreTable(keep(found.scores), keep(norms), provenance, halves, keep(found.noise))  # type: ignore[arg-type]


def _keep(names: Sequence[str], axes: Sequence[str]) -> Callable[[AxisTensors], AxisTensors]:
    """What of a table goes into the record: the axes asked for, modules in the model's order."""
    return lambda table: {
        name: {axis: table[name][axis].float().cpu() for axis in AXES if axis in axes}
        for name in names
        if name in table
    }


def reduce_weight(values: Tensor, finish: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, Tensor]:
    """Sum a weight-shaped tensor ``(out_features, in_features)`` over each row and over each column."""
    return {"row": finish(values.sum(dim=1)), "column": finish(values.sum(dim=0))}


def add_into(totals: AxisTensors, name: str, values: dict[str, Tensor]) -> None:
    """``totals[name][axis] += values[axis]``, starting from nothing."""
    entry = totals.setdefault(name, {})
    for axis, value in values.items():
        entry[axis] = entry[axis] + value if axis in entry else value


def combined(halves: tuple[AxisTensors, AxisTensors], counts: tuple[int, int]) -> tuple[AxisTensors, tuple[Any, ...]]:
    """Mean of two halves' sums over all `counts`, and the halves' own means (none if one half is empty)."""
    first, second = halves
    both = {
        name: {axis: (total + second[name][axis] if second else total) / sum(counts) for axis, total in entry.items()}
        for name, entry in first.items()
    }
    if not second:
        return both, ()
    means = [
        {name: {axis: total / count for axis, total in entry.items()} for name, entry in half.items()}
        for half, count in zip(halves, counts, strict=True)
    ]
    return both, tuple(means)


def checked_loss(loss: Tensor, number: int) -> Tensor:
    """`loss` itself. Raises InputError if it is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise InputError(f"the loss of batch {number} is {loss.item()}: look at its data, or use --dtype float32")
    return loss


@contextmanager
def only_trainable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Within it exactly `weights` require gradients; afterwards flags and gradients are as before."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    wanted = set(weights)
    for parameter in before:
        parameter.requires_grad_(parameter in wanted)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
