"""A group is right when removing its channels equals masking them: the surgery and the masked reference.

Both are driven by nothing but a :class:`rowscope.graph.ModelGraph`. The surgery slices parameters; the reference
leaves all shapes alone and zeroes what the removed channels are read by (of a residual stream: what they are written
by). The two agree only if the group names every port and every index.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rowscope.graph import CouplingGroup, Member, ModelGraph, Port

TOLERANCE = 1e-4
"""Largest difference between the sliced and the masked model, in parts of the output's largest number."""
VISIBLE = 1e-2
"""Smallest effect that the mask must have, in the same unit."""
HEAD_KINDS = ("attention-vo", "attention-qk", "attention-heads")
HEAD_COUNTS = (
    "num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads", "all_head_size",
    "inner_dim", "split_size",
)  # fmt: skip
"""What attention modules and their configurations call numbers that are proportional to the number of heads."""

Removal = dict[str, set[int]]
"""Group -> channels that go."""


@dataclass(frozen=True)
class Finding:
    """What came out of one removal.

    Attributes:
        part: ``feed-forward``, ``heads`` or ``residual``.
        removal: which channels of which groups.
        difference: between the sliced and the masked model, in parts of the output's scale.
        effect: of the mask on the model, in the same unit.
        error: what the sliced or masked model raised.
    """

    part: str
    removal: Removal
    difference: float = math.inf
    effect: float = 0.0
    error: str = ""

    @property
    def exact(self) -> bool:
        """Whether removing equals masking, where masking does something."""
        return self.difference < TOLERANCE and self.effect > VISIBLE

    def __str__(self) -> str:
        numbers = f"difference {self.difference:.1e}, effect {self.effect:.1e}"
        removed = ", ".join(f"{len(channels)} of {group}" for group, channels in self.removal.items())
        return f"{self.part} ({removed}): {self.error or numbers}"


# Which removals are tried


def findings(model: nn.Module, graph: ModelGraph, inputs: dict[str, Tensor]) -> list[Finding]:
    """Try every group of a graph: removing is masking, and attention does not feel a change of signs."""
    original = output(model, inputs)
    removed = [_finding(part, removal, model, graph, inputs, original) for part, removal in removals(graph)]
    flipped = [
        _flip_finding(group, model, inputs, original)
        for group in graph.groups
        if group.kind in ("attention-vo", "attention-qk")
    ]
    return removed + flipped


