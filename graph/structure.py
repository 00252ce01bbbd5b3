"""Coupled groups as values: ports, members with index maps, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import FORMAT_VERSION, atomic_path, read_json

IndexMap = range | tuple[tuple[int, ...], ...] | None
"""Channel of the group -> indices of the port: None is the identity, a range one each, a table any number."""


@dataclass(frozen=True, order=True)
class Port:
    """One dimension of one parameter, e.g. dim 0 of ``model.layers.0.mlp.up_proj.weight``."""

    parameter: str
    dim: int


@dataclass(frozen=True)
class Member:
    """A port's part in a group.

    Attributes:
        port: the dimension that is coupled.
        axis: ``row`` for output features, ``column`` for input features, whichever dim the layer keeps them in.
        index: see :data:`IndexMap`.
    """

    port: Port
    axis: str
    index: IndexMap = None

    @property
    def module(self) -> str:
        """Name of the module that owns the parameter."""
        return self.port.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class CouplingGroup:
    """Channels that exist or vanish together: channel c is everything in ``indices(member, c)`` over all members.

    Attributes:
        id: unique name, e.g. ``model.layers.0.mlp``.
        kind: ``mlp``, ``attention-vo``, ``attention-qk``, ``residual``, or ``other``.
        size: number of channels.
        members: the coupled ports; a parameter may appear once per dim.
    """

    id: str
    kind: str
    size: int
    members: tuple[Member, ...]

    def indices(self, member: Member, channel: int) -> tuple[int, ...]:
        """Indices of `member`'s port that belong to `channel`."""
        if not 0 <= channel < self.size:
            raise IndexError(f"group {self.id} has channels 0..{self.size - 1}, not {channel}")
        if member.index is None:
            return (channel,)
        entry = member.index[channel]
        return (entry,) if isinstance(entry, int) else entry

    def to_json(self) -> dict[str, Any]:
        """The group as in ``docs/formats.md``."""
        members = []
        for member in self.members:
            entry: dict[str, Any] = {
                "module": member.module,
                "parameter": member.port.parameter,
                "axis": member.axis,
                "dim": member.port.dim,
            }
            if isinstance(member.index, range):
                entry["index"] = {"start": member.index.start, "stop": member.index.stop, "step": member.index.step}
            elif member.index is not None:
                entry["index"] = [list(indices) for indices in member.index]
            members.append(entry)
        return {"id": self.id, "kind": self.kind, "size": self.size, "members": members}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CouplingGroup:
        """The inverse of :meth:`to_json`."""
        members = []
        for entry in value["members"]:
            index = entry.get("index")
            if isinstance(index, dict):
                index = range(index["start"], index["stop"], index["step"])
            elif index is not None:
                index = tuple(tuple(indices) for indices in index)
            members.append(Member(Port(entry["parameter"], entry["dim"]), entry["axis"], index))
        return cls(value["id"], value["kind"], value["size"], tuple(members))


def compact(table: Sequence[Sequence[int]]) -> IndexMap:
    """The shortest form of an index table: None for the identity, a range where there is one, else the table."""
    if all(len(indices) == 1 for indices in table):
        flat = [indices[0] for indices in table]
        if flat == list(range(len(flat))):
            return None
        step = flat[1] - flat[0] if len(flat) > 1 else 1
        if step != 0 and flat == [flat[0] + step * channel for channel in range(len(flat))]:
            return range(flat[0], flat[0] + step * len(flat), step)
    return tuple(tuple(indices) for indices in table)


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
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no graph ({error} is missing or odd): write it with 'rowscope graph'") from None
