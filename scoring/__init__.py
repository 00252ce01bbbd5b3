"""Importance of rows and columns, and the selection of some under a budget."""

from . import magnitude, random_control, taylor, zo_taylor  # importing a criterion registers it
from .budget import Budget
from .criteria import CRITERIA, Criterion, Measurement, criterion, register, score
from .groups import channel_scores
from .selection import select

__all__ = [
    "CRITERIA",
    "Budget",
    "Criterion",
    "Measurement",
    "channel_scores",
    "criterion",
    "magnitude",
    "random_control",
    "register",
    "score",
    "select",
    "taylor",
    "zo_taylor",
]
