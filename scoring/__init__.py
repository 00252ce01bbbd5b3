"""Importance of rows and columns, and the selection of some under a budget."""

from . import (  # importing a criterion registers it
    direct_taylor,
    fisher,
    gradient_norm,
    hessian,
    labelwise,
    magnitude,
    random_control,
    taylor,
    wanda,
    zo_taylor,
)
from .budget import Budget
from .criteria import CRITERIA, Criterion, Measurement, criterion, register, score
from .groups import channel_scores
from .selection import select
from .vectors import weight_matrices

__all__ = [
    "CRITERIA",
    "Budget",
    "Criterion",
    "Measurement",
    "channel_scores",
    "criterion",
    "direct_taylor",
    "fisher",
    "gradient_norm",
    "hessian",
    "labelwise",
    "magnitude",
    "random_control",
    "register",
    "score",
    "select",
    "taylor",
    "wanda",
    "weight_matrices",
    "zo_taylor",
]
