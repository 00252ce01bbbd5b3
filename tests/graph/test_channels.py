"""Channels through splits and concatenations, with Torch-Pruning's own index mappings."""

from hypothesis import given
from hypothesis import strategies as st
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, _SplitIndexMapping

from rowscope.graph.channels import Edge, channel_tables


def both_ways(source, target, forward=(), backward=()):
    return [Edge(source, target, forward), Edge(target, source, backward)]


@given(st.integers(1, 6), st.integers(2, 4))
def test_parts_of_a_split_meet_again(size, parts):
    """Guards fused projections: channel i takes index i of every part, however many there are, and nothing else.

    Mappings are defined beyond the width of what they map: taken one-sidedly they would join neighbouring parts.
    """
    edges = []
    for part in range(parts):
        offset = (part * size, (part + 1) * size)
        forward, backward = _SplitIndexMapping(offset), _SplitIndexMapping(offset, reverse=True)
        edges += both_ways("fused", "split") if part == 0 else []
        edges += both_ways("split", "product", (forward,), (backward,))
    edges += both_ways("product", "down")
    (tables,) = channel_tables({"fused": size * parts, "down": size}, edges)
    assert tables["down"] == [[channel] for channel in range(size)]
    assert tables["fused"] == [[part * size + channel for part in range(parts)] for channel in range(size)]


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_a_concatenation_keeps_its_inputs_apart(sizes):
    """Guards concatenated channels: each input's channels are a set of their own, at their offset of the output."""
    edges, start = [], 0
    for number, size in enumerate(sizes):
        offset = (start, start + size)
        forward, backward = _ConcatIndexMapping(offset), _ConcatIndexMapping(offset, reverse=True)
        edges += both_ways(number, "joined", (forward,), (backward,))
        start += size
    found = channel_tables({**dict(enumerate(sizes)), "joined": start}, edges)
    assert len(found) == len(sizes)
    start = 0
    for number, size in enumerate(sizes):
        tables = next(tables for tables in found if number in tables)
        assert tables == {
            number: [[index] for index in range(size)],
            "joined": [[start + index] for index in range(size)],
        }
        start += size
