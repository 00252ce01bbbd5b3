"""A weightless copy of a model to trace, and example inputs for it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

TOKENS = 4
SAMPLES = 4000

Inputs = dict[str, Any] | tuple[Any, ...]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device: same modules, shapes and ties, no weight memory, everything trainable.

    Quantised linear layers become plain ones of their shape; hooks of the user, and those that move weights between
    devices, are left out. The model itself is not touched.

    Raises:
        InputError: if something that hangs on the model cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    memo: dict[int, Any] = {}
    module: Any  # attributes of all kinds hang on modules
    for module in model.modules():
        kept = [value for value in vars(module).values() if isinstance(value, Tensor)]  # activations, old weight norms
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False), *kept]:
            memo.setdefault(id(tensor), _weightless(tensor))
        if "_hf_hook" in vars(module):  # holds offloaded weights
            memo[id(module._hf_hook)] = module._hf_hook
        if _is_packed(module):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            memo[id(module)] = plain
    try:
        bones = copy.deepcopy(model, memo)
    except Exception as error:  # whatever does not want to be copied
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{type(model).__name__} cannot be copied for a trace ({reason}): remove that attribute"
        ) from None
    for module in bones.modules():
        _without_hooks(module)
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = "eager"
            module.config._experts_implementation_internal = "batched_mm"
    return bones.train(False)


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=_is_float(tensor)) if isinstance(tensor, nn.Parameter) else empty


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_packed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight quantised."""
    weight = module._parameters.get("weight")  # never computed anew, as a parametrisation would
    if not isinstance(module, nn.Linear) or type(module) is nn.Linear or weight is None:
        return False
    return not _is_float(weight) or tuple(weight.shape) != (module.out_features, module.in_features)


def _without_hooks(module: Any) -> None:
    """Drop hooks, but for those of torch that compute a weight."""
    if "_hf_hook" in vars(module):
        module.forward = module._old_forward
        del module._hf_hook, module._old_forward
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils"):
                del hooks[key]


def made_up(model: nn.Module) -> list[dict[str, Any]]:
    """Small inputs of the right kind for a transformers model: a few tokens, an image, some sound.

    Returns:
        what to try one after the other: a model of text and images may want both.

    Raises:
        InputError: if the model's main input is none of these, or it is no transformers model.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise InputError(f"{type(model).__name__} is no transformers model: give trace its example_inputs")
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(model, "get_base_model") else model  # what an adapter wraps
    known = inspect.signature(base.forward).parameters
    token = 1 if getattr(config.get_text_config(), "pad_token_id", None) == 0 else 0
    token_ids = torch.full((1, TOKENS), token)
    inputs: dict[str, Any] = {"use_cache": False}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = token_ids
    if main == "input_ids":
        inputs |= {main: token_ids, "attention_mask": torch.ones_like(token_ids)}
    elif main == "pixel_values":
        inputs[main] = _image(config)
    elif main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        inputs[main] = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    elif main == "input_values":
        inputs[main] = torch.zeros(1, SAMPLES)
    else:
        raise InputError(f"{type(model).__name__} reads {main}: give trace its example_inputs")
    inputs = {name: value for name, value in inputs.items() if name in known}
    both = "pixel_values" in known and main == "input_ids"
    return [inputs, inputs | {"pixel_values": _image(config)}] if both else [inputs]


def _image(config: Any) -> torch.Tensor:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, getattr(vision, "num_channels", 3), height, width)


def blocks(model: nn.Module) -> list[str]:
    """Names of the decoder/encoder blocks or stages: members of the outermost lists of alike modules, in order."""
    found: list[str] = []
    outer = "\n"
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or name.startswith(outer):
            continue
        children = list(module.children())
        alike = len({type(child) for child in children}) == 1 and any(True for _ in children[0].children())
        if alike and (isinstance(module, nn.ModuleList) or len(children) > 1):
            outer = f"{name}." if name else ""
            found += [f"{outer}{number}" for number in range(len(children))]
    return found
