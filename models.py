"""Loading models: a hub id, a local folder, or ``demo``; and what every room needs to know of a loaded one."""

from __future__ import annotations

import hashlib
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .records import atomic_folder
from .watchdog import within

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "auto")
EDGE_BYTES = 4096
BUILD_LIMIT = 120.0
"""Seconds for building a model without weights; a 405B needs a few."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and its identity.

    Attributes:
        model: in evaluation mode, on the device asked for.
        tokenizer: with a padding token.
        source: what the user named: hub id, folder or ``demo``.
        fingerprint: see :func:`fingerprint`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str


def resolve(source: str) -> Path:
    """The local folder of a model: the embedded one for ``demo``, the folder itself, or the hub's snapshot.

    Raises:
        InputError: if there is no such model, or the folder holds no ``config.json`` or no safetensors.
    """
    if source == "demo":
        from .demo import MODEL_FOLDER

        return MODEL_FOLDER
    if not source:
        raise InputError("the model's name is empty: name a folder, a hub id or 'demo'")
    folder = Path(source).expanduser()
    if folder.exists():
        return _checked_folder(folder)
    return _checked_folder(_from_hub(source))


def local_fingerprint(source: str) -> str | None:
    """The :func:`fingerprint` of a model that is on this machine, in a folder or in the hub's cache; else None."""
    from huggingface_hub import snapshot_download

    try:
        folder = resolve(source) if source == "demo" or Path(source).expanduser().exists() else None
        return fingerprint(folder or Path(snapshot_download(source, local_files_only=True)))
    except Exception:  # no such name, nothing in the cache, no checkpoint: each by a type of the hub's own
        return None


