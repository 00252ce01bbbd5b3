"""From estimated variances of rows to their sizes, shrunk by how much of the estimates is noise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .variances import reliability

Triple = tuple[Tensor, Tensor, Tensor]
"""Values of a weight's rows from all probes, from the even and from the odd ones, each ``(out_features,)``."""
MOST_RELIABLE = 0.9999
"""Two halves tell no more."""
SMALLEST = 0.03
"""A row's size is at least this share of its module's mean."""


def shrunk_sizes(variances: Mapping[str, Triple]) -> tuple[dict[str, Triple], float]:
    """Root mean squares d of the rows, each module's drawn towards its mean by the share of noise in them.

    ``d_i = d̄ (1 + r (√v_i / mean √v − 1))`` with r the reliability of ``√v``, the best linear prediction if its noise
    does not depend on it. Modules at the same place of alike blocks share their r.

    Returns:
        the sizes by module; and the norm of the signal in them over the norm of the noise.
    """
    spreads = {name: tuple(_spread(part) for part in triple) for name, triple in variances.items()}
    places: dict[str, list[str]] = {}
    for name in spreads:
        places.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    sizes: dict[str, Triple] = {}
    for names in places.values():
        share = _reliability([spreads[name] for name in names])
        for name in names:
            mean = variances[name][0].mean().sqrt()
            first, second, third = (mean * (1 + share * part).clamp(min=SMALLEST) for part in spreads[name])
            sizes[name] = (first, second, third)
    share = min(_reliability(list(spreads.values())), MOST_RELIABLE)
    return sizes, math.sqrt(share / (1 - share))


def _spread(variances: Tensor) -> Tensor:
    """``√v`` relative to its mean, minus 1; zeros where all are zero."""
    sizes = variances.sqrt()
    return sizes / sizes.mean() - 1 if bool(sizes.any()) else torch.zeros_like(sizes)


def _reliability(spreads: list[tuple[Tensor, ...]]) -> float:
    return reliability(*(torch.cat([parts[half] for parts in spreads]) for half in (1, 2)))
