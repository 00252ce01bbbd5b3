"""Torch-Pruning's Hessian score, under its own name."""

from dataclasses import dataclass
from typing import ClassVar

from .criteria import Measurement, Task, register
from .fisher import Fisher


@register
@dataclass(frozen=True)
class Hessian:
    """``s_i = Σ_j w_ij² · h_ij`` with ``h = 1/N Σ_n g_n²`` over the N examples, g_n the gradient of example n's loss.

    (Torch-Pruning's ``GroupHessianImportance``, local score.) That is ``fisher`` as it is by default, and computed by
    it. Torch-Pruning's own accumulator keeps the last example's squares only (its importance.py, 1.6.1: the test for a
    known parameter looks names up among parameters); this is the formula that it documents.
    """

    name: ClassVar[str] = "hessian"
    needs_data: ClassVar[bool] = True

    def measure(self, task: Task) -> Measurement:
        """A forward and a backward pass for each example; even and odd ones make the two halves."""
        return Fisher().measure(task)
