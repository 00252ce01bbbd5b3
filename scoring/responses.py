"""A zero order that spends its passes where the signal is: what each row does to its own block's output.

A forward pass of the whole model with everything moved says one number about millions of weights. But the score
``Σ_j |w_ij g_ij|`` of a row is, up to chance, ``d_i · Σ_j |w_ij| ‖x_j‖``: Wanda's score, which one forward pass gives
exactly, times the size d_i of the gradient at the row's output. Only d is unknown, one number a row instead of one a
weight, and it is measured block by block: within one forward pass of the model each block is run many times on its
clean input, its rows moved by random signs, and what changes in its output is read at the positions and in the
features that the loss is sensitive to. These sensitivities are measured too, by running what comes after the blocks
again and again. As in direct-taylor a block's output is thus carried straight down the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..ranks import summed, world
from ..records import AxisTensors
from .blocks import Forward, blocks_of, hidden_states, inside, outside, overridden
from .criteria import Measurement, Task
from .head import Head, sensitivity
from .passes import Plan, counted
from .readout import Readout, Sensitivity, by_position, readout, visible
from .sizes import Triple, shrunk_sizes
from .variances import random_signs, row_variances, without_jumps
from .wanda import Squares, norms_added
from .weights import CONVOLUTIONS, Weight


def measure_responses(task: Task, passes: int, epsilon: float) -> Measurement:
    """``s_i = d_i Σ_j |w_ij| ‖x_j‖``, for columns ``s_j = ‖x_j‖ Σ_i |w_ij| d_i``, with d from forward passes alone.

    The estimate of d is shrunk towards its module's mean in proportion to its measured noise: without any signal the
    scores are Wanda's.

    Args:
        task: what to score; its weights must be in blocks.
        passes: forward passes that may be spent, in units of the whole model's.
        epsilon: size of a response, relative to the hidden states; raised where the dtype needs more.

    Raises:
        InputError: if the model has no blocks, a weight is in none or a block itself, a block does not give the same
            output twice, or the passes do not suffice.
    """
    blocks = blocks_of(task.model, "zo-taylor")
    if lost := outside(task.weights, blocks):
        raise InputError(f"zo-taylor measures blocks only, {lost[0]} is in none: use zo-taylor:estimator=spsa")
    if alone := [name for name in task.weights if name in blocks]:
        raise InputError(f"zo-taylor moves layers within blocks, {alone[0]} is one: use zo-taylor:estimator=spsa")
    with torch.inference_mode():
        with counted(task.model, blocks) as costs:
            task.loss(0)
        plan = costs.plan(passes, len(task.batches), _largest(task.weights, blocks))
        generator = torch.Generator().manual_seed(task.seed)
        squares: tuple[Squares, Squares] = ({}, {})
        totals: dict[str, Triple] = {}
        for number in range(plan.batches + plan.others):
            batch = _Batch.of(task, blocks, number, plan, generator)
            with norms_added(task.weights, batch.importance, squares[number % 2]):
                task.loss(number)
            if number < plan.batches:
                _add(totals, batch.row_variances(plan.probes, epsilon))
    with torch.no_grad():  # what is made in inference mode stays there
        return _measurement(task, squares, {name: _cloned(triple) for name, triple in totals.items()}, plan)


def _add(totals: dict[str, Triple], found: Mapping[str, Triple]) -> None:
    for name, triple in found.items():
        old = totals.get(name)
        totals[name] = tuple(map(torch.add, old, triple)) if old else triple  # type: ignore[assignment]


def _cloned(triple: Triple) -> Triple:
    return tuple(values.clone() for values in triple)  # type: ignore[return-value]


def _largest(weights: Mapping[str, Weight], blocks: Mapping[str, nn.Module]) -> int:
    """Most scored weights in one block."""
    return max(len(inside(weights, block)) for block in blocks)


# ---------------------------------------------------------------------------------------------- probing


@dataclass(frozen=True)
class _Batch:
    """A batch on which blocks are probed.

    Attributes:
        task: the model and its weights.
        blocks: by name.
        number: of the batch.
        sensitive: of the loss to the last hidden states; None where that is not known.
        generator: of the signs.
    """

    task: Task
    blocks: Mapping[str, nn.Module]
    number: int
    sensitive: Sensitivity | None
    generator: torch.Generator

    @classmethod
    def of(
        cls, task: Task, blocks: Mapping[str, nn.Module], number: int, plan: Plan, generator: torch.Generator
    ) -> _Batch:
        """Find out where the loss is sensitive; in which features only for batches that will be probed."""
        head = Head.of(task, number, list(blocks.values())) if plan.feature_probes else None
        feature_probes = plan.feature_probes if number < plan.batches else 0
        sensitive = sensitivity(head, feature_probes, generator) if head is not None else None
        return cls(task, blocks, number, sensitive, generator)

    @property
    def importance(self) -> Tensor | None:
        """How much each token counts, ``(examples, tokens)``; the batch's mask where no more is known."""
        if self.sensitive is not None:
            return self.sensitive.positions
        return self.task.batches[self.number].get("attention_mask")

    def row_variances(self, probes: int, epsilon: float) -> dict[str, Triple]:
        """Mean squared effect of each row on what is read off its block, in one forward pass.

        Of a block that runs more than once in it, the sum over its runs.
        """
        found: dict[str, Triple] = {}
        names: dict[nn.Module, str] = {}
        for name, module in self.blocks.items():
            names.setdefault(module, name)  # a module in several places has its weights under its first name
        quiet = None if world()[0] == 0 else True
        progress = tqdm(total=len(self.blocks), desc=f"zo-taylor, batch {self.number}", disable=quiet, delay=2)

        def wrap(module: nn.Module, forward: Forward) -> Forward:
            weights = [self.task.weights[name] for name in inside(self.task.weights, names[module])]

            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                clean = hidden_states(output).clone()  # a block may write to what it was given, and hand that on
                read = readout(self._fitting(clean), probes, self.generator)
                probed = _Block(lambda: hidden_states(forward(*args, **kwargs)), clean, read, weights, self.generator)
                _add(found, probed.variances(probes, epsilon))
                progress.update()
                return output

            return run

        with progress, overridden(self.blocks.values(), wrap):
            self.task.loss(self.number)
        return found

    def _fitting(self, hidden: Tensor) -> Sensitivity:
        """The head's sensitivity where it has the block's shape; else all features alike, and what is not padding."""
        flat = by_position(hidden)
        if self.sensitive is not None and self.sensitive.fits(flat):
            return Sensitivity(self.sensitive.positions.to(flat), self.sensitive.features.to(flat))
        importance = self.importance
        if importance is None or importance.numel() != len(flat):
            importance = torch.ones_like(flat[:, 0])
        return Sensitivity(importance.to(flat), torch.ones_like(flat[0]))


