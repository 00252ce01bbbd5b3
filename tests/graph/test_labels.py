"""Labels: union-find, fields, and what views, joins and sums do to them, against independent computations."""

import networkx
import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from rowscope import trace
from rowscope.graph.labels import Labels, compressed, varying
from rowscope.graph.structure import Port

pairs = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=40)


@given(st.lists(pairs, max_size=4))
def test_classes_are_connected_components(batches):
    """Guards the union-find on arrays, with repeated and chained pairs, against networkx."""
    labels = Labels()
    labels.of_port(Port("w", 0), 30)
    graph = networkx.empty_graph(range(1, 31))
    for batch in batches:
        first, second = (np.array([pair[side] for pair in batch], dtype=np.int32) for side in (0, 1))
        labels.unite(first, second)
        graph.add_edges_from(batch)
    classes = labels.classes()
    for component in networkx.connected_components(graph):
        assert len({int(classes[label]) for label in component}) == 1
    assert len(set(classes[1:].tolist())) == networkx.number_connected_components(graph)


def test_no_label_joins_nothing():
    """Guards label 0: what no weight made is not one channel."""
    labels = Labels()
    ids = labels.new(4)
    labels.unite(np.zeros(4, dtype=np.int32), ids)
    assert len(set(labels.classes().tolist())) == 5


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_compressed_field_says_the_same(shape, data):
    """Guards the memory trick: only what varies is kept, and nothing is lost."""
    along = [size if data.draw(st.booleans()) else 1 for size in shape]
    small = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=int(np.prod(along)), max_size=int(np.prod(along))))
    )
    field = small.view(along).int().expand(shape).contiguous()
    kept = compressed(field)
    assert torch.equal(kept, field)
    changes = {d for d in range(field.ndim) if not torch.equal(field, field.narrow(d, 0, 1).expand(shape))}
    assert varying(kept) == changes


class Pipeline(nn.Module):
    """Two linear layers with views, permutations, joins and slices between them."""

    def __init__(self, steps, size):
        super().__init__()
        self.steps = steps
        self.first = nn.Linear(3, size)
        self.second = nn.Linear(self.between(torch.zeros(1, size)).shape[-1], 2)

    def between(self, x):
        """The steps on ``(1, size)``."""
        for step, number in self.steps:
            size = x.shape[-1]
            if step == "transpose" and size % number == 0:
                x = x.view(1, number, -1).transpose(1, 2).reshape(1, -1)
            elif step == "repeat":
                x = x.view(1, size, 1).expand(1, size, number).reshape(1, -1)
            elif step == "halves" and size % 2 == 0:
                first, second = x.chunk(2, dim=-1)
                x = first * second
            elif step == "slice" and size > number:
                x = x[:, number:]
            elif step == "swap" and size > number:
                x = torch.cat((x[:, number:], x[:, :number]), dim=-1)
            elif step == "roll":
                x = x + x.roll(number, dims=-1)
            elif step == "act":
                x = torch.tanh(x) * number
        return x

    def forward(self, x):
        """`x` is ``(1, 3)``."""
        return self.second(self.between(self.first(x)))


names = st.sampled_from(["transpose", "repeat", "halves", "slice", "swap", "roll", "act"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(names, st.integers(2, 4)), max_size=5), st.sampled_from([8, 12, 24]))
def test_channels_follow_the_derivatives(steps, size):
    """Guards every index map: rows and columns are one channel exactly where derivatives say that they meet.

    One channel that is all there is may be left out: it cannot go.
    """
    torch.manual_seed(0)
    model = Pipeline(steps, size)
    assume(model.second.in_features > 1)  # a dim of one index can lose none
    start = torch.randn(1, size)
    graph = networkx.Graph()
    graph.add_nodes_from(("row", i) for i in range(size))
    for count in range(len(steps) + 1):  # what meets on the way is one channel, even if it is cut off later
        model.steps = steps[:count]
        jacobian = torch.autograd.functional.jacobian(model.between, start)[0, :, 0]
        node = "column" if count == len(steps) else f"after step {count}"
        graph.add_edges_from(((node, j), ("row", i)) for j, i in jacobian.nonzero().tolist())
    components = [{n for n in c if n[0] in ("row", "column")} for c in networkx.connected_components(graph)]
    expected = {frozenset(c) for c in components if any(n[0] == "column" for n in c)}
    found = set()
    for group in trace(model, torch.zeros(1, 3)).groups:
        tables = {m.port.parameter: m.index.table for m in group.members}
        for channel in range(group.size):
            rows = {("row", int(i)) for i in tables["first.weight"][channel]}
            found.add(frozenset(rows | {("column", int(j)) for j in tables["second.weight"][channel]}))
    assert found == expected or (len(expected) == 1 and not found)