def removals(graph: ModelGraph) -> Iterator[tuple[str, Removal]]:
    """For every group of the graph, alone or with what must go along, a part of its channels."""
    for experts in _experts(graph):
        count = experts[0].size // 3
        yield "feed-forward", {group.id: _some(group.size, count, seed) for seed, group in enumerate(experts)}
    for group in graph.groups:
        if group.kind not in HEAD_KINDS and not expert_parameters(group):
            yield _part(group), {group.id: _some_of_each_head(group)}
        if group.heads is not None and group.heads > 1:
            together = partners(graph, group)
            if group is together[0]:
                yield _part(group), {partner.id: _head(partner, group.heads // 2) for partner in together}


def _part(group: CouplingGroup) -> str:
    if group.kind in HEAD_KINDS:
        return "heads"
    return "residual" if group.kind == "residual" else "feed-forward"


def _some_of_each_head(group: CouplingGroup) -> set[int]:
    """Four channels of a residual stream, a third of any other group; the same places in each head, if it has any."""
    width = group.size // (group.heads or 1)
    places = _some(width, min(4, width // 2) if group.kind == "residual" else math.ceil(width / 3))
    return {start + place for start in range(0, group.size, width) for place in places}


def _head(group: CouplingGroup, head: int) -> set[int]:
    width = group.size // group.heads
    return set(range(head * width, (head + 1) * width))


def _some(size: int, count: int, seed: int = 0) -> set[int]:
    """`count` channels of `size`, in no order that a wrong index map could share."""
    return set(np.random.default_rng(seed).permutation(size)[:count].tolist())


def expert_parameters(group: CouplingGroup) -> set[str]:
    """Three-dimensional parameters of which the group has one expert's channels."""
    return {member.port.parameter for member in group.members if member.port.expert is not None}


def _experts(graph: ModelGraph) -> list[list[CouplingGroup]]:
    """Groups that share three-dimensional parameters: every expert must lose as many channels."""
    layers: dict[frozenset[str], list[CouplingGroup]] = {}
    for group in graph.groups:
        if parameters := expert_parameters(group):
            layers.setdefault(frozenset(parameters), []).append(group)
    return list(layers.values())


def partners(graph: ModelGraph, group: CouplingGroup) -> list[CouplingGroup]:
    """The group with all its partners and their partners, in the graph's order."""
    reached, waiting = {group.id}, [group]
    while waiting:
        found = [partner for partner in waiting.pop().partners if partner not in reached]
        reached.update(found)
        waiting += map(graph.group, found)
    return [found for found in graph.groups if found.id in reached]


def _finding(
    part: str, removal: Removal, model: nn.Module, graph: ModelGraph, inputs: dict[str, Tensor], original: Tensor
) -> Finding:
    try:
        removed = output(cut(model, graph, removal), inputs)
        reference = output(masked(model, graph, removal), inputs)
        if removed.shape != reference.shape:  # the hidden states are the output
            kept = _kept(reference.shape[-1], next(iter(removal.values())))
            reference, original = reference[..., kept], original[..., kept]
        scale = original.abs().max()
        difference, effect = (float((other - reference).abs().max() / scale) for other in (removed, original))
    except (RuntimeError, IndexError, ValueError) as error:
        return Finding(part, removal, error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Finding(part, removal, difference, effect)


def _flip_finding(group: CouplingGroup, model: nn.Module, inputs: dict[str, Tensor], original: Tensor) -> Finding:
    """Values and output, or queries and keys, change signs together: nothing happens. One of them alone: much does.

    Unlike the removal of a head this tells the channels of a head apart, and it works where there is one head only.
    """
    channels = _some(group.size, math.ceil(group.size / 2))
    scale = original.abs().max()
    together, alone = flipped(model, group, channels), flipped(model, group, channels, 1)
    difference, effect = (float((output(m, inputs) - original).abs().max() / scale) for m in (together, alone))
    return Finding("heads", {group.id: channels}, difference, effect)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        found = model(**inputs)
    if isinstance(found, Tensor):
        return found
    return found.logits if "logits" in found else found.last_hidden_state


# Surgery


def gone(group: CouplingGroup, member: Member, channels: set[int]) -> set[int]:
    """Indices of a member that go with the channels; a shared one only if all channels that list it go."""
    table = member.index.table
    indices = set(table[sorted(channels)].ravel().tolist())
    if member.shared:
        indices -= set(table[_kept(group.size, channels)].ravel().tolist())
    return indices


def _kept(size: int, removed: Iterable[int]) -> list[int]:
    return sorted(set(range(size)) - set(removed))


def _all_gone(graph: ModelGraph, removal: Removal) -> dict[Port, set[int]]:
    ports: dict[Port, set[int]] = {}
    for id_, channels in removal.items():
        group = graph.group(id_)
        for member in group.members:
            ports.setdefault(member.port, set()).update(gone(group, member, channels))
    return {port: indices for port, indices in ports.items() if indices}


def cut(model: nn.Module, graph: ModelGraph, removal: Removal) -> nn.Module:
    """A copy of the model without the channels; ties stay ties."""
    model = copy.deepcopy(model)
    ports = _all_gone(graph, removal)
    groups = {
        layer: _kept_conv_groups(layer, ports.get(Port(f"{name}.weight", 0), set()))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    names = _names(model)
    dimensions: dict[tuple[str, int], dict[int | None, set[int]]] = {}
    for port, indices in ports.items():
        dimensions.setdefault((port.parameter, port.dim), {})[port.expert] = indices
    for (parameter, dim), indices in dimensions.items():
        aliases = next(aliases for aliases in names.values() if parameter in aliases)
        _assign(model, aliases, _sliced(_tensor(model, parameter).detach(), dim, indices))
    for name in {name.rpartition(".")[0] for name, _ in dimensions}:
        _align(model.get_submodule(name), groups)
    _align_heads(model, graph, removal)
    return model


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter and buffer; tied ones have several."""
    names: dict[int, list[str]] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
    return names


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def _assign(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    if isinstance(_tensor(model, names[0]), nn.Parameter):
        tensor = nn.Parameter(tensor)
    for name in names:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, tensor)


def _sliced(tensor: Tensor, dim: int, removed: dict[int | None, set[int]]) -> Tensor:
    """The tensor without indices of `dim`, the same everywhere or others in each expert."""
    if None in removed:
        return tensor.index_select(dim, torch.tensor(_kept(tensor.shape[dim], removed[None])))
    kept = [torch.tensor(_kept(tensor.shape[dim], removed.get(expert, ()))) for expert in range(len(tensor))]
    return torch.stack([expert.index_select(dim - 1, indices) for expert, indices in zip(tensor, kept, strict=True)])


def _kept_conv_groups(layer: nn.Conv2d, rows: set[int]) -> int:
    """Groups of a convolution that keep a row; all must keep as many."""
    kept = np.array(_kept(layer.out_channels, rows)) // (layer.out_channels // layer.groups)
    groups, counts = np.unique(kept, return_counts=True)
    if len(set(counts)) != 1:
        raise ValueError(f"the groups of a convolution keep {sorted(set(counts.tolist()))} rows")
    return len(groups)


def _align(module: nn.Module, conv_groups: dict[nn.Module, int]) -> None:
    """Bring a layer's attributes in line with its new weight."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Conv2d):
        module.groups = conv_groups[module]
        module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(weight, Tensor) and hasattr(module, "hidden_dim"):  # the router of a mixture of experts
        module.hidden_dim = weight.shape[1]


def _align_heads(model: nn.Module, graph: ModelGraph, removal: Removal) -> None:
    """Bring what attention modules know of their heads in line; each gets a configuration of its own."""
    for attention, (before, head) in _attentions(model, graph, removal).items():
        if hasattr(attention, "config"):
            attention.config = copy.deepcopy(attention.config)
        for owner in (attention, getattr(attention, "config", None)):
            counts = {name: getattr(owner, name, None) for name in HEAD_COUNTS}
            for name, count in counts.items():
                if isinstance(count, int):
                    setattr(owner, name, count // before * (before - 1))
        if getattr(model.config, "alibi", False):
            attention.register_forward_pre_hook(_without_head_of_mask(head), with_kwargs=True)
    for module in model.modules():
        if not getattr(module, "has_relative_attention_bias", True):
            module.n_heads = 1  # of T5's cross-attention: zeros of this shape are added in every layer


def _attentions(model: nn.Module, graph: ModelGraph, removal: Removal) -> dict[nn.Module, tuple[int, int]]:
    """Attention modules that lose a head -> how many they had, and which goes."""
    found = {}
    for group in map(graph.group, removal):
        if group.kind in ("attention-vo", "attention-qk"):
            head = min(removal[group.id]) // (group.size // group.heads)
            for member in group.members:
                parts = member.module.split(".")
                owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]
                found |= {owner: (group.heads, head) for owner in owners if "Attention" in type(owner).__name__}
    return found


def _without_head_of_mask(head: int):
    """ALiBi's slopes belong to heads and are no parameters: they come in with the mask, ``(batch, heads, …)``."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]
        kept = _kept(mask.shape[1], {head})
        return args, kwargs | {"attention_mask": mask[:, kept], "alibi": kwargs["alibi"][:, kept]}

    return hook


# The masked reference


class NormOfNonzero(nn.Module):
    """A norm that counts only dimensions that are not zero throughout its input; the others come out as zeros.

    A norm divides by a statistic over all its dimensions, so masked ones would be counted. Which they are is read off
    the input, not off the group: a group with a wrong index for the norm's own weight must not set the reference.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        """``(…, all dimensions)`` to the same shape."""
        kept = hidden.flatten(0, -2).any(0)
        norm = copy.deepcopy(self.norm)
        for name, parameter in self.norm.named_parameters(recurse=False):
            setattr(norm, name, nn.Parameter(parameter[kept]))
        norm.normalized_shape = (int(kept.sum()),)
        normed = torch.zeros_like(hidden)
        normed[..., kept] = norm(hidden[..., kept])
        return normed


def masked(model: nn.Module, graph: ModelGraph, removal: Removal) -> nn.Module:
    """A copy of the model in its full shape, in which the channels are zero where they are read.

    What reads the channels is zeroed. Where norms stand between, as in a residual stream, what writes them is zeroed
    instead, and the norms leave zeros alone; batch norms may stay, as they treat every channel for itself.
    """
    copied = copy.deepcopy(model)
    norms: set[str] = set()
    for group in map(graph.group, removal):
        normed = group.kind == "residual" or any(_is_norm(_owner(model, m)) for m in group.members if not m.shared)
        if normed:
            norms.update(name for name, module in model.named_modules() if _is_norm(module))
        for member in group.members:
            if _reads(model, member) != normed:
                tensor = _tensor(copied, member.port.parameter).data
                _scale(tensor, member.port, gone(group, member, removal[group.id]), 0)
    for name in norms:
        copied.set_submodule(name, NormOfNonzero(copied.get_submodule(name)))
    return copied


def _owner(model: nn.Module, member: Member) -> nn.Module:
    return model.get_submodule(member.port.parameter.rpartition(".")[0])


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not isinstance(module, nn.BatchNorm2d)


def _reads(model: nn.Module, member: Member) -> bool:
    """Whether a member is the input side of a weight; an embedding's columns are what it puts out."""
    return member.axis == "column" and not isinstance(_owner(model, member), nn.Embedding)


def _scale(tensor: Tensor, port: Port, indices: Iterable[int], factor: float) -> None:
    """Multiply indices of a port, in place."""
    part, dim = (tensor, port.dim) if port.expert is None else (tensor[port.expert], port.dim - 1)
    index = torch.tensor(sorted(indices), dtype=torch.long)
    part.index_copy_(dim, index, part.index_select(dim, index) * factor)


def flipped(model: nn.Module, group: CouplingGroup, channels: set[int], columns: int | None = None) -> nn.Module:
    """A copy in which channels have the other sign; with `columns` only the first so many indices of one member.

    Norms on the way pass signs on, so their own weights keep theirs.
    """
    copied = copy.deepcopy(model)
    members = [member for member in group.members if not _is_norm(_owner(model, member))]
    for member in members[: None if columns is None else 1]:
        indices = member.index.table[sorted(channels), :columns].ravel().tolist()
        _scale(_tensor(copied, member.port.parameter).data, member.port, indices, -1)
    return copied


# Invariants


def violations(model: nn.Module, graph: ModelGraph) -> list[str]:
    """What is wrong with a graph before any surgery; empty if it is consistent."""
    found, taken = [], {}
    groups = {group.id: group for group in graph.groups}
    if len(groups) != len(graph.groups):
        found.append("two groups have one id")
    for group in graph.groups:
        found += [f"{group.id}: {problem}" for problem in _group_violations(model, group, groups)]
        for member in group.members:
            if member.shared:
                continue
            for index in set(member.index.table.ravel().tolist()):
                other = taken.setdefault((member.port, index), group.id)
                if other != group.id:
                    found.append(f"{group.id}: {member.port} index {index} is also in {other}")
    return found


def _group_violations(model: nn.Module, group: CouplingGroup, groups: dict[str, CouplingGroup]) -> Iterator[str]:
    taken: dict[tuple[Port, int], int] = {}
    for number, member in enumerate(group.members):
        indices = member.index.table.ravel()
        size = _tensor(model, member.port.parameter).shape[member.port.dim]
        if len(member.index.table) != group.size:
            yield f"{member.port}: {len(member.index.table)} channels, not {group.size}"
        if indices.min() < 0 or indices.max() >= size:
            yield f"{member.port}: indices {indices.min()}..{indices.max()} of a dimension of {size}"
        if not member.shared and len(np.unique(indices)) != len(indices):
            yield f"{member.port}: an index is listed twice"
        if any(taken.setdefault((member.port, index), number) != number for index in indices.tolist()):
            yield f"{member.port}: two members list one index"
    if group.rotary and any(member.index.table.shape[1] % 2 for member in group.members):
        yield "it is rotary, but its channels are no pairs"
    if group.heads is not None and group.size % group.heads:
        yield f"{group.size} channels are not {group.heads} equal heads"
    for partner in group.partners:
        if partner not in groups or group.id not in groups[partner].partners:
            yield f"its partner {partner} does not know it"
        elif groups[partner].heads != group.heads:
            yield f"its partner {partner} has {groups[partner].heads} heads, not {group.heads}"
    parameters = {member.port.parameter for member in group.members}
    tied = {frozenset(names) for names in _names(model).values() if len(names) > 1 and parameters & set(names)}
    if {frozenset(names) for names in group.ties} != tied:
        yield f"its ties are {group.ties}, not {sorted(map(sorted, tied))}"
    reads = {_reads(model, member) for member in group.members}
    if group.kind not in ("attention-qk", "attention-heads") and reads != {True, False}:
        yield "nothing reads it" if reads == {False} else "nothing writes it"


def with_group(graph: ModelGraph, changed: CouplingGroup) -> ModelGraph:
    """The graph with another group of that id."""
    groups = tuple(changed if group.id == changed.id else group for group in graph.groups)
    return replace(graph, groups=groups)