@dataclass
class _Block:
    """A block that is run again and again on its clean input, its rows moved.

    Attributes:
        run: the block's output, as it then is.
        clean: the same with nothing moved.
        read: see :class:`Readout`.
        weights: the scored ones in the block.
        generator: of the signs.
    """

    run: Any
    clean: Tensor
    read: Readout
    weights: Sequence[Weight]
    generator: torch.Generator

    def variances(self, probes: int, epsilon: float) -> dict[str, Triple]:
        """Each row's mean squared reading per unit of movement; even and odd probes make the halves."""
        if not self.weights:
            return {}
        sizes = [weight.out_features for weight in self.weights]
        device = self.clean.device
        with ExitStack() as stack:
            moved = _Moved(self.weights, self.generator)
            for weight in self.weights:
                stack.callback(weight.module.register_forward_hook(moved.hook(weight)).remove)
            sizes_of_steps = self._steps(moved, epsilon)
            patterns = random_signs((probes, sum(sizes)), self.generator, torch.int8).to(device)
            rank, ranks = world()
            # Each reading is one of thousands that are squared and added up: eight bits of it are enough.
            readings = torch.zeros(probes, self.read(self.clean).numel(), device=device, dtype=torch.bfloat16)
            for probe in range(rank, probes, ranks):
                moved.by = {
                    weight: signs * step
                    for weight, signs, step in zip(
                        self.weights, patterns[probe].split(sizes), sizes_of_steps, strict=True
                    )
                }
                readings[probe] = self._reading()
        readings = without_jumps(summed(readings), len(self.read.positions))
        estimates = [row_variances(patterns[part], readings[part]) for part in (slice(None), *_HALVES)]
        return {
            weight.name: tuple(part / step**2 for part in parts)
            for weight, step, *parts in zip(
                self.weights, sizes_of_steps, *(estimate.split(sizes) for estimate in estimates), strict=True
            )
        }

    def _reading(self) -> Tensor:
        assert torch.is_inference_mode_enabled()  # forward passes only: no graph can exist
        return self.read(self.run() - self.clean)

    def _steps(self, moved: _Moved, epsilon: float) -> list[float]:
        """How far each weight's rows are moved: all rows alike in effect, which in sum is `epsilon` of the output."""
        epsilon = visible(epsilon, self.clean)
        wanted = epsilon**2 * float(self.read(self.clean).square().sum())
        if float(self._reading().square().sum()) > wanted:
            raise InputError("zo-taylor: a block gives two outputs for one input: use zo-taylor:estimator=spsa")
        rows = sum(weight.out_features for weight in self.weights)
        steps = []
        for weight in self.weights:
            scale = moved.scale(weight)
            step = epsilon * scale
            moved.by = {weight: random_signs((weight.out_features,), self.generator).to(self.clean.device) * step}
            effect = float(self._reading().square().sum())
            if effect and wanted:  # where next to nothing comes through, no further than the layer's own outputs
                step = min(scale, step * math.sqrt(wanted * weight.out_features / rows / effect))
            steps.append(step)
        return steps


