"""TRL's trainer made quiet, and the callbacks that keep a run folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer

from ..errors import InputError
from ..ranks import together
from ..runs import RunFolder


class QuietTrainer(SFTTrainer):
    """TRL's trainer that reports to no one, writes no model card, and says it in one line when it cannot save."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            # An adapter is small, and a checkpoint whole or torn: no shards in it.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None  # else those of shards stay
            plugin.set_state_dict_type("FULL_STATE_DICT")

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._writing():  # the ranks meet between this and the rest of a checkpoint
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call)
                return
            # The Trainer would gather the frozen weights too.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            adapter = get_model_state_dict(self.model, options=options)  # type: ignore[arg-type]
            if self.args.should_save:
                self._save(output_dir, state_dict=adapter)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._writing():
            super()._save_checkpoint(*args, **kwargs)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # Of shards some are gathered between two writes: a rank that has failed must not wait for the others there.
        with nullcontext() if self.is_fsdp_enabled else together():
            try:
                yield
            except (SafetensorError, RuntimeError, OSError) as error:
                # On a full disk safetensors and torch raise errors of their own, not OSError.
                reason = " ".join(str(error).split())[:120]
                raise InputError(
                    f"cannot write a checkpoint to {self.args.output_dir} ({reason}): free some space and add --resume"
                ) from error


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without the logs it prints between."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class RunLog(TrainerCallback):
    """Writes ``log.jsonl``, has the best adapter saved when it is found, and stops a run that has diverged.

    Args:
        run: where the log goes.

    Raises:
        InputError: at the step whose loss or gradient is no longer finite, before anything of it is saved.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The loss is known where it is logged; no checkpoint is written before it has been looked at.
        control.should_log |= control.should_evaluate or control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        line = {name: logs.get(name) for name in ("loss", "learning_rate", "grad_norm")}
        with together():
            for name in ("loss", "grad_norm"):
                if not math.isfinite(line[name] or 0.0):
                    raise InputError(
                        f"training diverged: {name} is {line[name]} at step {state.global_step} "
                        f"(learning rate {args.learning_rate:g}): lower the learning rate"
                    )
            self.run.append_log({"step": state.global_step, **line, "active_layers": None})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {})["eval_loss"]
        with together():
            if not math.isfinite(loss):
                raise InputError(
                    f"training diverged: the held-out loss is {loss} at step {state.global_step}: "
                    "lower the learning rate"
                )
            self.run.append_log({"step": state.global_step, "validation_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            control.should_save = True
