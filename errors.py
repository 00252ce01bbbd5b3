"""The one exception a user may cause: the command line prints it as one line and exits with status 2."""

import difflib
from collections.abc import Iterable

TOLD = "rowscope_told"
"""Attribute of an error that every process of a group knows of."""


class InputError(Exception):
    """The input is wrong. The message is one line that says what, where, and the mend."""


class ElsewhereError(InputError):
    """Another process has failed, which ends this one too; the message is the other's, which says it to the user."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An :class:`InputError` for a name that is not registered, suggesting the nearest one that is."""
    choices = sorted(known)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of: {', '.join(choices)}"
    return InputError(f"unknown {kind} {name!r}: {hint}")
