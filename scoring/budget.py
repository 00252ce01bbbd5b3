"""How much may be trained, and how that is shared out between families of alike units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError, unknown_name

KINDS = ("rank", "lora")


@dataclass(frozen=True)
class Share:
    """What the budget sees of one family of units: the rows of a module, or the channels of a coupled group.

    Attributes:
        name: for messages.
        units: how many there are.
        cost: trainable parameters of one unit.
        lora_cost: trainable parameters of a LoRA of rank 1 on the same modules, ``Σ (in_features + out_features)``.
    """

    name: str
    units: int
    cost: int
    lora_cost: int


@dataclass(frozen=True)
class Budget:
    """``rank=k``: k units of every family. ``lora=r``: in all as many parameters as a LoRA of rank r would have.

    Attributes:
        kind: one of :data:`KINDS`.
        value: k or r, at least 1.
    """

    kind: str
    value: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("budget", self.kind, KINDS)
        if self.value < 1:
            raise InputError(f"budget {self.kind}={self.value} trains nothing: use at least 1")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``rank=64`` or ``lora=16``. Raises InputError if it is neither."""
        kind, _, value = text.partition("=")
        if kind not in KINDS:
            raise unknown_name("budget", kind, KINDS)
        try:
            return cls(kind, int(value))
        except ValueError:
            raise InputError(f"budget {text!r}: write a whole number, e.g. {kind}=16") from None

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"

    def units(self, shares: Sequence[Share]) -> list[int]:
        """How many units of each family are trained.

        ``lora``: each family gets what its own modules' LoRA would cost, rounded down; the remainder goes in turn to
        the families that were rounded down most, until nothing more fits.

        Raises:
            InputError: if the budget buys nothing at all, or a rank is larger than every family.
        """
        if self.kind == "rank":
            largest = max(share.units for share in shares)
            if self.value > largest:
                raise InputError(
                    f"budget {self}: no module has more than {largest} rows, columns or channels to train"
                )
            return [min(self.value, share.units) for share in shares]
        allowances = [self.value * share.lora_cost for share in shares]
        counts = [min(own // share.cost, share.units) for own, share in zip(allowances, shares, strict=True)]
        left = sum(allowances) - sum(count * share.cost for count, share in zip(counts, shares, strict=True))
        fractions = [own / share.cost % 1 for own, share in zip(allowances, shares, strict=True)]
        turns = sorted(range(len(shares)), key=lambda number: -fractions[number])
        while fitting := [n for n in turns if counts[n] < shares[n].units and shares[n].cost <= left]:
            for number in fitting:
                if shares[number].cost <= left:
                    counts[number] += 1
                    left -= shares[number].cost
        if not any(counts):
            raise InputError(f"budget {self} is smaller than one row: use a larger one")
        return counts
