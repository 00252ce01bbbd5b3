"""The PEFT tuner that puts :class:`RowsLayer` in place of linear layers."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..experts import SeparateExperts, fuse, separate
from ..quant.layers import is_quantised
from ..records import AXES
from .base import warn_of_other_base
from .config import RowsConfig
from .convolution import Convolution
from .embedding import Embedding
from .layer import Linear, RowsLayer, check_index
from .quantised import QuantisedLinear

LAYERS: dict[type[nn.Module], type[RowsLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Embedding: Embedding,
}

Value = TypeVar("Value")


def _from_pattern(pattern: dict[str, Value], module: str, default: Value) -> Value:
    """The entry for `module` by its exact name, else by the first suffix or regular expression that fits it."""
    key = module if module in pattern else get_pattern_key(list(pattern), module)
    return pattern.get(key, default)


def _check_checkpoint(name: str, layer: RowsLayer, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise InputError unless the checkpoint holds a usable index and delta for this layer."""
    parts: dict[str, Any] = {
        "rows_index": layer.rows_index,
        "rows_delta": layer.rows_delta,
        "rows_bias": layer.rows_bias,
    }
    for part, tensors in parts.items():
        if adapter_name not in tensors:
            continue
        tensor = state_dict.get(f"{name}.{part}.{adapter_name}")
        if tensor is None:
            raise InputError(f"adapter checkpoint: {part} of {name!r} is missing: save the adapter again")
        if (saved := tuple(tensor.shape)) != (wanted := tuple(tensors[adapter_name].shape)):
            raise InputError(f"adapter checkpoint: {part} of {name!r} has shape {saved}, not {wanted}: use its model")
        if not bool(tensor.isfinite().all()):
            raise InputError(f"adapter checkpoint: {name!r} holds NaN or infinite numbers: use an earlier checkpoint")
    size = (layer.out_features, layer.in_features)[AXES.index(layer.rows_axis[adapter_name])]
    check_index(state_dict[f"{name}.rows_index.{adapter_name}"], size, f"adapter checkpoint: {name!r}")


class RowsModel(BaseTuner):
    """A model of which some rows and columns are trained, per :class:`RowsConfig`. See ``peft.get_peft_model``."""

    prefix = "rows_"
    tuner_layer_cls = RowsLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, on a model whose experts are separate modules; those without an adapter are fused again."""
        try:
            super().inject_adapter(model, *args, **kwargs)
        finally:
            fuse(model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[assignment]
        fuse(model)
        return model

    def _prepare_model(self, peft_config: RowsConfig, model: nn.Module) -> None:  # type: ignore[override]
        separate(model)
        names = {name for name, _ in model.named_modules()}
        missing = [module for module in peft_config.indices or {} if module not in names]
        if missing:
            raise InputError(f"the model has no module {missing[0]!r}: use the model the selection was made on")
        uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
        self._tied_weights = {weight for weight, count in uses.items() if count > 1}

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # PEFT matches suffixes, a selection names modules exactly.
        indices = getattr(peft_config, "indices", None)
        if indices is not None and key not in indices:
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: RowsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(parent, SeparateExperts) and isinstance(target, nn.ModuleList):
            # The name of the fused parameter means all experts in it.
            for number, expert in enumerate(target):
                key = f"{current_key}.{number}"
                if not isinstance(self._check_target_module_exists(peft_config, key), _ExcludedModule):
                    self._create_and_replace(peft_config, adapter_name, expert, str(number), target, key)
            return
        arguments: dict[str, Any] = {
            "axis": _from_pattern(peft_config.axis_pattern, current_key, peft_config.axis),
            "num_rows": _from_pattern(peft_config.rows_pattern, current_key, peft_config.num_rows),
            "index": (peft_config.indices or {}).get(current_key),
            "train_bias": peft_config.train_bias,
            "dropout": peft_config.dropout,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, RowsLayer):
            target.update_layer(adapter_name, **arguments)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(f"{current_key!r} has an adapter of another PEFT method: merge it into the model first")
        # Subclasses are refused too: attention's, say, are never called.
        layer_class = QuantisedLinear if is_quantised(target) else LAYERS.get(type(target))
        if layer_class is None:
            supported = ", ".join(layer.__name__ for layer in LAYERS)
            raise InputError(
                f"{current_key!r} is a {type(target).__name__}, rows are trained only in {supported}: "
                "leave it out of target_modules"
            )
        is_tied = id(target.weight) in self._tied_weights
        layer = layer_class(target, adapter_name, is_tied=is_tied, **arguments)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT only warns of missing keys; with a wrong index the model would be silently wrong.
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        warn_of_other_base(getattr(config, "base_fingerprint", None), model)
        for name, module in model.named_modules():
            if isinstance(module, RowsLayer) and adapter_name in module.rows_delta:
                _check_checkpoint(name, module, adapter_name, remapped)
        return remapped
