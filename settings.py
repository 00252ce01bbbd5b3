"""What a user can set: groups of settings, each field a flag, and settings that ride on a name, ``name:key=value``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import InputError, unknown_name

T = TypeVar("T")
SEEDS = 2**32
SCOPES = ("layer", "global", "coupled", "coupled-global")
AXIS_CHOICES = ("row", "column", "auto")
PICKS = ("top", "sample", "diverse", "random")
REDUCTIONS = ("sum", "mean", "max")
NORMALIZERS = ("mean", "max", "sum", "standarization", "none")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


def setting(default: Any, description: str, minimum: float | None = None) -> Any:
    """A dataclass field with its help text and, for numbers, the smallest value that makes sense."""
    return dataclasses.field(default=default, metadata={"help": description, "minimum": minimum})


def check_minimums(value: Any) -> None:
    """Raise an InputError for a field of the dataclass `value` that is below its minimum."""
    for field in dataclasses.fields(value):
        number, minimum = getattr(value, field.name), field.metadata.get("minimum")
        if minimum is None or number is None:
            continue
        if not math.isfinite(number):
            raise InputError(f"{field.name}={number} is no number to work with: use at least {minimum:g}")
        if number < minimum:
            raise InputError(f"{field.name}={number} is too small: use at least {minimum:g}")


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """The batches that scores are computed on; the same for every criterion at one seed."""

    score_batches: int = setting(8, "Calibration batches for scores.", minimum=1)
    score_batch_size: int = setting(8, "Examples of a calibration batch.", minimum=1)
    score_tokens: int = setting(128, "Tokens of a calibration example; longer ones are cut.", minimum=2)

    def __post_init__(self) -> None:
        check_minimums(self)


@dataclasses.dataclass(frozen=True)
class SelectionSettings:
    """What of a table of scores is trained; see :func:`rowscope.scoring.select`."""

    budget: str = setting(
        "lora=16",
        "rank=K units each; ratio=R of them; params=80M weights; lora=R: what a LoRA of rank R costs; memory=24GiB.",
    )
    scope: str = setting(
        "coupled",
        "layer: within each module; global: all modules compete; coupled: channels of coupled groups, within each "
        "group; coupled-global: all groups compete.",
    )
    axis: str | None = setting(
        None,
        "With --scope layer or global: row (default), column, or auto: columns where a module has more inputs than "
        "outputs.",
    )
    pick: str = setting("sample", "top: largest scores; sample: in proportion; diverse: large and unalike; random.")
    layer_scores: str | None = setting(
        None, "Layer scores (.json), or scores to sum, by which the budget is divided between the layers."
    )
    layer_floor: float = setting(0.25, "With layer scores: no layer gets less than this share of an even one.")
    layer_cap: float = setting(4.0, "With layer scores: no layer gets more than this many times an even share.")
    group_reduction: str = setting("mean", "sum, mean or max over a coupled group's members, as in Torch-Pruning.")
    normalizer: str = setting(
        "mean", "mean, max, sum, standarization or none: makes scores comparable where modules compete."
    )
    heads: bool = setting(False, "With --scope coupled: attention goes by whole heads, queries to output.")

    def __post_init__(self) -> None:
        known = {"scope": SCOPES, "axis": AXIS_CHOICES, "pick": PICKS, "normalizer": NORMALIZERS}
        for name, choices in (known | {"group_reduction": REDUCTIONS}).items():
            if getattr(self, name) is not None and getattr(self, name) not in choices:
                raise unknown_name(name.replace("_", " "), getattr(self, name), choices)
        if self.axis is not None and self.scope.startswith("coupled"):
            raise InputError(
                f"--axis {self.axis}: coupled channels have rows and columns: add --scope layer or global"
            )
        if self.heads and not self.scope.startswith("coupled"):
            raise InputError(f"whole heads are coupled: --heads needs --scope coupled, not {self.scope}")
        if not (0 <= self.layer_floor <= 1 <= self.layer_cap < math.inf):
            raise InputError(
                f"layer_floor={self.layer_floor}, layer_cap={self.layer_cap}: use a floor from 0 to 1, a cap from 1 up"
            )


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How an adapter is trained; names and meanings are those of ``transformers.TrainingArguments`` and TRL's."""

    learning_rate: float = setting(4e-3, "Peak learning rate of AdamW.", minimum=1e-12)
    max_steps: int = setting(-1, "Optimizer steps; -1: as many as num_train_epochs need.", minimum=-1)
    num_train_epochs: float = setting(1.0, "Passes over the training data, unless max_steps is given.", minimum=0)
    per_device_train_batch_size: int = setting(8, "Examples per forward pass and device, evaluation too.", minimum=1)
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimizer step.", minimum=1)
    lr_scheduler_type: str = setting("cosine", f"One of {', '.join(SCHEDULES)}.")
    warmup_steps: float = setting(0.03, "Steps of linear warm-up; below 1, their share of all steps.", minimum=0)
    weight_decay: float = setting(0.0, "Of AdamW, on the trained weights.", minimum=0)
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this L2 norm.", minimum=0)
    max_length: int = setting(1024, "Tokens of a training example; longer ones are cut at the end.", minimum=2)
    eval_steps: int | None = setting(None, "Steps between evaluations; by default a tenth of all steps.", minimum=1)
    save_steps: int | None = setting(None, "Steps between checkpoints; by default a tenth of all steps.", minimum=1)
    save_total_limit: int = setting(3, "Checkpoints to keep, beside the best one.", minimum=1)
    logging_steps: int = setting(1, "Steps between lines of the log.", minimum=1)
    activation_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    recompute: bool = setting(
        True, "Make norms, activation functions and gated products again in the backward pass instead of keeping them."
    )
    seed: int = setting(0, "Governs everything random.", minimum=0)
    device: str = setting("cpu", "As torch names it: cpu, cuda.")

    def __post_init__(self) -> None:
        check_minimums(self)
        if self.seed >= SEEDS:
            raise InputError(f"seed={self.seed} is too large: use one below {SEEDS}")
        if self.lr_scheduler_type not in SCHEDULES:
            raise unknown_name("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs == 0):
            raise InputError(f"max_steps={self.max_steps} trains nothing: use at least 1, or -1 with num_train_epochs")


TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse(kind: str, text: str, registry: Mapping[str, type[T]]) -> T:
    """Build the registered dataclass that `text` names, with its settings; `kind` is for the messages.

    Raises:
        InputError: for an unknown name, an unknown setting, or a value of the wrong type.
    """
    name, _, rest = text.partition(":")
    if name not in registry:
        raise unknown_name(kind, name, registry)
    cls = registry[name]
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in fields:
            raise unknown_name(f"setting of {name}", key, fields) if fields else InputError(f"{name} has no settings")
        if not equals:
            raise InputError(f"{kind} {name}: setting {key!r} has no value, write {key}=VALUE")
        values[key] = _convert(f"{kind} {name}: {key}", value, type(fields[key].default))
    return cls(**values)


def _convert(where: str, text: str, wanted: type) -> Any:
    try:
        return TRUTH[text.lower()] if wanted is bool else wanted(text)
    except (ValueError, KeyError):
        raise InputError(f"{where}={text!r} is no {wanted.__name__}") from None


def spell(name: str, value: Any) -> str:
    """The inverse of :func:`parse`: the name with every setting that differs from its default, in field order."""
    pairs = [
        f"{field.name}={getattr(value, field.name)}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{name}:{','.join(pairs)}" if pairs else name
