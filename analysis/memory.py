"""Where the memory of a training step goes, measured by component during a real training.

Components, in bytes: ``base_weights`` (frozen parameters and all buffers), ``adapter`` (trainable parameters),
``gradients``, ``optimizer`` (its state), ``activations`` (what the forward pass keeps for the backward pass).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import TrainerCallback

from ..ranks import from_first
from ..records import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState, TrainingArguments


def components(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of what a training holds between forward and backward passes.

    Call it after an optimizer step and before ``zero_grad``: earlier the optimizer has no state, later there are no
    gradients. A parameter shared by several modules counts once.

    Args:
        model: its trainable parameters are the adapter, whatever the method.
        optimizer: a torch optimizer, or accelerate's wrapper of one.

    Returns:
        ``base_weights``, ``adapter``, ``gradients`` and ``optimizer``, in bytes.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return {
        "base_weights": _bytes(frozen) + _bytes(list(model.buffers())),
        "adapter": _bytes(trainable),
        "gradients": _bytes([parameter.grad for parameter in model.parameters() if parameter.grad is not None]),
        "optimizer": _bytes([value for state in states for value in state.values() if torch.is_tensor(value)]),
    }


def _bytes(tensors: Sequence[Tensor]) -> int:
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]  # of a sharded one
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse tensors and some tensor subclasses have no storage
        return None


class SavedForBackward:
    """Count the bytes that one forward pass of a model keeps for its backward pass.

    It watches the next forward pass that has gradients enabled, then removes itself, also if that pass raises. Each
    storage counts once and in full; those of parameters and buffers do not count, nor do tensors that are gone again
    when the forward pass ends. A loss computed outside the model's forward is not seen.

    Attributes:
        bytes: the sum; None until a forward pass was seen.
        batch: shape of the pass's ``input_ids``, or of its first tensor, e.g. ``[batch, tokens]``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes: int | None = None
        self.batch: list[int] = []
        self._saved: dict[StorageWeakRef, int] = {}
        self._own: set[StorageWeakRef | None] = set()
        self._hooks: saved_tensors_hooks | None = None
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        tensors = [value for value in (kwargs.get("input_ids"), *args, *kwargs.values()) if torch.is_tensor(value)]
        self.batch = list(tensors[0].shape) if tensors else []
        self._own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage is not None and storage not in self._own:
            self._saved[storage] = tensor.untyped_storage().nbytes()
        return tensor

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self.bytes = sum(size for storage, size in self._saved.items() if not storage.expired())
        self._hooks = None
        self._saved.clear()
        self._own.clear()


class MemoryCallback(TrainerCallback):
    """Measure a training's memory by component during its first optimizer step, and write ``memory.json``.

    The training's numbers do not change by a bit. Activations are those of the first micro-batch. The file is written
    when training ends; without a step there is nothing to write. Of several processes the first measures itself: of a
    sharded model its share, while what FSDP gathers for the forward pass may count as activations.

    Args:
        path: where ``memory.json`` goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved: SavedForBackward | None = None
        self._components: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._saved is None:
            self._saved = SavedForBackward(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Between the optimizer's step and `zero_grad`: gradients and optimizer state both exist.
        if self._saved is not None and not self._components:
            self._components = components(kwargs["model"], kwargs["optimizer"])
            self._components["activations"] = self._saved.bytes or 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._saved is None or not self._components:
            return
        measured = {
            "unit": "bytes",
            "batch": self._saved.batch,
            "components": self._components,
            "peak_rss": peak_rss(),
        }
        if args.device.type == "cuda":
            measured["peak_cuda"] = torch.cuda.max_memory_allocated(args.device)
        from_first(lambda: write_json(self.path, measured))


def peak_rss() -> int | None:
    """Largest resident set size of this process so far, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
