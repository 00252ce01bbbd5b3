"""From scores to a selection under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..graph import CouplingGroup
from ..records import AxisTensors, LayerScores, Provenance, ScoreTable, Selection
from ..settings import SelectionSettings
from .allocation import allocate, spread
from .budget import Budget, MemoryOf, trained_state
from .competition import best, fill
from .picking import picked, sample, shuffle
from .units import Axis, Family, coupled_families, generator, module_families, shares
from .vectors import WeightMatrix, unit_vectors


def select(
    table: ScoreTable,
    budget: Budget,
    *,
    scope: str = "layer",
    axis: Axis = "row",
    pick: str = "top",
    groups: Sequence[CouplingGroup] = (),
    heads: bool = False,
    group_reduction: str = "mean",
    normalizer: str = "mean",
    layer_scores: LayerScores | None = None,
    layer_floor: float = 0.25,
    layer_cap: float = 4.0,
    vectors: WeightMatrix | None = None,
    memory_of: MemoryOf = trained_state,
    seed: int = 0,
) -> Selection:
    """Pick scored units under a budget.

    Args:
        table: scores of every candidate module.
        budget: see :class:`Budget`.
        scope: ``layer`` picks within each module on its own, ``global`` lets all modules compete; ``coupled`` picks
            whole channels of the groups within one block (feed-forward, value/output, query/key), rows of some weights
            with columns of others, within each group; ``coupled-global`` lets all groups compete.
        axis: ``row``, ``column`` or ``auto`` (columns where a module has more inputs than outputs), or a mapping from
            endings of module names to one of these, rows elsewhere; where channels are coupled the groups decide.
        pick: ``top`` takes the largest scores, ``sample`` draws in proportion to them, ``diverse`` takes large ones
            that point in different directions, ``random`` draws without looking, as a control.
        groups: of the same model, for the coupled scopes.
        heads: with the coupled scopes: attention goes by whole heads, values and outputs with queries and keys.
        group_reduction: ``sum``, ``mean`` or ``max`` over the members of a coupled group.
        normalizer: ``mean``, ``max``, ``sum``, ``standarization`` or ``none``, where families compete.
        layer_scores: divides the budget between layers in proportion to them, see :func:`allocation.allocate`.
        layer_floor: no layer gets less than this share of what it would get without layer scores.
        layer_cap: no layer gets more than this many times what it would get without layer scores.
        vectors: the weights, for ``diverse``; see :func:`rowscope.scoring.vectors.weight_matrices`.
        memory_of: bytes that training so many weights takes, for a budget in bytes.
        seed: of everything drawn.

    Raises:
        InputError: for an unknown name, NaN scores, missing scores, or a budget that does not fit.
    """
    how = SelectionSettings(  # refuses unknown names
        scope=scope,
        axis=axis if isinstance(axis, str) and not scope.startswith("coupled") else None,
        pick=pick,
        layer_floor=layer_floor,
        layer_cap=layer_cap,
        group_reduction=group_reduction,
        normalizer=normalizer,
        heads=heads,
    )
    if pick == "diverse" and vectors is None:
        raise InputError("pick diverse compares weights: give vectors=weight_matrices(model)")
    coupled = scope.startswith("coupled")
    families = coupled_families(table, groups, heads, group_reduction) if coupled else module_families(table, axis)
    priced = shares(families, table.provenance)
    allowances = budget.allowances(priced, memory_of)
    cheapest = min(family.cost for family in families)
    too_small = InputError(f"budget {budget} is smaller than one unit ({cheapest:,} weights): use a larger one")
    if sum(allowances) < cheapest:
        raise too_small
    chosen: dict[int, Tensor] = {}
    for plot in _plots(families, allowances, table.provenance, layer_scores, how):
        if scope.endswith("global"):
            chosen |= _won(families, plot, how, vectors, seed)
        else:
            counts = spread(plot.allowances, [priced[number] for number in plot.members])
            chosen |= _picked(families, dict(zip(plot.members, counts, strict=True)), pick, vectors, seed)
    if not any(len(units) for units in chosen.values()):
        raise too_small
    origin = {"criterion": table.provenance.criterion, "budget": str(budget), "scope": scope}
    origin |= _spelled(how, axis, layer_scores, seed)
    return _selection([(families[number], units) for number, units in chosen.items()], table.provenance, origin)


# ---------------------------------------------------------------------------------------------- how much


@dataclass(frozen=True)
class Plot:
    """Families that share one purse: a layer's, or all of them.

    Attributes:
        members: their numbers.
        allowances: weights that each of them may train, or give to another.
    """

    members: list[int]
    allowances: list[Fraction]


def _plots(
    families: list[Family],
    allowances: list[Fraction],
    provenance: Provenance,
    layer_scores: LayerScores | None,
    how: SelectionSettings,
) -> Iterator[Plot]:
    """One for everything, or one for each layer and one for what is in none, which keeps what it has."""
    if layer_scores is None:
        yield Plot(list(range(len(families))), allowances)
        return
    if "" not in (made := {layer_scores.model_fingerprint, provenance.model_fingerprint}) and len(made) > 1:
        raise InputError("the layer scores are of another model than the scores: score the layers again")
    by_layer: dict[str, list[int]] = {}
    for number, family in enumerate(families):
        by_layer.setdefault(family.layer, []).append(number)
    outside = by_layer.pop("", [])
    missing = [layer for layer in by_layer if layer not in layer_scores.scores]
    if missing or not by_layer:
        raise InputError(f"layer scores: none for {missing[0] if missing else 'any module'}: score the layers again")
    even = [sum((allowances[n] for n in members), Fraction(0)) for members in by_layer.values()]
    capacities = [sum(len(families[n].scores) * families[n].cost for n in members) for members in by_layer.values()]
    scores = [layer_scores.scores[layer] for layer in by_layer]
    granted = allocate(even, scores, capacities, how.layer_floor, how.layer_cap)
    for members, own, grant in zip(by_layer.values(), even, granted, strict=True):
        yield Plot(members, [allowances[n] * grant / own for n in members])
    if outside:
        yield Plot(outside, [allowances[n] for n in outside])


# ---------------------------------------------------------------------------------------------- which


def _picked(
    families: list[Family], counts: dict[int, int], pick: str, vectors: WeightMatrix | None, seed: int
) -> dict[int, Tensor]:
    """So many units of each family."""
    chosen = {}
    for number, count in counts.items():
        family = families[number]
        scores, random = family.exact_scores(), generator(seed, family.name)
        sketch = None
        if vectors is not None and pick == "diverse" and 0 < count < len(scores):
            sketch = unit_vectors(family.members, scores, count, vectors, random)
        chosen[number] = picked(pick, scores, count, random, sketch)
    return chosen


def _won(
    families: list[Family], plot: Plot, how: SelectionSettings, vectors: WeightMatrix | None, seed: int
) -> dict[int, Tensor]:
    """The units of all families that win a competition for the whole purse.

    ``top`` and ``diverse`` decide it by value per cost; ``diverse`` only keeps how many of each family win, as vectors
    of different families cannot be compared. ``sample`` and ``random`` draw from all units together.
    """
    own = [families[number] for number in plot.members]
    values = [family.values(how.normalizer) for family in own]
    costs = np.repeat([family.cost for family in own], [len(part) for part in values]).astype(np.int64)
    joined, purse, random = np.concatenate(values), int(sum(plot.allowances)), generator(seed, own[0].name)
    if how.pick in ("sample", "random"):
        order = shuffle(joined, random) if how.pick == "random" else sample(joined / costs, random)
        taken = fill(order, costs, purse)
    else:
        taken = best(joined, costs, purse)
    parts = np.split(taken, np.cumsum([len(part) for part in values])[:-1])
    if how.pick == "diverse":
        counts = {number: int(part.sum()) for number, part in zip(plot.members, parts, strict=True)}
        return _picked(families, counts, how.pick, vectors, seed)
    return {number: torch.from_numpy(np.flatnonzero(part)) for number, part in zip(plot.members, parts, strict=True)}


# ---------------------------------------------------------------------------------------------- the result


def _selection(chosen: list[tuple[Family, Tensor]], provenance: Provenance, origin: dict[str, str]) -> Selection:
    """Which rows and columns the chosen units are; a fused weight collects those of several families."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for family, units in chosen:
        for member in family.members if len(units) else ():
            found.setdefault(member.module, {}).setdefault(member.axis, []).append(member.index[units].flatten())
    indices: AxisTensors = {
        module: {axis: torch.cat(parts).unique() for axis, parts in found[module].items()}
        for module in provenance.shapes  # in the model's order
        if module in found
    }
    shapes = {module: provenance.shapes[module] for module in indices}
    sizes = {module: size for module, size in provenance.sizes.items() if module in indices}
    return Selection(indices, shapes, provenance.model_fingerprint, origin, sizes)


def _spelled(how: SelectionSettings, axis: Axis, layer_scores: LayerScores | None, seed: int) -> dict[str, str]:
    """What else decided, as far as it did."""
    found = {}
    if how.scope.startswith("coupled"):
        found["group_reduction"] = how.group_reduction
        if how.heads:
            found["heads"] = "whole"
    else:
        found["axis"] = axis if isinstance(axis, str) else ",".join(f"{end}={choice}" for end, choice in axis.items())
    if how.scope.endswith("global"):
        found["normalizer"] = how.normalizer
    if layer_scores is not None:
        found["layer_scores"] = f"{layer_scores.criterion} from {how.layer_floor:g} to {how.layer_cap:g} times even"
    found["pick"] = how.pick
    if how.pick != "top":
        found["seed"] = str(seed)
    return found
