"""Empirical Fisher information of rows and columns, from squared gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import InputError, unknown_name
from ..ranks import progress
from .averages import HalfMeans
from .criteria import Measurement, Task, register
from .gradients import streamed
from .losses import Batch, evaluate, model_loss
from .weights import Weight


@register
@dataclass(frozen=True)
class Fisher:
    """``s_i = Σ_j w_ij² · E[g_ij²]``, or, not `weighted`, ``s_i = Σ_j E[g_ij²]``.

    E[g²] is the diagonal of the empirical Fisher information, which stands for that of the Hessian: half of
    ``w² · h`` is what the loss rises, to second order, when the weight is removed at a minimum. (LeCun et al. 1990,
    "Optimal Brain Damage"; with the Fisher information in its place: Theis et al. 2018, "Faster gaze prediction with
    dense networks and Fisher pruning".)

    Attributes:
        per: what E is a mean over. ``sample``: the single examples, each with its own mean loss; this is the Fisher
            information (of sequences, for language models). ``batch``: the calibration batches with their mean losses;
            fewer passes, but the noise between examples, which is what the Fisher information measures, averages out
            within a batch.
        weighted: with ``w²``; without it, rows count by how the loss depends on them and not by their size.
    """

    per: str = "sample"
    weighted: bool = True

    name: ClassVar[str] = "fisher"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.per not in ("sample", "batch"):
            raise unknown_name("per of fisher", self.per, ["sample", "batch"])

    def measure(self, task: Task) -> Measurement:
        """A forward and a backward pass for each example (or batch); even and odd ones make the two halves."""
        means, number = HalfMeans(), 0

        def receive(weight: Weight, gradient: Tensor) -> None:
            squares = gradient.float().square()
            means.add(
                number, weight.name, weight.reduce(weight.values().square() * squares if self.weighted else squares)
            )

        parts = list(enumerate(task.batches)) if self.per == "batch" else list(examples(task.batches))
        if not parts:
            raise InputError("no example has a label, there is no loss to differentiate: look at the data's labels")
        with streamed(task.model, task.weights, receive):
            for number in progress(range(len(parts)), self.name):
                origin, part = parts[number]
                evaluate(task.own_loss or model_loss, task.model, part, origin).sum().backward()
        means.reduce_over_ranks(task.weights)
        scores, halves = means.means(len(parts))
        return Measurement(scores, halves, forward_passes=len(parts), backward_passes=len(parts))


def examples(batches: Sequence[Batch]) -> Iterator[tuple[int, Batch]]:
    """Each batch's number and one of its examples, as a batch of one; those with nothing but ignored labels are left
    out. Entries that do not have the batch's length go with every example as they are."""
    for number, batch in enumerate(batches):
        size = batch_size(batch)
        for index in range(size):
            one = {name: x[index : index + 1] if x.ndim and len(x) == size else x for name, x in batch.items()}
            if "labels" not in one or bool((one["labels"] != -100).any()):
                yield number, one


def batch_size(batch: Batch) -> int:
    """Examples in a batch: the length of its labels, or else of its first entry that has one."""
    entries = ([batch["labels"]] if "labels" in batch else []) + list(batch.values())
    return next((len(x) for x in entries if x.ndim), 1)
