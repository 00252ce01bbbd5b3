"""Dividing a budget: between layers by their scores, between families by what each is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..errors import InputError
from .budget import Share


def allocate(
    even: Sequence[Fraction | int],
    scores: Sequence[float],
    capacities: Sequence[Fraction | int],
    floor: float = 0.25,
    cap: float = 4.0,
) -> list[Fraction]:
    """Divide ``sum(even)`` weights between layers in proportion to their scores.

    Layer l gets ``t * scores[l]``, but no less than ``floor * even[l]``, and no more than ``cap * even[l]`` or than it
    has; one t for all makes the sum right (water-filling). Where all scored layers are full, those of score 0 share
    the rest. If the caps leave less room than the budget, it is not used up.

    Args:
        even: what each layer would get without scores.
        scores: of each layer, finite and non-negative.
        capacities: weights that each layer has.
        floor: from 0 to 1.
        cap: from 1 up.

    Raises:
        InputError: if no layer has a score above 0.
    """
    if not any(score > 0 for score in scores):
        raise InputError("all layer scores are 0: score the layers again")
    high = [min(Fraction(cap) * own, Fraction(most)) for own, most in zip(even, capacities, strict=True)]
    low = [min(Fraction(floor) * own, most) for own, most in zip(even, high, strict=True)]
    total = min(Fraction(sum(even)), sum(high, Fraction(0)))
    level = _filled(total, [Fraction(score) for score in scores], low, high)
    rest = [Fraction(0 if score else own) for score, own in zip(scores, even, strict=True)]
    return _filled(total, rest, level, high)


def _filled(
    total: Fraction, rates: Sequence[Fraction], low: Sequence[Fraction], high: Sequence[Fraction]
) -> list[Fraction]:
    """``clip(t * rates, low, high)`` with the t at which it sums to `total`, or the largest t that matters."""
    if sum(low) >= total:
        return list(low)

    def at(time: Fraction) -> list[Fraction]:
        return [max(least, min(most, time * rate)) for rate, least, most in zip(rates, low, high, strict=True)]

    before = Fraction(0)
    for time in sorted({end / rate for rate, *ends in zip(rates, low, high, strict=True) if rate for end in ends}):
        short, over = sum(at(before)), sum(at(time))
        if over >= total > short:
            return at(before + (time - before) * (total - short) / (over - short))
        before = time
    return at(before)


def spread(allowances: Sequence[Fraction], shares: Sequence[Share]) -> list[int]:
    """How many units each family trains: what its own allowance buys, rounded down.

    The remainder goes in turn to the families that were rounded down most (of equals to those of costlier units),
    until nothing more fits: never more than the sum of the allowances, and short of it by less than the cheapest unit
    that is left.
    """
    counts = [min(int(own // share.cost), share.units) for own, share in zip(allowances, shares, strict=True)]
    left = sum(allowances) - sum(count * share.cost for count, share in zip(counts, shares, strict=True))
    fractions = [own / share.cost % 1 for own, share in zip(allowances, shares, strict=True)]
    turns = sorted(range(len(shares)), key=lambda number: (-fractions[number], -shares[number].cost))
    while fitting := [n for n in turns if counts[n] < shares[n].units and shares[n].cost <= left]:
        for number in fitting:
            if shares[number].cost <= left:
                counts[number] += 1
                left -= shares[number].cost
    return counts
