"""How much may be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from ..errors import InputError, unknown_name

EXAMPLES = {"rank": "64", "ratio": "0.02", "params": "80M", "lora": "16", "memory": "24GiB"}
SUFFIXES = {
    "params": {"K": 10**3, "M": 10**6, "B": 10**9},
    "memory": {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
LARGEST = 10**18
BYTES_PER_WEIGHT = 16

MemoryOf = Callable[[int], int]
"""Trainable weights -> bytes; never falling."""


def trained_state(weights: int) -> int:
    """Bytes of what training adds for so many weights: a float32 delta, its gradient, and AdamW's two moments."""
    return BYTES_PER_WEIGHT * weights


@dataclass(frozen=True)
class Share:
    """What the budget sees of one family of alike units: the rows of a module, the channels or heads of a group.

    Attributes:
        name: for messages.
        units: how many there are.
        cost: weights of one unit.
        lora_cost: weights of a LoRA of rank 1 on the same modules; of a module in several families their parts of it.
    """

    name: str
    units: int
    cost: int
    lora_cost: Fraction | int


@dataclass(frozen=True)
class Budget:
    """``rank``, ``ratio``: so many units, or such a share of them, of every family. ``params``, ``lora``, ``memory``:
    a limit on all weights together.

    Attributes:
        kind: ``rank`` (units), ``ratio`` (of the units), ``params`` (weights), ``lora`` (rank of a LoRA on the same
            modules) or ``memory`` (bytes).
        value: a whole number from 1 up; of ``ratio`` a number above 0, up to 1.
    """

    kind: str
    value: int | float

    def __post_init__(self) -> None:
        if self.kind not in EXAMPLES:
            raise unknown_name("budget", self.kind, EXAMPLES)
        if not self.value > 0:  # nan is neither
            least = "a share above 0" if self.kind == "ratio" else "at least 1"
            raise InputError(f"budget {self.kind}={self.value} trains nothing: use {least}")
        if self.kind == "ratio":
            if self.value > 1:
                raise InputError(f"budget {self} is more than the whole model: use at most ratio=1")
        elif self.value != self.value // 1 or self.value > LARGEST:
            raise InputError(f"budget {self.kind}={self.value}: use a whole number up to {LARGEST:.0e}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``rank=64``, ``ratio=0.02``, ``params=80M``, ``lora=16`` or ``memory=24GiB``.

        Raises:
            InputError: if it is none of them.
        """
        kind, _, value = text.partition("=")
        if kind not in EXAMPLES:
            raise unknown_name("budget", kind, EXAMPLES)
        number, scale = value.strip(), 1
        for suffix, multiple in SUFFIXES.get(kind, {}).items():
            if number.lower().endswith(suffix.lower()):
                number, scale = number[: -len(suffix)], multiple
        try:
            exact = Decimal(number) * scale
        except ArithmeticError:
            exact = Decimal("nan")
        if kind == "ratio" and exact.is_finite():
            return cls(kind, float(exact))
        if not exact.is_finite() or exact.adjusted() > 18 or exact != int(exact):
            what = "a number" if kind == "ratio" else "a whole number"
            raise InputError(f"budget {text!r}: write {what}, e.g. {kind}={EXAMPLES[kind]}")
        return cls(kind, int(exact))

    def __str__(self) -> str:
        for suffix, multiple in reversed(SUFFIXES.get(self.kind, {}).items()):
            if self.value % multiple == 0:
                return f"{self.kind}={self.value // multiple}{suffix}"
        return f"{self.kind}={self.value}"

    def allowances(self, shares: Sequence[Share], memory_of: MemoryOf = trained_state) -> list[Fraction]:
        """Weights that each family may train, before layers or families compete for them.

        ``rank``: k units, or all if there are fewer; ``ratio``: the nearest number of units, at least one; ``lora``:
        what the family's own LoRA would cost; ``params`` and ``memory``: the same part of every family.

        Args:
            shares: the families, at least one.
            memory_of: for ``memory``: bytes that training so many weights takes.

        Raises:
            InputError: if that is more than there is.
        """
        if self.kind == "rank":
            largest = max(share.units for share in shares)
            if self.value > largest:
                raise InputError(
                    f"budget {self}: no module has more than {largest} rows, columns or channels to train"
                )
            return [Fraction(min(int(self.value), share.units) * share.cost) for share in shares]
        if self.kind == "ratio":
            return [Fraction(max(1, int(self.value * share.units + 0.5)) * share.cost) for share in shares]
        whole = sum(share.units * share.cost for share in shares)
        if self.kind == "lora":
            allowances = [Fraction(int(self.value) * share.lora_cost) for share in shares]
        else:
            total = _affordable(int(self.value), memory_of, whole) if self.kind == "memory" else int(self.value)
            allowances = [Fraction(total * share.units * share.cost, whole) for share in shares]
        if sum(allowances) > whole:
            raise InputError(
                f"budget {self} is more than all {whole:,} weights that may be trained: use a smaller one"
            )
        return allowances


def _affordable(limit: int, memory_of: MemoryOf, whole: int) -> int:
    """The most weights whose training takes no more than `limit` bytes; `whole` + 1 if all of them take less."""
    least, most = 0, whole + 1
    while least < most:
        middle = (least + most + 1) // 2
        if memory_of(middle) <= limit:
            least = middle
        else:
            most = middle - 1
    return least