def _from_hub(source: str, file: str | None = None) -> Path:
    """A model's files from the hub, or one of them."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries; what is wrong is said in one line
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"model folder {source} does not exist: name a folder, a hub id or 'demo'")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(hf_hub_download(source, file) if file else snapshot_download(source, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{source!r} is no model name: name a folder, a hub id or 'demo'") from None
    except Exception as error:  # the hub's client raises many unrelated types: offline, gated, unknown, no connection
        reason = _reason(error, 120)
        raise InputError(f"no model {source!r} here or on the hub ({reason}): name a folder or 'demo'") from None


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: name a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no .safetensors weights: convert the checkpoint to safetensors first")
    return folder


def fingerprint(folder: Path) -> str:
    """SHA-256 over the name, shape, dtype, first and last 4 KiB of every tensor of a safetensors checkpoint."""
    digest = hashlib.sha256()
    tensors = sorted(entry for path in folder.glob("*.safetensors") for entry in _tensor_edges(path))
    for name, description, edges in tensors:
        digest.update(f"{name} {description}".encode())
        digest.update(edges)
    return digest.hexdigest()


def _tensor_edges(path: Path) -> list[tuple[str, str, bytes]]:
    """Name, ``dtype shape`` and edge bytes of each tensor, read from the file without mapping the whole of it."""
    import json

    entries = []
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                start, stop = (8 + length + offset for offset in tensor["data_offsets"])
                file.seek(start)
                first = file.read(min(EDGE_BYTES, stop - start))
                file.seek(max(start, stop - EDGE_BYTES))
                last = file.read(min(EDGE_BYTES, stop - start))
                if not len(first) == len(last) == min(EDGE_BYTES, stop - start):
                    raise EOFError
                entries.append((name, f"{tensor['dtype']} {tensor['shape']}", first + last))
    except (struct.error, ValueError, KeyError, TypeError, MemoryError, EOFError):
        raise InputError(f"{path} is truncated or no safetensors file: fetch or save it again") from None
    return entries


def load(source: str, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a causal language model and its tokenizer, checked for NaN.

    Args:
        source: hub id, local folder or ``demo``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's own.
        device: as torch names it, e.g. ``cpu`` or ``cuda``.

    Raises:
        InputError: for anything wrong with the name, the folder, its files, or the device.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    checked_device(device)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = resolve(source)
    identity = fingerprint(folder)
    _check_causal(source, folder)
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, StrictDataclassError) as error:
        raise InputError(f"{source} does not load as a causal language model ({_reason(error)})") from None
    model, loading = pair
    model.config.name_or_path = source
    if loading["missing_keys"]:
        raise InputError(f"{source} lacks the tensor {min(loading['missing_keys'])}: fetch or save it again")
    check_finite(model, source)
    check_tokenizer(model, tokenizer, source)
    return LoadedModel(model.eval().to(device), tokenizer, source, identity)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that plain transformers loads; the folder, new or empty, appears whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _check_causal(source: str, folder: Path) -> None:
    """Refuse an encoder or a classifier, which transformers would load as a causal model all the same."""
    import json

    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (ValueError, AttributeError):
        return  # loading says what is wrong with it
    name = str(named[0]) if isinstance(named, list) and named else ""
    if name and name not in CAUSAL.values() and not name.endswith("ForConditionalGeneration"):
        raise InputError(f"{source} is a {name}, no causal language model: name one, or score it in Python")


def empty(source: str) -> PreTrainedModel:
    """The model of a configuration on the meta device: all its structure, none of its weights.

    Args:
        source: a hub id, a local folder, a ``config.json``, or ``demo``. No weights are read or fetched.

    Raises:
        InputError: if there is no such configuration, its architecture is not one of transformers' own, or no model
            can be built from it.
    """
    import transformers
    from transformers import AutoConfig

    transformers.logging.set_verbosity_error()
    path = _config_file(source)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as many types as there are ways to get a configuration wrong
        raise InputError(f"{source} is no configuration of a known architecture ({_reason(error)})") from None
    named = getattr(config, "architectures", None) or [None]
    name = named[0] if isinstance(named, list) else named
    architecture = getattr(transformers, str(name), None) if name else None
    if name and not _is_model_class(architecture):
        raise InputError(f"{source} is a {name}, which transformers does not have: code of its own is not run")
    try:
        model = within(BUILD_LIMIT, f"building the model of {source}", lambda: _built(config, architecture))
    except InputError:
        raise
    except Exception as error:  # whatever a model makes of a configuration that does not fit it
        raise InputError(f"no model can be built from the configuration of {source} ({_reason(error)})") from None
    model.config.name_or_path = source
    return model.eval()


def _is_model_class(architecture: Any) -> bool:
    from transformers import PreTrainedModel

    is_class = isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
    return is_class and architecture is not PreTrainedModel


def _built(config: Any, architecture: Any) -> PreTrainedModel:
    import torch
    from transformers import AutoModel

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors without elements; the trace says what is wrong
        return architecture(config) if architecture else AutoModel.from_config(config, trust_remote_code=False)


def _config_file(source: str) -> Path:
    if not source:
        raise InputError("the model's name is empty: name a folder, a config.json, a hub id or 'demo'")
    path = Path(source).expanduser()
    if source == "demo":
        path = resolve(source)
    elif not path.exists():
        return _from_hub(source, "config.json")
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file() or path.suffix != ".json":
        raise InputError(f"{path} is no config.json: name a folder that save_pretrained wrote, or its config.json")
    return path


def _reason(error: Exception, length: int = 200) -> str:
    return " ".join(str(error).split())[:length]


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Give the tokenizer a padding token if it has none. Raises InputError if it cannot serve the model."""
    if tokenizer.eos_token is None:
        raise InputError(f"{source}: its tokenizer has no end token: set eos_token in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(f"{source}: its tokenizer has {len(tokenizer)} tokens, the model only {rows}: use its own")


def checked_device(device: str) -> str:
    """`device` itself if torch can use it. Raises InputError if not."""
    import torch

    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"device {device!r} is not available here: use --device cpu") from None
    return device


def check_finite(model: nn.Module, source: str) -> None:
    """Raise an InputError that names the first parameter with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{source}: tensor {name} holds NaN or infinity: fetch or save the checkpoint again")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder/encoder blocks by name, in order: the longest ModuleList whose members are of one class.

    An empty mapping if the model has none.
    """
    from torch import nn

    from .experts import SeparateExperts

    best: dict[str, nn.Module] = {}
    outer = None
    for name, module in model.named_modules():
        is_inside = outer is not None and name.startswith(f"{outer}.")
        if is_inside or not isinstance(module, nn.ModuleList | SeparateExperts):
            continue
        outer = name  # a list inside a list, or among experts, is no list of blocks
        if (
            isinstance(module, nn.ModuleList)
            and len({type(child) for child in module}) == 1
            and len(module) > len(best)
        ):
            best = {f"{name}.{index}": child for index, child in enumerate(module)}
    return best


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """All ``nn.Linear`` of the decoder/encoder blocks by name: what is scored and tuned unless told otherwise.

    Experts kept in one parameter are among them, as layers ``….gate_up_proj.<expert>`` that share its memory.
    """
    from torch import nn

    from .experts import is_fused, linears

    found: dict[str, nn.Linear] = {}
    for prefix, layer in layers(model).items():
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                found[f"{prefix}.{name}"] = module
            elif is_fused(module):
                found |= {f"{prefix}.{name}.{key}": expert for key, expert in linears(module).items()}
    return found
