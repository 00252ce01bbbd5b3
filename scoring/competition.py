"""Which units win where all compete for one budget: the knapsack problem."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

CORE = 1000
GAP = 1e-6
NODES = 2000

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def best(values: Floats, costs: Integers, budget: int) -> NDArray[np.bool_]:
    """The units of largest total value whose costs sum to no more than `budget`.

    Greedy by value per cost, which is exact where all costs are equal, and elsewhere loses less than the value of one
    unit. Where costs differ (whole heads among channels) the core, up to 1000 units about the point where the budget
    runs out, is then decided by a mixed integer program, and the better solution is kept; with no more units than that
    it is exact (to a millionth of the value).

    Args:
        values: non-negative, ``(units,)``.
        costs: positive, ``(units,)``.
        budget: in the unit of the costs.

    Returns:
        Which are chosen. No unit that is left out still fits.
    """
    order = np.argsort(-values / costs, kind="stable")
    greedy = fill(order, costs, budget)
    fitting = int(np.searchsorted(np.cumsum(costs[order]), budget, side="right"))
    start = max(0, min(fitting - CORE // 2, len(order) - CORE))
    sure, core = order[:start], order[start : start + CORE]
    if not values[core].any() or costs[core].min() == costs[core].max():
        return greedy
    exact = np.zeros(len(costs), dtype=bool)
    exact[sure] = True
    exact[core] = _programmed(values[core], costs[core], budget - int(costs[sure].sum()))
    exact |= fill(order[~exact[order]], costs, budget - int(costs[exact].sum()))
    return exact if values[exact].sum() > values[greedy].sum() else greedy


def fill(order: NDArray[np.intp], costs: Integers, budget: int) -> NDArray[np.bool_]:
    """Take units in this order, each that still fits."""
    taken = np.zeros(len(costs), dtype=bool)
    order = order[costs[order] <= budget]
    while len(order):
        spent = np.cumsum(costs[order])
        fitting = int(np.searchsorted(spent, budget, side="right"))
        taken[order[:fitting]] = True
        budget -= int(spent[fitting - 1])
        order = order[fitting:]
        order = order[costs[order] <= budget]
    return taken


def _programmed(values: Floats, costs: Integers, budget: int) -> NDArray[np.bool_]:
    """The same as a mixed integer program; nothing if the solver finds nothing in time."""
    step = int(np.gcd.reduce(costs))
    result = milp(
        -values / values.max(),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint((costs // step)[None].astype(float), ub=budget // step),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    taken = np.zeros(len(costs), dtype=bool) if result.x is None else result.x > 0.5
    return taken & (int(costs[taken].sum()) <= budget)  # the solver's tolerance is no licence to overspend
