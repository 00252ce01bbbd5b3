"""The graph of a model as values: ports, members, coupled groups, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx

from ..errors import InputError
from ..records import FORMAT_VERSION, atomic_path, read_json
from .indices import IndexMap


@dataclass(frozen=True)
class Port:
    """One dimension of one parameter, e.g. dim 0 of ``model.layers.0.mlp.up_proj.weight``.

    Attributes:
        parameter: its name; of tied parameters the first name.
        dim: of the parameter itself, also where `expert` is given.
        expert: of a 3-D parameter ``(experts, …, …)`` the one that is meant; None for a whole parameter.
    """

    parameter: str
    dim: int
    expert: int | None = None

    @property
    def module(self) -> str:
        """Name of the module that owns the parameter; an expert is addressed as ``….gate_up_proj.<expert>``."""
        if self.expert is not None:
            return f"{self.parameter}.{self.expert}"
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Member:
    """A port's part in a group.

    Attributes:
        port: the dimension that is coupled.
        axis: ``row`` for output features, ``column`` for input features, whichever dim the layer keeps them in.
        index: the port's indices of each channel.
        shared: whether an index serves several channels (the weight of a per-head norm): it goes when all of them do.
    """

    port: Port
    axis: str
    index: IndexMap
    shared: bool = False

    @property
    def module(self) -> str:
        """Name of the module that owns the parameter."""
        return self.port.module


@dataclass(frozen=True)
class CouplingGroup:
    """Channels that exist or vanish together: channel c is everything in ``indices(member, c)`` over all members.

    Attributes:
        id: unique name, e.g. ``model.layers.0.mlp``.
        kind: ``mlp``, ``attention-vo`` (values and output), ``attention-qk`` (queries and keys), ``attention-heads``
            (what is there once per head, e.g. a position bias), ``residual``, or ``channels`` (anything else).
        size: number of channels.
        members: the coupled ports.
        heads: the channels are this many heads of equal, consecutive parts (attention heads, or the parts into which
            the model's own views cut them). Heads go whole, or each loses as many channels. A head of grouped-query
            attention is a key/value head with all its query heads.
        partners: groups that have heads in common: a head goes in all of them, or in none. Where a partner has
            another number of heads (a rotary key that serves all heads of latent attention), no head can go alone.
        rotary: each channel is a pair of rows that the rotary embedding turns; as its angles serve all heads, a pair
            goes in every head or in none.
        reduced: a norm, or another sum over all channels, reads the group beside its columns: to mask a channel is to
            zero what writes it, and removing it changes the number that means are taken over.
        ties: sets of names under which the model knows one and the same parameter.
    """

    id: str
    kind: str
    size: int
    members: tuple[Member, ...]
    heads: int | None = None
    partners: tuple[str, ...] = ()
    rotary: bool = False
    reduced: bool = False
    ties: tuple[tuple[str, ...], ...] = ()

    def indices(self, member: Member, channel: int) -> tuple[int, ...]:
        """Indices of `member`'s port that belong to `channel`."""
        if not 0 <= channel < self.size:
            raise IndexError(f"group {self.id} has channels 0..{self.size - 1}, not {channel}")
        return tuple(member.index.table[channel].tolist())

    def to_json(self) -> dict[str, Any]:
        """The group as in ``docs/formats.md``."""
        members = []
        for member in self.members:
            entry: dict[str, Any] = {
                "module": member.module,
                "parameter": member.port.parameter,
                "axis": member.axis,
                "dim": member.port.dim,
                "expert": member.port.expert,
                "index": member.index.to_json(),
                "shared": member.shared or None,
            }
            members.append({key: value for key, value in entry.items() if value is not None})
        constraints = {
            "heads": self.heads,
            "partners": list(self.partners) or None,
            "rotary": self.rotary or None,
            "reduced": self.reduced or None,
            "ties": [list(names) for names in self.ties] or None,
        }
        constraints = {key: value for key, value in constraints.items() if value is not None}
        value = {"id": self.id, "kind": self.kind, "size": self.size, "members": members}
        return value | ({"constraints": constraints} if constraints else {})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CouplingGroup:
        """The inverse of :meth:`to_json`."""
        size = value["size"]
        members = tuple(
            Member(
                Port(entry["parameter"], entry["dim"], entry.get("expert")),
                entry["axis"],
                IndexMap.from_json(entry.get("index"), size),
                entry.get("shared", False),
            )
            for entry in value["members"]
        )
        constraints = value.get("constraints", {})
        return cls(
            value["id"],
            value["kind"],
            size,
            members,
            constraints.get("heads"),
            tuple(constraints.get("partners", ())),
            constraints.get("rotary", False),
            constraints.get("reduced", False),
            tuple(tuple(names) for names in constraints.get("ties", ())),
        )


@dataclass(frozen=True)
class ModelGraph:
    """What a trace finds.

    Attributes:
        groups: the coupled groups, in the model's order.
        shapes: of every parameter by name, tied ones once; and of `buffers`.
        buffers: names of what is kept per channel beside parameters, as running statistics are.
        flops: multiplications and additions that the traced forward does with each weight.
        inputs: shapes of the traced example inputs by name.
        blocks: names of the decoder/encoder blocks (or stages), in order.
        unreached: parameters that the traced forward does not use.
        dataflow: directed graph of layers, parameters and operations as Torch-Pruning traced them; each node has
            ``kind`` (``layer``, ``parameter`` or ``operation``) and ``type``.
    """

    groups: tuple[CouplingGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    flops: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()
    dataflow: networkx.DiGraph = field(default_factory=networkx.DiGraph, compare=False)

    def group(self, id: str) -> CouplingGroup:
        """The group of that id. Raises KeyError if there is none."""
        for group in self.groups:
            if group.id == id:
                return group
        raise KeyError(id)


def write_groups(path: Path, model_source: str, groups: Iterable[CouplingGroup]) -> None:
    """Write groups as JSON, atomically, one group at a time."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"format_version": {FORMAT_VERSION}, "model": {json.dumps(model_source)}, "groups": [')
        for number, group in enumerate(groups):
            file.write((",\n" if number else "\n") + json.dumps(group.to_json()))
        file.write("\n]}\n")


def read_groups(path: Path) -> list[CouplingGroup]:
    """Read groups written by :func:`write_groups`. Raises InputError if the file is no such JSON."""
    try:
        return [CouplingGroup.from_json(group) for group in read_json(path)["groups"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no graph ({error} is missing or odd): write it with 'rowscope graph'") from None