_HALVES = (slice(0, None, 2), slice(1, None, 2))


class _Moved:
    """Adds ``by · c`` to the outputs of layers: by a number for each row, c a fixed random sign for each position.

    With random signs over positions, the effect's mean square is the squared size of the gradient at the row's
    output, whatever the row's own activation is. A weight's signs come from a seed of its own: they are the same
    however many positions reach the layer (an expert's change from run to run), and whichever rank runs it first.
    """

    def __init__(self, weights: Sequence[Weight], generator: torch.Generator) -> None:
        self.by: dict[Weight, Tensor] = {}
        seeds = torch.randint(2**31, (len(weights),), generator=generator).tolist()
        self._seeds = dict(zip(weights, seeds, strict=True))
        self._signs: dict[Weight, Tensor] = {}
        self._scales: dict[Weight, float] = {}

    def hook(self, weight: Weight) -> Any:
        """A forward hook for the weight's layer."""
        sizes = weight.module.kernel_size if isinstance(weight.module, CONVOLUTIONS) else ()
        behind = [1 for _ in sizes]  # the positions of a convolution come after its channels

        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if weight not in self._scales:
                self._scales[weight] = float(output.float().square().mean().sqrt())
            if weight not in self.by:
                return None
            rows = self.by[weight].to(output.device).reshape(-1, *behind)
            return output + (rows * self._carrier(weight, output, -1 - len(behind))).to(output.dtype)

        return add

    def _carrier(self, weight: Weight, output: Tensor, channel: int) -> Tensor:
        shape = list(output.shape)
        shape[channel] = 1
        count = math.prod(shape)
        if weight not in self._signs or len(self._signs[weight]) < count:
            own = torch.Generator().manual_seed(self._seeds[weight])
            self._signs[weight] = random_signs((count,), own).to(output.device)
        return self._signs[weight][:count].view(shape)

    def scale(self, weight: Weight) -> float:
        """Root mean square of the layer's output in the first run, 1 if it was zero or the layer did not run."""
        return self._scales.get(weight, 0.0) or 1.0


# ---------------------------------------------------------------------------------------------- scores


def _measurement(
    task: Task, squares: tuple[Squares, Squares], variances: dict[str, Triple], plan: Plan
) -> Measurement:
    first, second = squares
    every = {**first, **{name: first[name] + found if name in first else found for name, found in second.items()}}
    sizes, signal_to_noise = shrunk_sizes(variances)
    scores: AxisTensors = {}
    halves: tuple[AxisTensors, AxisTensors] = ({}, {})
    noise: AxisTensors = {}
    for name, weight in task.weights.items():
        if name not in sizes or name not in every:  # no token came through its layer
            zeros = {"row": torch.zeros(weight.out_features), "column": torch.zeros(weight.in_features)}
            scores[name] = halves[0][name] = halves[1][name] = noise[name] = zeros
            continue
        for table, norms, size in zip((scores, *halves), (every, *squares), sizes[name], strict=True):
            table[name] = _score(weight, norms.get(name, every[name]).sqrt(), size)
        alike = torch.full_like(sizes[name][0], float(sizes[name][0].mean()))
        noise[name] = _score(weight, every[name].sqrt(), alike)
    return Measurement(scores, halves, noise, forward_passes=plan.spent, signal_to_noise=signal_to_noise)


def _score(weight: Weight, norms: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    return weight.reduce(weight.values().abs() * weight.by_column(norms) * weight.by_row(sizes))
