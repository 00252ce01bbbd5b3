"""Row and column adapters as LoRA adapters, which plain PEFT loads without loss and without rowscope.

A delta of k rows or columns is a product of rank k, at scaling 1, one factor of which is one-hot:

    rows:     ΔW = B A,  A = delta (k, in_features),  B (out_features, k) one-hot
    columns:  ΔW = B A,  A (k, in_features) one-hot,  B = delta (out_features, k)

Products with one-hot factors are exact, so the LoRA gives the bits that the delta gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..records import atomic_folder
from .config import RowsConfig
from .convolution import Convolution
from .embedding import Embedding
from .layer import RowsLayer
from .model import RowsModel


def save_as_lora(model: PeftModel, folder: Path, adapter_name: str = "default") -> LoraConfig:
    """Write a rows adapter as a LoRA adapter into `folder`, which appears whole or not at all.

    Its rank differs from module to module, as k does; an engine with a largest rank must allow for the largest. The
    LoRA of a convolution's columns has rank k times the size of the kernel.

    Args:
        model: with the adapter.
        folder: new or empty.
        adapter_name: which of the model's adapters.

    Returns:
        The configuration that was written.

    Raises:
        InputError: if the adapter is not of rows and columns or trains what no LoRA can, or the folder is in use.
    """
    if adapter_name not in model.peft_config:
        raise InputError(f"the model has no adapter {adapter_name!r}: it has {', '.join(model.peft_config)}")
    config = model.peft_config[adapter_name]
    if not isinstance(config, RowsConfig):
        raise InputError(f"adapter {adapter_name!r} is not one of rows and columns: merge it into the model instead")
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, RowsLayer) and adapter_name in module.rows_delta
    }
    trains_bias = any(adapter_name in layer.rows_bias for layer in layers.values())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        _check_convertible(name, layer, trains_bias)
        a, b = lora_factors(layer, adapter_name)
        ranks[name] = a.shape[0]
        parts = {"lora_A.weight": a, "lora_B.weight": b}
        if isinstance(layer, Embedding):
            parts = {"lora_embedding_A": a, "lora_embedding_B": b}
        if trains_bias:
            parts["lora_B.bias"] = _dense_bias(layer, adapter_name)
        tensors |= {f"base_model.model.{name}.{part}": tensor for part, tensor in parts.items()}
    # Without embeddings, for whose size PEFT would ask the hub.
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors |= {name: tensor for name, tensor in saved.items() if f".{RowsModel.prefix}" not in name}
    lora = _lora_config(config, layers, ranks, trains_bias)
    with atomic_folder(folder) as temporary:
        own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(own, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora.save_pretrained(str(temporary))
    return lora


def lora_factors(layer: RowsLayer, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """A `(rank, in_features, …)` and B `(out_features, rank, …)` of a LoRA that is the adapter, fp32.

    Of convolutions A has the base's kernel and B one of size 1. Of embeddings `in_features` are the tokens.
    """
    delta = layer.rows_delta[adapter_name].detach()
    index = layer.rows_index[adapter_name].long()
    kernel = delta.shape[2:]
    if layer.trains_rows(adapter_name):
        one_hot = delta.new_zeros(layer.out_features, len(index))
        one_hot[index, torch.arange(len(index))] = 1
        return delta, one_hot.reshape(*one_hot.shape, *(1 for _ in kernel))
    # Of a convolution each place in the kernel of each chosen channel is a feature of its own.
    places = kernel.numel()
    one_hot = delta.new_zeros(len(index), places, layer.in_features, places)
    for position, channel in enumerate(index.tolist()):
        one_hot[position, :, channel] = torch.eye(places)
    a = one_hot.reshape(len(index) * places, layer.in_features, *kernel)
    b = delta.reshape(layer.out_features, len(index) * places)
    return a, b.reshape(*b.shape, *(1 for _ in kernel))


def _check_convertible(name: str, layer: RowsLayer, trains_bias: bool) -> None:
    base = layer.get_base_layer()
    mend = "merge the adapter into the model instead"
    if ".experts." in f".{name}":
        raise InputError(f"{name!r} is one of the experts in a fused weight, whose LoRA has one rank for all: {mend}")
    if isinstance(layer, Convolution) and not _is_plain(base):
        raise InputError(f"{name!r} is a grouped, dilated or specially padded convolution, PEFT's LoRA is not: {mend}")
    if trains_bias and (isinstance(layer, Embedding) or getattr(base, "bias", None) is None):
        raise InputError(f"{name!r} has no bias but other layers' biases are trained, which LoRA has for all: {mend}")


def _is_plain(base: Any) -> bool:
    return base.groups == 1 and base.padding_mode == "zeros" and all(step == 1 for step in base.dilation)


def _dense_bias(layer: RowsLayer, adapter_name: str) -> Tensor:
    bias = torch.zeros(layer.out_features)
    if adapter_name in layer.rows_bias:
        bias[layer.rows_index[adapter_name].long()] = layer.rows_bias[adapter_name].detach().cpu()
    return bias


def _lora_config(
    config: RowsConfig, layers: dict[str, RowsLayer], ranks: dict[str, int], trains_bias: bool
) -> LoraConfig:
    largest = max(ranks.values())
    # PEFT takes the first key that a module's name ends with, by regular expression.
    ambiguous = {name for name in ranks if any(other.endswith(f".{name}") for other in ranks)}
    pattern = {f"^{name}" if name in ambiguous else name: rank for name, rank in ranks.items()}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(layers),
        lora_bias=trains_bias,
        fan_in_fan_out=any(_is_transposed(layer) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _is_transposed(layer: RowsLayer) -> bool:
    base: nn.Module = layer.get_base_layer()
    return isinstance(base, Conv1D)
