"""Load saved adapters, of any PEFT method, onto their base model, or merge them into it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import InputError
from .base import OtherBaseWarning
from .quiet import quiet_libraries


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in `folder` onto `model`, frozen and in evaluation mode; `model` is changed in place.

    An adapter of rows and columns that was selected on other weights gives an
    :class:`~rowscope.finetune.base.OtherBaseWarning`.

    Raises:
        InputError: if the folder holds no adapter, or one that is damaged or of another model.
    """
    # PEFT would look for a name it does not find on the hub.
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder} holds no {CONFIG_NAME}: name the folder of a saved adapter")
    try:
        with quiet_libraries():
            # PEFT goes on with what it has; an adapter with parts missing is another model.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except OtherBaseWarning as error:  # where the caller has made it an error
        raise InputError(str(error)) from None
    except (
        AttributeError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        TypeError,
        UserWarning,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} is damaged or no adapter of this model ({reason}): use its own model") from error


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """Merge the adapters in `folders` into `model`, one after the other; a plain model comes back.

    Those that train different rows and columns are each merged exactly; where they overlap, deltas add up. An
    embedding that is tied to the head, of which only one was trained, is untied.

    Raises:
        InputError: as :func:`load_adapter`, and if a merged weight would not be finite.
    """
    for folder in folders:
        try:
            adapted = load_adapter(model, folder)
            with quiet_libraries():
                model = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise InputError(f"{folder} cannot be merged: {' '.join(str(error).split())}") from error
    return model
