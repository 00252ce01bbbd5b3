"""Taylor importance class by class, for classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..ranks import progress, summed
from ..records import AXES, AxisTensors
from .averages import summed_tables
from .criteria import Measurement, Task, register
from .gradients import streamed
from .losses import Batch, evaluate, model_loss
from .weights import Weight

AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda scores: scores.amax(dim=0),
    "mean": lambda scores: scores.mean(dim=0),
    "top5": lambda scores: _top5(scores),
    "top5-mean": lambda scores: (_top5(scores) + scores.mean(dim=0)) / 2,
    "upper-quantiles": lambda scores: _mean_quantile(scores, 5),
    "quantiles": lambda scores: _mean_quantile(scores, 0),
}
"""How the classes' scores ``(classes, rows)`` become one, ``(rows,)``."""


@register
@dataclass(frozen=True)
class LabelwiseTaylor:
    """``s_i = A_c( Σ_j |w_ij · ḡ^c_ij| )`` with ḡ^c the mean gradient of the examples of class c, A over the classes.

    (The label-wise Taylor importance of SPruFT, arXiv 2502.11439.) A row that one class alone needs does not drown in
    the others, as it does in the gradient of a mixed batch. Classes without an example in the data take no part.

    ḡ^c is exact: one class's gradient is added up, float32, over as many passes as its examples need, then reduced;
    this costs one gradient for every weight, where ``taylor`` streams. There are no halves.

    Attributes:
        aggregator: ``max``; ``mean``; ``top5``, the mean of the five largest classes; ``top5-mean``, the mean of that
            and ``mean``; ``quantiles``, the mean of the quantiles 0, 0.1, …, 1; ``upper-quantiles``, of 0.5, …, 1.
    """

    aggregator: str = "mean"

    name: ClassVar[str] = "labelwise-taylor"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.aggregator not in AGGREGATORS:
            raise unknown_name("aggregator of labelwise-taylor", self.aggregator, AGGREGATORS)

    def measure(self, task: Task) -> Measurement:
        """A forward and a backward pass for each chunk of a class's examples, none larger than the largest batch.

        Ranks share the classes.
        """
        classes, passes = list(examples_by_class(task.batches).values()), torch.zeros(1)
        tables: list[AxisTensors] = [{} for _ in classes]
        gradients: dict[Weight, Tensor] = {}

        def receive(weight: Weight, gradient: Tensor) -> None:
            total = gradients.get(weight)
            gradients[weight] = gradient.float() if total is None else total + gradient

        with streamed(task.model, task.weights, receive):
            for place in progress(range(len(classes)), self.name):
                for number, batch, share in _chunks(task.batches, classes[place]):
                    (evaluate(task.own_loss or model_loss, task.model, batch, number).sum() * share).backward()
                    passes += 1
                for weight in list(gradients):
                    values = weight.reduce((weight.values() * gradients.pop(weight)).abs_())
                    tables[place][weight.name] = values
        scores = self._aggregated(summed_tables(tables, task.weights), task.weights)
        spent = int(summed(passes))
        return Measurement(scores, forward_passes=spent, backward_passes=spent)

    def _aggregated(self, tables: Sequence[AxisTensors], names: Iterable[str]) -> AxisTensors:
        """A layer that a class's examples do not come through counts as zero for that class."""

        def aggregate(found: list[Tensor]) -> Tensor:
            missing = [torch.zeros_like(found[0])] * (len(tables) - len(found))
            return AGGREGATORS[self.aggregator](torch.stack(found + missing))

        by_name = {name: [table[name] for table in tables if name in table] for name in names}
        return {
            name: {axis: aggregate([entry[axis] for entry in entries]) for axis in AXES}
            for name, entries in by_name.items()
            if entries
        }


def examples_by_class(batches: Sequence[Batch]) -> dict[int, list[tuple[int, int]]]:
    """Class -> its examples, each as batch number and index in the batch; those with a negative label are left out.

    Raises:
        InputError: if the labels are not one integer an example, or another entry is not one an example.
    """
    classes: dict[int, list[tuple[int, int]]] = {}
    for number, batch in enumerate(batches):
        labels = batch.get("labels")
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(
                f"labelwise-taylor needs one class label per example: look at the labels of batch {number}"
            )
        if odd := next((name for name, value in batch.items() if value.shape[:1] != labels.shape), None):
            raise InputError(f"labelwise-taylor needs one {odd} per example: look at batch {number}")
        for index, label in enumerate(labels.tolist()):
            if label >= 0:
                classes.setdefault(label, []).append((number, index))
    if not classes:
        raise InputError(
            "labelwise-taylor needs one class label per example: every label is negative, that is, ignored"
        )
    return dict(sorted(classes.items()))


def _chunks(batches: Sequence[Batch], examples: list[tuple[int, int]]) -> Iterator[tuple[int, Batch, float]]:
    """Batches of the given examples, no larger than the largest given one: its first example's batch number, the
    batch, and its share of all the examples. Examples of unequal shapes (token counts) are not put together."""
    size = max(len(batch["labels"]) for batch in batches)
    alike: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for number, index in examples:
        shapes = tuple((name, value.shape[1:], value.dtype) for name, value in batches[number].items())
        alike.setdefault(shapes, []).append((number, index))
    for group in alike.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            names = batches[part[0][0]]
            batch = {name: torch.stack([batches[number][name][index] for number, index in part]) for name in names}
            yield part[0][0], batch, len(part) / len(examples)


def _top5(scores: Tensor) -> Tensor:
    return scores.topk(min(5, len(scores)), dim=0).values.mean(dim=0)


def _mean_quantile(scores: Tensor, first: int) -> Tensor:
    """Mean of the quantiles ``first/10, …, 1``, interpolated linearly."""
    levels = torch.arange(first, 11, dtype=scores.dtype, device=scores.device) / 10
    parts = scores.split(max(1, 2**22 // len(scores)), dim=1)  # torch.quantile takes 16 million numbers at most
    return torch.cat([part.quantile(levels, dim=0).mean(dim=0) for part in parts])
