"""Structure: which rows and columns of the weights exist or vanish together."""

from .indices import IndexMap
from .structure import CouplingGroup, Member, ModelGraph, Port, read_groups, write_groups
from .tracing import trace

__all__ = ["CouplingGroup", "IndexMap", "Member", "ModelGraph", "Port", "read_groups", "trace", "write_groups"]
