"""What a row or column adapter is made of: :class:`RowsConfig`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from torch import Tensor

from ..errors import InputError
from ..records import AXES, Selection


class RowsType(str, enum.Enum):  # noqa: UP042 (PEFT formats its own types as this base class does)
    """The PEFT type of row and column tuning; PEFT's own enumeration is closed."""

    ROWS = "ROWS"


@dataclass
class RowsConfig(PeftConfig):
    """Configuration of :class:`RowsModel`: train some rows or columns of linear weights, freeze the rest.

    Without a selection the `num_rows` rows (columns) of largest L2 norm are trained. :meth:`from_selection` names them
    one by one; a loaded adapter takes them from its checkpoint.

    Args:
        target_modules: names (suffixes) of the linear modules, one regular expression, or ``"all-linear"``.
        exclude_modules: names (suffixes) or one regular expression of modules to leave alone.
        num_rows: trained rows (columns) per module.
        axis: ``"row"`` trains output features, ``"column"`` input features of a weight `(out_features, in_features)`.
        rows_pattern: module name, suffix or regular expression -> `num_rows` of that module.
        axis_pattern: module name, suffix or regular expression -> `axis` of that module.
        train_bias: also train the biases of the chosen rows, where there are any.
        dropout: probability with which an input of the delta is dropped in training.
        layers_to_transform: indices of the layers to train; all if None.
        layers_pattern: name of the list of layers, if it cannot be found by itself.
        modules_to_save: modules trained and saved whole beside the adapter.
        base_fingerprint: of the model that the indices were selected on; see ``rowscope.models.fingerprint``.
        init_weights: start from the base model exactly; False starts from small random numbers, for tests.

    Raises:
        InputError: on an unknown axis, a number of rows below one, or a dropout that is no probability.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or regular expression of linear modules, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or regular expression of modules to leave alone."}
    )
    num_rows: int = field(default=32, metadata={"help": "Trained rows (columns) per module."})
    axis: Literal["row", "column"] = field(
        default="row", metadata={"help": "'row' trains output features, 'column' input features."}
    )
    rows_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name, suffix or regular expression -> its num_rows."}
    )
    axis_pattern: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Module name, suffix or regular expression -> its axis."}
    )
    train_bias: bool = field(default=False, metadata={"help": "Also train the biases of the chosen rows."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the delta's input, in training."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to train; all if not given."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, if it cannot be found by itself."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the adapter."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the model that the indices were selected on."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start from the base model exactly; False: small random numbers, for tests."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RowsType.ROWS
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for axis in (self.axis, *self.axis_pattern.values()):
            if axis not in AXES:
                raise InputError(f"RowsConfig: unknown axis {axis!r}: use 'row' or 'column'")
        for number in (self.num_rows, *self.rows_pattern.values()):
            if number < 1:
                raise InputError(f"RowsConfig: num_rows is {number}: train at least one row")
        if not 0 <= self.dropout < 1:
            raise InputError(f"RowsConfig: dropout is {self.dropout}: use a probability from 0 to below 1")
        # Not a field: tensors do not belong into adapter_config.json. PEFT writes them with the weights.
        self.indices: dict[str, Tensor] | None = None

    @classmethod
    def from_selection(cls, selection: Selection, **kwargs: Any) -> RowsConfig:
        """Train exactly the rows and columns of `selection`; `kwargs` are the remaining fields (``task_type``, …).

        Raises:
            InputError: if the selection is empty, or has rows and columns of one module.
        """
        if not selection.indices:
            raise InputError("the selection is empty: select again with a larger budget")
        for module, axes in selection.indices.items():
            if len(axes) > 1:
                raise InputError(f"selection: {module!r} has rows and columns: keep one axis per module")
        chosen = {module: next(iter(axes.items())) for module, axes in selection.indices.items()}
        config = cls(
            target_modules=list(chosen),
            rows_pattern={module: index.numel() for module, (_, index) in chosen.items()},
            axis_pattern={module: axis for module, (axis, _) in chosen.items()},
            **{"base_fingerprint": selection.model_fingerprint or None} | kwargs,
        )
        config.indices = {module: index for module, (_, index) in chosen.items()}
        return config
