"""Train an adapter on a causal language model, in a run folder, resumably. The loop is TRL's ``SFTTrainer``."""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from .. import ranks
from ..errors import InputError
from ..runs import RunFolder
from ..settings import TrainingSettings
from .checkpoints import checkpoint_step, checkpoints_by_step, newest_valid_checkpoint, publish_adapter
from .quiet import quiet_libraries
from .recompute import recompute_activations
from .trainer import ProgressBar, QuietTrainer, RunLog


@dataclass(frozen=True)
class TrainingResult:
    """What a training run gave.

    Attributes:
        best_step: step of the saved adapter: the one of lowest held-out loss, or the last if nothing was held out.
        train_loss: mean training loss over all steps, of earlier parts of a resumed run too.
        validation_loss_before: held-out loss of the base model; None if nothing was held out. Held-out losses are
            means over batches, weighted by their numbers of examples.
        validation_loss: held-out loss of the saved adapter; None if nothing was held out.
        steps: optimizer steps, of earlier parts of a resumed run too.
        trainable_parameters: weights that were trained.
        total_parameters: weights of the base model and the adapter.
        seconds: wall time of this call.
        resumed_from: step of the checkpoint this call went on from; None if it began at the beginning.
    """

    best_step: int
    train_loss: float
    validation_loss_before: float | None
    validation_loss: float | None
    steps: int
    trainable_parameters: int
    total_parameters: int
    seconds: float
    resumed_from: int | None


def _check_inputs(
    tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset | None], settings: TrainingSettings
) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': this machine has no usable GPU: use device 'cpu'")
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
    for split, dataset in splits.items():
        if dataset is None:
            continue
        columns = set(dataset.column_names)
        if not ({"prompt", "completion"} <= columns or columns & {"text", "messages"}):
            raise InputError(
                f"the {split} data has columns {', '.join(sorted(columns)) or '(none)'}: "
                "it needs prompt and completion, or text, or messages"
            )
        if len(dataset) == 0:
            raise InputError(f"the {split} data is empty: give at least one example")


def _wrap(model: PreTrainedModel, config: PeftConfig) -> tuple[PeftModel, str | None]:
    """Put the adapter into `model`; returns it with the name of the base model for the saved adapter."""
    own_config = copy.copy(config)
    own_config.task_type = config.task_type or TaskType.CAUSAL_LM
    own_config.base_model_name_or_path = None
    adapted = get_peft_model(model, own_config)
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise InputError("the output head cannot be trained, its layer is fused into the loss: leave out lm_head")
    # While it has a name, PEFT looks that model up on the hub at every save.
    own_config.base_model_name_or_path = ""
    return adapted, config.base_model_name_or_path or model.name_or_path or None


def _checkpointing(settings: TrainingSettings) -> dict[str, Any]:
    """Transformers renamed the argument between the versions that are supported."""
    names = {field.name for field in fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: settings.activation_checkpointing}


def _training_arguments(settings: TrainingSettings, run: RunFolder, evaluates: bool, resumes: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(run.checkpoints),
        learning_rate=settings.learning_rate,
        max_steps=settings.max_steps,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        max_length=settings.max_length,
        eval_strategy="steps" if evaluates else "no",
        eval_on_start=evaluates and not resumes,
        # The Trainer reads a number below one as a share of all steps, rounded up.
        eval_steps=settings.eval_steps or 0.1,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps",
        save_steps=settings.save_steps or 0.1,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps,
        # The filter would log an earlier loss in place of NaN.
        logging_nan_inf_filter=False,
        **_checkpointing(settings),
        # Neither autocast nor a cast: the model computes in the dtype it was loaded in.
        bf16=False,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device == "cuda",
        disable_tqdm=True,
        report_to="none",
    )


def _checkpoint_to_resume(run: RunFolder) -> Path | None:
    """The newest whole checkpoint; what was written after it is removed.

    Raises:
        InputError: if it was written by another number of processes.
    """
    checkpoint = newest_valid_checkpoint(run.checkpoints)
    step = checkpoint_step(checkpoint) if checkpoint else None
    if checkpoint:
        written, size = len(list(checkpoint.glob("rng_state*.pth"))), ranks.world()[1]
        if written != size:
            raise InputError(
                f"{checkpoint} holds the random numbers of {written} processes, not of {size}: "
                "resume with as many as the run began with"
            )
    run.rewind_log(-1 if step is None else step)
    for torn in checkpoints_by_step(run.checkpoints):
        if checkpoint_step(torn) > (step or 0):
            shutil.rmtree(torn)
    return checkpoint


