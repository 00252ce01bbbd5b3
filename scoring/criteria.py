"""What a criterion is, the registry of criteria, and scoring a model with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import data, models, settings
from ..errors import InputError
from ..experts import separated
from ..ranks import same_on_all_ranks, together
from ..records import AXES, AxisTensors, Provenance, ScoreTable
from .cost import measured
from .losses import Batch, Loss, evaluate, model_loss, model_loss_parts
from .weights import Weight, scored_weights


@dataclass(frozen=True)
class Task:
    """What is to be scored, and on what.

    Attributes:
        model: in evaluation mode.
        weights: module name -> the weight to score.
        batches: calibration batches, on any device.
        seed: of the criterion's own randomness.
        own_loss: the caller's loss; None for the model's own.
    """

    model: nn.Module
    weights: Mapping[str, Weight]
    batches: Sequence[Batch] = ()
    seed: int = 0
    own_loss: Loss | None = None

    def loss(self, number: int) -> Tensor:
        """The mean loss of a batch, 0-D. Raises InputError if it is not finite, or the model rejects the batch."""
        return evaluate(self.own_loss or model_loss, self.model, self.batches[number], number).sum()

    def loss_parts(self, number: int) -> Tensor:
        """The same loss as parts that sum to it, ``(tokens or examples,)``; see :func:`losses.model_loss_parts`."""
        return evaluate(self.own_loss or model_loss_parts, self.model, self.batches[number], number).reshape(-1)


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

    def measure(self, task: Task) -> Measurement:
        """Score rows ``(out_features,)`` and columns ``(in_features,)`` of the task's weights."""
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
    model: nn.Module,
    rule: Criterion,
    batches: Sequence[Batch] = (),
    *,
    loss: Loss | None = None,
    target_modules: Sequence[str] = (),
    axes: Sequence[str] = AXES,
    seed: int = 0,
    model_source: str = "",
    model_fingerprint: str = "",
    data_source: str = "",
) -> ScoreTable:
    """Score rows and columns of a model's weights. The model is left as it was found.

    Experts that are kept together in one parameter are scored one by one, see :mod:`rowscope.experts`.

    Where ``torch.distributed`` is initialised, the ranks share the work, and each returns the whole table: give every
    rank the same model and all the batches.

    Args:
        model: any module whose forward takes a batch's entries by name and returns an output with a ``loss``.
        rule: see :func:`criterion`.
        batches: mappings of tensors, e.g. :func:`rowscope.data.calibration_batches`; not needed by criteria without
            data.
        loss: a loss of your own, see :data:`rowscope.scoring.losses.Loss`; by default the model's.
        target_modules: see :func:`rowscope.scoring.weights.scored_weights`.
        axes: which of ``row`` and ``column`` to keep.
        seed: of the criterion's own randomness.
        model_source: what the model is called, for the record.
        model_fingerprint: of its checkpoint, for the record.
        data_source: what the batches came from, for the record.

    Raises:
        InputError: if there is nothing to score, data is missing, the model rejects a batch, or a loss is NaN or
            infinite; on every rank, if one has met it.
    """
    with separated(model):
        weights = scored_weights(model, target_modules)
        if rule.needs_data and not batches:
            raise InputError(f"criterion {rule.name} needs data: name some with --data")
        data_fingerprint = data.fingerprint(list(batches)) if rule.needs_data else ""
        same_on_all_ranks(data_fingerprint)
        with evaluating(model), measured(model) as cost, together():
            found = rule.measure(Task(model, weights, batches, seed, loss))
    provenance = Provenance(
        criterion=settings.spell(rule.name, rule),
        model_source=model_source,
        model_fingerprint=model_fingerprint,
        layers=list(models.layers(model)),
        shapes={name: (weight.out_features, weight.in_features) for name, weight in weights.items()},
        sizes={name: w.numel for name, w in weights.items() if w.numel != w.out_features * w.in_features},
        dtypes={name: str(weight.parameter.dtype).removeprefix("torch.") for name, weight in weights.items()},
        data_source=data_source if rule.needs_data else "",
        data_fingerprint=data_fingerprint,
        seed=seed,
        forward_passes=found.forward_passes,
        backward_passes=found.backward_passes,
        signal_to_noise=found.signal_to_noise,
        seconds=cost.seconds,
        peak_memory=cost.peak_memory,
    )
    norms = {name: weight.reduce(weight.values().square(), torch.sqrt) for name, weight in weights.items()}
    keep = _keep(weights, axes)
    halves = tuple(keep(half) for half in found.halves)
    noise = keep(found.noise) if found.noise else {}
    return ScoreTable(keep(found.scores), keep(norms), provenance, halves, noise)  # type: ignore[arg-type]


def _keep(weights: Mapping[str, Weight], axes: Sequence[str]) -> Callable[[AxisTensors], AxisTensors]:
    """What of a table goes into the record: the axes asked for, modules in the model's order.

    A module without an entry, an expert that no token came to, say, has zeros.
    """

    def entry(table: AxisTensors, weight: Weight, axis: str) -> Tensor:
        if weight.name in table:
            return table[weight.name][axis].float().cpu()
        return torch.zeros(weight.out_features if axis == "row" else weight.in_features)

    return lambda table: {
        name: {axis: entry(table, weight, axis) for axis in AXES if axis in axes} for name, weight in weights.items()
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
