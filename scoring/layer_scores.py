"""Scores of whole layers: summed from those of rows or columns, or measured by forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import data, models
from ..errors import InputError
from ..graph.naming import block_of
from ..ranks import progress, same_on_all_ranks, summed, together
from ..records import AXES, LayerScores, ScoreTable
from .blocks import Forward, hidden_states, overridden, replaced
from .criteria import Task, evaluating
from .losses import Batch, Loss


def layer_of(module: str, layers: list[str]) -> str:
    """The block that a module is in; empty if it is in none."""
    return block_of(module, layers) or ""


def rows(layer_scores: LayerScores) -> tuple[list[str], list[list[str]]]:
    """A table for people: each layer's score, its standard error (``-`` if unknown), and its share of the sum."""
    total, noise = sum(layer_scores.scores.values()) or 1.0, layer_scores.noise
    return ["layer", "score", "standard error", "share"], [
        [layer, f"{score:.3g}", f"{noise[layer]:.2g}" if layer in noise else "-", f"{score / total:.1%}"]
        for layer, score in layer_scores.scores.items()
    ]


def from_rows(table: ScoreTable, axis: str = "row") -> LayerScores:
    """Each layer's score: the sum over all rows (or columns) of its modules.

    Raises:
        InputError: if the table has no such axis, or the model no layers.
    """
    provenance = table.provenance
    sums = dict.fromkeys(provenance.layers, 0.0)
    for module, axes in table.scores.items():
        if axis not in axes:
            raise InputError(f"no {axis} scores of {module}: sum its {next(a for a in AXES if a in axes)}s instead")
        if layer := layer_of(module, provenance.layers):
            sums[layer] += float(axes[axis].double().sum())
    if not sums:
        raise InputError(f"{provenance.model_source or 'the model'} has no layers: layer scores need blocks")
    return LayerScores(
        sums,
        f"{axis}s:{provenance.criterion}",
        provenance.model_source,
        provenance.model_fingerprint,
        provenance.data_source,
        provenance.data_fingerprint,
        provenance.seed,
        provenance.forward_passes,
        provenance.backward_passes,
    )


# ---------------------------------------------------------------------------------------------- by forward passes


