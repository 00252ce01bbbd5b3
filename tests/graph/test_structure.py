"""Index maps and the JSON of groups."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowscope import CouplingGroup, InputError
from rowscope.graph import Member, Port, read_groups, write_groups
from rowscope.graph.structure import compact

tables = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 99), min_size=width, max_size=width), min_size=1, max_size=20)
)
ranges = st.tuples(st.integers(0, 50), st.integers(1, 20), st.integers(1, 5)).map(
    lambda r: [[r[0] + r[2] * channel] for channel in range(r[1])]
)


@given(st.one_of(tables, ranges))
def test_compact_forms_say_the_same(table):
    """Guards the index maps: whichever form is chosen, a channel's indices are those of the table."""
    group = CouplingGroup("g", "mlp", len(table), (Member(Port("m.weight", 0), "row", compact(table)),))
    assert [list(group.indices(group.members[0], channel)) for channel in range(group.size)] == table


@given(ranges)
def test_ranges_stay_ranges(table):
    """Guards the file size: one index per channel at a constant step is never written as a list."""
    index = compact(table)
    assert index is None or isinstance(index, range)


@given(st.one_of(tables, ranges))
def test_json_round_trip(table):
    """Guards the format: what is written is read back equal."""
    group = CouplingGroup(
        "a.b", "attention-vo", len(table), (Member(Port("a.b.weight", 1), "column", compact(table)),)
    )
    assert CouplingGroup.from_json(json.loads(json.dumps(group.to_json()))) == group


def test_file_round_trip_and_bad_files(tmp_path):
    """Guards the stream writer, and one-line refusals of what is no graph."""
    groups = [CouplingGroup(f"g{n}", "mlp", 3, (Member(Port("m.weight", 0), "row"),)) for n in range(2)]
    write_groups(tmp_path / "graph.json", "demo", groups)
    assert read_groups(tmp_path / "graph.json") == groups
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="is no graph"):
        read_groups(tmp_path / "bad.json")


def test_channels_out_of_range_are_an_error():
    """Guards against negative or too large channels wrapping round."""
    group = CouplingGroup("g", "mlp", 3, (Member(Port("m.weight", 0), "row"),))
    for channel in (-1, 3):
        with pytest.raises(IndexError):
            group.indices(group.members[0], channel)
