"""Structure: which rows and columns of the weights exist or vanish together."""

from .structure import CouplingGroup, Member, Port, read_groups, write_groups
from .tracing import trace

__all__ = ["CouplingGroup", "Member", "Port", "read_groups", "trace", "write_groups"]
