"""Index maps and the JSON of groups."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowscope import CouplingGroup, InputError
from rowscope.graph import IndexMap, Member, Port, read_groups, write_groups

tables = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 99), min_size=width, max_size=width), min_size=1, max_size=20)
)
ranges = st.tuples(st.integers(0, 50), st.integers(1, 20), st.integers(1, 5)).map(
    lambda r: [[r[0] + r[2] * channel] for channel in range(r[1])]
)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@st.composite
def layouts(draw):
    """What views of weights make: an arange of some shape, its dims permuted and cut into channels and repeats."""
    shape = draw(sizes)
    numbers = np.arange(np.prod(shape)).reshape(shape).transpose(draw(st.permutations(range(len(shape)))))
    cut = draw(st.integers(0, len(shape)))
    return (draw(st.integers(0, 9)) + numbers.reshape(int(np.prod(numbers.shape[:cut])), -1)).tolist()


def group_of(table):
    return CouplingGroup("a.b", "mlp", len(table), (Member(Port("a.b.weight", 1), "column", IndexMap(table)),))


@given(st.one_of(tables, ranges, layouts()))
def test_json_round_trip(table):
    """Guards the format: whichever form an index map takes, what is read back is what was written."""
    group = group_of(table)
    read = CouplingGroup.from_json(json.loads(json.dumps(group.to_json())))
    assert read == group
    assert [list(read.indices(read.members[0], channel)) for channel in range(read.size)] == table


@given(st.one_of(ranges, layouts()))
def test_regular_layouts_stay_small(table):
    """Guards the file size: heads, halves and pairs of a 70B are a few numbers, not a list per channel."""
    assert not isinstance(IndexMap(table).to_json(), list)


def test_constraints_and_experts_round_trip():
    """Guards what a group says beyond its indices."""
    norm = Member(Port("a.norm.weight", 0), "row", IndexMap([[0], [1], [0], [1]]), shared=True)
    expert = Member(Port("a.experts.down_proj", 2, expert=3), "column", IndexMap.identity(4))
    group = CouplingGroup(
        "a.qk", "attention-qk", 4, (norm, expert), 2, ("a.vo",), True, True, (("x.weight", "y.weight"),)
    )
    assert CouplingGroup.from_json(json.loads(json.dumps(group.to_json()))) == group
    assert expert.module == "a.experts.down_proj.3"


def test_file_round_trip_and_bad_files(tmp_path):
    """Guards the stream writer, and one-line refusals of what is no graph."""
    groups = [group_of([[0], [1], [2]]), group_of([[5]])]
    write_groups(tmp_path / "graph.json", "demo", groups)
    assert read_groups(tmp_path / "graph.json") == groups
    for content in (
        "{}",
        '{"groups": [3]}',
        '{"groups": [{"id": "x", "kind": "mlp", "size": "many", "members": [{}]}]}',
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match="is no graph"):
            read_groups(tmp_path / "bad.json")


def test_channels_out_of_range_are_an_error():
    """Guards against negative or too large channels wrapping round."""
    group = group_of([[0], [1], [2]])
    for channel in (-1, 3):
        with pytest.raises(IndexError):
            group.indices(group.members[0], channel)