def zero_order(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    passes: int = 512,
    epsilon: float = 1e-3,
    seed: int = 0,
    model_source: str = "",
    model_fingerprint: str = "",
    data_source: str = "",
) -> LayerScores:
    """How much the loss depends on what each block adds to the residual stream, from forward passes alone.

    Block l gets a gate, ``out = in + (1 + γ_l) · (block(in) − in)``, at γ_l = 0 the block itself, and

        ``s_l = √(mean_p (∂L_p/∂γ_l)²)``

    with L_p the loss of a single token (or example, see :func:`losses.model_loss_parts`). With so few unknowns no
    random probing is needed: each derivative is ``(L_p(γ_l = ε) − L_p(0)) / ε``, one pass a block and batch beside
    one that leaves all gates alone, exact up to rounding and to first order in ε. The noise is the standard error over
    the batches; of one batch, over its two halves. Ranks of ``torch.distributed`` share the batches. The model is left
    as it was found.

    Args:
        model: of blocks whose output has the shape of their input.
        batches: as for :func:`criteria.score`.
        loss: a loss of your own, see :data:`losses.Loss`; its parts count alike.
        passes: forward passes that may be spent: as many batches are used as they suffice for.
        epsilon: size of a gate's movement; raised to the root of the numbers' precision, 0.09 for bfloat16.
        seed: of the batches, for the record: nothing here is random.
        model_source: what the model is called, for the record.
        model_fingerprint: of its checkpoint, for the record.
        data_source: what the batches came from, for the record.

    Raises:
        InputError: if the model has no blocks or a block changes the shape, the passes do not suffice for one batch,
            there is no batch, the model rejects one, or a loss is NaN or infinite.
    """
    blocks = models.layers(model)
    if not blocks:
        raise InputError(f"{model_source or 'the model'} has no layers: layer scores need blocks")
    if not batches:
        raise InputError("layer scores need data: name some with --data")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"layer scores: epsilon={epsilon} must be greater than 0")
    each = len(blocks) + 1
    count = min(len(batches), passes // each)
    if count < 1:
        raise InputError(
            f"layer scores: passes={passes} do not suffice: a batch takes {each}, one a block and one more"
        )
    data_fingerprint = data.fingerprint(list(batches))
    same_on_all_ranks(data_fingerprint)
    task, step = Task(model, {}, batches, seed, loss), max(epsilon, math.sqrt(_precision(model)))
    found = torch.zeros(count, 2, each, dtype=torch.float64)
    with evaluating(model), together(), torch.inference_mode():
        for number in progress(range(count), "layer scores"):
            found[number] = _squares(task, number, list(blocks.values()), step)
        found = summed(found)
    scores, errors = _roots(found.sum(dim=1) if count > 1 else found[0])
    return LayerScores(
        dict(zip(blocks, scores, strict=True)),
        f"gates:passes={passes},epsilon={epsilon:g}",
        model_source,
        model_fingerprint,
        data_source,
        data_fingerprint,
        seed,
        forward_passes=count * each,
        noise=dict(zip(blocks, errors, strict=False)),
    )


def _precision(model: nn.Module) -> float:
    """Relative spacing of the coarsest numbers in the model, or in its loss, which is float32."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return max(torch.finfo(dtype).eps for dtype in {torch.float32, *dtypes})


def _squares(task: Task, number: int, blocks: Sequence[nn.Module], step: float) -> Tensor:
    """One batch's squared derivatives, summed over the parts of its loss, and how many parts there are.

    Returns:
        float64 ``(2, blocks + 1)``: the first and the second half of the parts; the last column counts them.
    """
    clean = task.loss_parts(number)
    counts = torch.tensor([[(len(clean) + 1) // 2], [len(clean) // 2]])
    columns = []
    for block in blocks:
        with overridden([block], lambda _, forward: _gated(forward, step)):
            moved = task.loss_parts(number)
        if moved.shape != clean.shape:
            raise InputError(f"the loss of batch {number} falls into other parts than before: pass a loss of your own")
        # a part is a share of the mean loss: times their number it is the token's own
        slopes = (moved.double() - clean.double()) * (len(clean) / step)
        columns.append(torch.stack([half.square().sum() for half in slopes.tensor_split(2)]).cpu())
    return torch.cat([torch.stack(columns, dim=1), counts], dim=1)


def _gated(forward: Forward, gate: float) -> Forward:
    """A block's forward with what it adds to the hidden states scaled by ``1 + gate``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        incoming, hidden = next(iter([*args, *kwargs.values()]), None), hidden_states(output)
        if not isinstance(incoming, Tensor) or incoming.shape != hidden.shape:
            raise InputError("a block's output has another shape than its input: use --criterion taylor")
        added = hidden.float() - incoming.float()
        return replaced(output, (hidden + gate * added).to(hidden.dtype))

    return run


def _roots(sums: Tensor) -> tuple[list[float], list[float]]:
    """Root mean squares over all groups of parts, and their standard errors, of groups as a sample.

    Args:
        sums: ``(groups, blocks + 1)``, the last column how many parts there are in a group.

    Returns:
        One number a block each; no errors of fewer than two groups.
    """
    squares, counts = sums[:, :-1], sums[:, -1:]
    mean = squares.sum(dim=0) / counts.sum()
    groups = int((counts > 0).sum())
    if groups < 2:
        return mean.sqrt().tolist(), []
    # of a ratio of sums: Cochran 1977, "Sampling Techniques", eq. 6.13
    variance = (squares - mean * counts).square().sum(dim=0) * groups / (groups - 1) / counts.sum().square()
    root = mean.sqrt()
    return root.tolist(), (variance.sqrt() / (2 * root.clamp(min=1e-300))).tolist()
