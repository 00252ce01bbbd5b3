"""Load a saved adapter, of any PEFT method, onto its base model."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import InputError
from .quiet import quiet_libraries


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in `folder` onto `model`, frozen and in evaluation mode; `model` is changed in place.

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
