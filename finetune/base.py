"""Whether an adapter is put onto the model that its rows and columns were selected on."""

from __future__ import annotations

import warnings

from torch import nn

from .. import models


class OtherBaseWarning(UserWarning):
    """An adapter is used on other weights than those it was made for; ``warnings`` can turn it into an error."""


def warn_of_other_base(trained_on: str | None, model: nn.Module) -> None:
    """Warn if the checkpoint that `model` came from has another fingerprint than `trained_on`.

    Nothing is said where one of them is not known: of a model that was built in memory, or is no longer on disk.
    """
    source = getattr(getattr(model, "config", None), "name_or_path", None)
    found = models.local_fingerprint(source) if trained_on and source else None
    if found is not None and found != trained_on:
        warnings.warn(
            f"the adapter was selected on other weights than those of {source} (fingerprint {str(trained_on)[:12]}, "
            f"not {found[:12]}): use its own base model",
            OtherBaseWarning,
            stacklevel=2,
        )
