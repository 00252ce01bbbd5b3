"""Zero-order Taylor importance: exact gradients are not to be had, forward passes are."""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError, unknown_name
from .criteria import Measurement, Task, register
from .responses import measure_responses
from .spsa import measure_spsa

ESTIMATORS = {"response": measure_responses, "spsa": measure_spsa}


@register
@dataclass(frozen=True)
class ZerothOrderTaylor:
    """An estimate of ``Σ_j |w_ij · g_ij|`` from forward passes alone, under ``torch.inference_mode()``.

    Attributes:
        estimator: ``response``, see :func:`rowscope.scoring.responses.measure_responses`; or ``spsa``, the published
            one, see :func:`rowscope.scoring.spsa.measure_spsa`.
        passes: forward passes of a batch in all.
        epsilon: size of the perturbation: relative to the hidden states, or with ``spsa`` in units of the weights.
    """

    estimator: str = "response"
    passes: int = 512
    epsilon: float = 1e-3

    name: ClassVar[str] = "zo-taylor"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise unknown_name("estimator of zo-taylor", self.estimator, ESTIMATORS)
        if self.passes < 4 or self.passes % 2:
            raise InputError(f"criterion zo-taylor: passes={self.passes} must be even and at least 4")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"criterion zo-taylor: epsilon={self.epsilon} must be greater than 0")

    def measure(self, task: Task) -> Measurement:
        """At most `passes` forward passes; two halves of the probes make the two halves."""
        return ESTIMATORS[self.estimator](task, self.passes, self.epsilon)