def _result(
    state: TrainerState, best_step: int, parameters: tuple[int, int], seconds: float, resumed_from: int | None
) -> TrainingResult:
    losses = {int(entry["step"]): entry["loss"] for entry in state.log_history if "loss" in entry}
    validation = {int(entry["step"]): entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    # A logged loss is the mean over the steps since the one before.
    total, previous = 0.0, 0
    for step, loss in losses.items():
        total += loss * (step - previous)
        previous = step
    return TrainingResult(
        best_step=best_step,
        train_loss=total / max(previous, 1),
        validation_loss_before=validation.get(0),
        validation_loss=validation.get(best_step),
        steps=state.global_step,
        trainable_parameters=parameters[0],
        total_parameters=parameters[1],
        seconds=seconds,
        resumed_from=resumed_from,
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    validation_dataset: Dataset | None,
    config: PeftConfig,
    settings: TrainingSettings,
    run: RunFolder,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train an adapter and save it in ``run.adapter``; checkpoints and a log line per step go into the run folder.

    The loss is taken on completions only where the data has prompts and completions, never on padding. The held-out
    loss is measured before training, every ``eval_steps`` and at the end; the adapter where it was lowest is kept.

    Processes that ``torchrun`` or ``accelerate launch`` has started train together, as DDP, or as FSDP2 where
    accelerate is told so. Each gives the same arguments and gets the same result; the first one writes the run folder.

    Args:
        model: the plain base model. It is changed in place: the adapter's layers are put into it.
        tokenizer: the model's tokenizer, with an end-of-sequence token.
        train_dataset: columns ``prompt`` and ``completion``, or ``text``, or ``messages``.
        validation_dataset: the same for held-out data, or None.
        config: any PEFT configuration; its ``base_model_name_or_path``, if set, is what the saved adapter names.
        settings: how to train.
        run: the run folder.
        resume: go on from the newest whole checkpoint in the run folder, to the same adapter bit for bit; without one
            start at the beginning.
        callbacks: further callbacks of the Trainer.

    Raises:
        InputError: if data, tokenizer, device or adapter cannot be trained, the loss is no longer finite, or a
            checkpoint was written by another number of processes.
    """
    with ranks.launched(settings.device):
        return _train(
            model, tokenizer, train_dataset, validation_dataset, config, settings,
            replace(run, writes=ranks.world()[0] == 0), resume, callbacks,
        )  # fmt: skip


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    validation_dataset: Dataset | None,
    config: PeftConfig,
    settings: TrainingSettings,
    run: RunFolder,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    started = time.perf_counter()
    with ranks.together():
        _check_inputs(tokenizer, {"training": train_dataset, "held-out": validation_dataset}, settings)
    checkpoint = ranks.from_first(lambda: _checkpoint_to_resume(run)) if resume else None
    resumed_from = checkpoint_step(checkpoint) if checkpoint else None

    set_seed(settings.seed)
    with quiet_libraries():
        with ranks.together():
            adapted, base_model = _wrap(model, config)
        if settings.recompute:
            recompute_activations(adapted)
        arguments = _training_arguments(settings, run, validation_dataset is not None, resumed_from is not None)
        trainer = QuietTrainer(
            model=adapted,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=validation_dataset,
            processing_class=tokenizer,
            callbacks=[RunLog(run), *callbacks],
        )
        with ranks.together():
            if len(trainer.train_dataset) == 0:  # type: ignore[arg-type]
                raise InputError(f"no completion begins within {settings.max_length} tokens: raise max_length")
        trainer.remove_callback(PrinterCallback)
        if sys.stderr.isatty() and run.writes:
            trainer.add_callback(ProgressBar)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
        if state is None or state.global_step < max(settings.max_steps, state.max_steps):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
    best_step = state.best_global_step or state.global_step
    with ranks.together():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise InputError(f"training diverged: {name} holds NaN or infinity: lower the learning rate")
    ranks.from_first(lambda: publish_adapter(run.checkpoints / f"checkpoint-{best_step}", run.adapter, base_model))
    parameters = adapted.get_nb_trainable_parameters()
    return _result(state, best_step, parameters, time.perf_counter() - started, resumed_from)
