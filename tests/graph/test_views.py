"""Graphs for networkx, folded blocks, and statistics of groups."""

import networkx
import numpy as np
import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from rowscope import trace
from rowscope.graph import CouplingGroup, IndexMap, Member, ModelGraph, Port
from rowscope.graph.statistics import statistics
from rowscope.graph.views import condensed, folded, port_graph, ranges, write_graphml


@pytest.fixture
def graph(tiny_llama):
    """Of two identical blocks."""
    return trace(tiny_llama)


def test_ports_are_joined_as_in_the_groups(graph):
    """Guards the port view: its connected components are the groups, also in a model whose heads are apart."""
    view = port_graph(graph)
    components = {frozenset(component) for component in networkx.connected_components(view)}
    expected = {
        frozenset(f"{member.port.parameter}:{member.port.dim}" for member in group.members) for group in graph.groups
    }
    assert components == expected
    assert view.nodes["model.layers.0.mlp.up_proj.weight:0"]["size"] == 80
    assert view.number_of_edges() == sum(len(group.members) - 1 for group in graph.groups)


def test_groups_are_joined_by_weights(graph):
    """Guards the condensed view: a star round the residual stream, every arrow named by its weights."""
    view = condensed(graph)
    assert set(view) == {group.id for group in graph.groups}
    assert view.edges["residual", "model.layers.1.mlp"]["parameters"] == [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert view.edges["model.layers.1.mlp", "residual"]["parameters"] == ["model.layers.1.mlp.down_proj.weight"]
    assert set(view["model.layers.0.self_attn.vo"]) == {"residual"}


def test_dataflow_names_layers(graph):
    """Guards the dataflow view: layers by name, in the direction of the computation."""
    view = graph.dataflow
    assert view.nodes["model.layers.0.mlp.up_proj"] == {"kind": "layer", "type": "Linear"}
    assert networkx.has_path(view, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert not networkx.has_path(view, "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("view", [condensed, port_graph, lambda graph: graph.dataflow])
def test_graphml_is_read_back(graph, tmp_path, view):
    """Guards the file: networkx reads the same nodes and edges, attributes as plain values."""
    write_graphml(tmp_path / "graph.graphml", view(graph))
    read = networkx.read_graphml(tmp_path / "graph.graphml")
    assert set(read.edges) == {tuple(map(str, edge)) for edge in view(graph).edges} or not read.is_directed()
    assert set(read) == set(map(str, view(graph)))


def test_statistics_count_what_hangs_on_a_group(tiny_llama, graph):
    """Guards the numbers: feed-forward channels hang on three weights, each block reads and writes the stream."""
    found = {entry.id: entry for entry in statistics(graph)}
    mlp = found["model.layers.0.mlp"]
    assert (mlp.parameters, mlp.parameters_per_channel) == (3 * 80 * 48, 3 * 48)
    assert mlp.share == mlp.parameters / tiny_llama.num_parameters()
    stream = found["residual"]
    assert "model.layers.1.mlp.down_proj" in stream.writers
    assert {"model.layers.0.mlp.gate_proj", "lm_head"} <= set(stream.readers)
    assert "model.embed_tokens" in stream.writers


def test_identical_blocks_are_said_once(graph):
    """Guards the table: what is outside of blocks, then both blocks as one, their groups by relative names."""
    outside, block = folded(graph)
    assert (outside.name, [line.name for line in outside.groups]) == ("", ["residual"])
    assert (block.name, block.blocks) == ("model.layers.0-1", ("model.layers.0", "model.layers.1"))
    assert [line.name for line in block.groups] == ["self_attn.qk", "self_attn.vo", "mlp"]


def test_identical_experts_are_said_once():
    """Guards the table of a mixture of experts: one line for all of a block."""
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    block = folded(trace(MixtralForCausalLM(config)))[1]
    assert [(line.name, line.times) for line in block.groups][-1] == ("mlp.experts.0-2", 3)


def test_other_blocks_stay_apart():
    """Guards against folding what differs: two blocks alike but for one size."""

    def group(block, size):
        ports = (Port(f"{block}.up.weight", 0), "row"), (Port(f"{block}.down.weight", 1), "column")
        members = tuple(Member(port, axis, IndexMap.identity(size)) for port, axis in ports)
        return CouplingGroup(f"{block}.mlp", "mlp", size, members)

    groups = (group("h.0", 4), group("h.1", 5), group("h.2", 4))
    shapes = {m.port.parameter: (g.size, g.size) for g in groups for m in g.members}
    found = folded(ModelGraph(groups, shapes, blocks=("h.0", "h.1", "h.2")))
    assert [block.name for block in found] == ["h.0,2", "h.1"]


def test_ranges_of_names():
    """Guards the short form: numbers in runs, anything else as a list."""
    assert ranges(["a.0.b", "a.1.b", "a.2.b", "a.5.b"]) == "a.0-2,5.b"
    assert ranges(["a.x", "b.x"]) == "a.x, b.x"
    assert ranges([f"h.{number}" for number in np.arange(12)]) == "h.0-11"
