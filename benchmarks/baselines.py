"""Methods of fine-tuning at equal trainable parameters, each made of a frozen model: ours, PEFT's, the reference's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

import rowscope
from rowscope import Budget, RowsConfig, scoring
from rowscope.finetune import recompute_activations
from rowscope.graph import trace
from rowscope.models import linear_modules

RANK = 16


class MaskedRows(nn.Module):
    """A linear layer with k trained rows, placed by a dense one-hot matrix: ``h = W x + b + (x ΔWᵀ) M``.

    The form of the reference implementation of SPruFT (arXiv:2502.11439), but from a start at zero.

    Args:
        base: `(out_features, in_features)`, frozen.
        num_rows: k; the rows of largest L2 norm are taken.
    """

    def __init__(self, base: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.base = base
        chosen = base.weight.detach().float().norm(dim=1).topk(num_rows).indices.sort().values
        self.delta = nn.Parameter(base.weight.new_zeros(num_rows, base.in_features))
        one_hot = base.weight.new_zeros(num_rows, base.out_features)
        self.register_buffer("one_hot", one_hot.scatter_(1, chosen[:, None], 1))

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., in_features)` -> `(..., out_features)`."""
        result = self.base(x)
        return result + (functional.linear(x, self.delta) @ self.one_hot).to(result.dtype)


def _with_masked_rows(model: nn.Module) -> nn.Module:
    for name, linear in linear_modules(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MaskedRows(linear, units(linear, "row")))
    return model


def units(linear: nn.Linear, axis: str) -> int:
    """Rows (columns) with as many weights as a LoRA of rank 16 on the layer, to the nearest."""
    per_unit = linear.in_features if axis == "row" else linear.out_features
    return round(RANK * (linear.in_features + linear.out_features) / per_unit)


def _rows_config(model: nn.Module, axis: str) -> RowsConfig:
    counts = {name: units(linear, axis) for name, linear in linear_modules(model).items()}
    return RowsConfig(target_modules=list(counts), axis=axis, rows_pattern=counts)


def _coupled_config(model: nn.Module) -> RowsConfig:
    table = scoring.score(model, rowscope.criterion("random"))
    groups = trace(model).groups
    return RowsConfig.from_selection(rowscope.select(table, Budget("lora", RANK), scope="coupled", groups=groups))


def _lora_config(model: nn.Module, dropout: float = 0.0, dora: bool = False) -> LoraConfig:
    # DoRA trains a magnitude for each output besides: a rank less in two modules of a block makes up for it.
    less = {"gate_proj": RANK - 1, "up_proj": RANK - 1} if dora else {}
    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, use_dora=dora, rank_pattern=less,
        target_modules=list(linear_modules(model)),
    )  # fmt: skip


def _shira_config(model: nn.Module) -> ShiraConfig:
    return ShiraConfig(r=RANK, random_seed=0, target_modules=list(linear_modules(model)))


@dataclass(frozen=True)
class Method:
    """How a frozen model becomes one that is trained.

    Attributes:
        config: makes the PEFT configuration; None for a method that is none of PEFT's.
        change: makes the trained model of a frozen one instead.
        recompute: whether cheap activations are made again in the backward pass.
        writes: whether a step writes to the base weights, which then cannot be shared with other methods.
        trains_base: whether the trained weights are the base's own.
    """

    config: Callable[[nn.Module], PeftConfig] | None = None
    change: Callable[[nn.Module], nn.Module] = lambda model: model
    recompute: bool = False
    writes: bool = False
    trains_base: bool = False

    def build(self, model: nn.Module) -> nn.Module:
        """A model for this method, from a frozen one, which stays as it is."""
        own = copy.deepcopy(model, {} if self.writes else {id(part): part for part in model.parameters()})
        own = self.change(own)
        if self.config is not None:
            # Adapters in the base's dtype: PEFT would make them float32 and keep each input in both dtypes.
            own = get_peft_model(own, self.config(own), autocast_adapter_dtype=False)
        if self.recompute:
            recompute_activations(own)
        return own.train()


def _rows(model: nn.Module) -> RowsConfig:
    return _rows_config(model, "row")


def _columns(model: nn.Module) -> RowsConfig:
    return _rows_config(model, "column")


METHODS = {
    "floor": Method(),
    "rows": Method(_rows, writes=True),
    "columns": Method(_columns, writes=True),
    "coupled": Method(_coupled_config, writes=True),
    "floor+recompute": Method(recompute=True),
    "rows+recompute": Method(_rows, recompute=True, writes=True),
    "columns+recompute": Method(_columns, recompute=True, writes=True),
    "coupled+recompute": Method(_coupled_config, recompute=True, writes=True),
    "lora": Method(_lora_config),
    "lora+dropout": Method(lambda model: _lora_config(model, dropout=0.05)),
    "lora+recompute": Method(_lora_config, recompute=True),
    "dora": Method(lambda model: _lora_config(model, dora=True)),
    "shira": Method(_shira_config),
    "mask": Method(change=_with_masked_rows),
    "full": Method(change=lambda model: model.requires_grad_(True), writes=True, trains_base=True),
}
