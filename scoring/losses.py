"""The loss that scores are about: of a whole batch, and its parts, one for every token or example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import InputError
from .weights import device_of

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
"""A loss of a model on a batch: 0-D, or 1-D parts (of tokens, of examples) that sum to it."""

SHIFTED = "ForCausalLM"
PLAIN = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForImageClassification")


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own mean loss, 0-D. Raises InputError if it returns none."""
    return _own(_output(model, batch))


def model_loss_parts(model: nn.Module, batch: Batch) -> Tensor:
    """The same loss as the parts that its tokens (or examples) contribute, ``(predictions,)``.

    Known for transformers' language models and classifiers; of any other model the loss is one part, ``(1,)``.
    """
    output = _output(model, batch)
    loss, kind = _own(output), getattr(model, "loss_type", None) or SHIFTED  # transformers' own default
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if (
        logits is not None
        and labels is not None
        and not labels.is_floating_point()
        and logits.shape[:-1] == labels.shape
        and kind in (SHIFTED, *PLAIN)
    ):
        if kind == SHIFTED:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = labels.reshape(-1)
        kept = flat != -100
        losses = cross_entropy(logits.flatten(0, -2)[kept].float(), flat[kept], reduction="none")
        parts = losses / max(1, len(losses))
        # A model may weigh or smooth its loss, or add others to it: then its tokens' parts are not these.
        if torch.allclose(parts.sum(), loss.float(), rtol=1e-2 if loss.dtype != torch.float32 else 1e-4):
            return parts
    return loss.reshape(1)


def evaluate(loss: Loss, model: nn.Module, batch: Batch, number: int) -> Tensor:
    """`loss` of the `number`-th batch, on the model's device, as it is (0-D or 1-D).

    Raises:
        InputError: if the model rejects the batch, or its loss is NaN or infinite.
    """
    device = device_of(model)
    try:
        result = loss(model, {name: value.to(device) for name, value in batch.items()})
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the model rejects batch {number} ({type(error).__name__}: {reason}): mend its data"
        ) from error
    if not bool(torch.isfinite(result).all()):
        value = float(result.detach().sum())
        raise InputError(f"the loss of batch {number} is {value}: look at its data and labels, or use --dtype float32")
    return result


def _output(model: nn.Module, batch: Batch) -> Any:
    wrapped = getattr(model, "get_base_model", lambda: model)()  # PEFT's models hand everything on to theirs
    takes_cache = "use_cache" in inspect.signature(wrapped.forward).parameters
    return model(**batch, use_cache=False) if takes_cache else model(**batch)


def _own(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError("the model returns no loss: give its batches labels, or pass a loss of your own")
    return loss
