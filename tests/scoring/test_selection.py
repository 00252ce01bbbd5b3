"""A selection keeps its budget, takes the best, and leaves coupled units whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rowscope import Budget, InputError, Selection, criterion, scoring, select, trace
from rowscope.models import linear_modules
from rowscope.records import Provenance, ScoreTable
from rowscope.scoring.groups import channel_scores
from rowscope.scoring.vectors import weight_matrices


@pytest.fixture
def table(tiny_llama) -> ScoreTable:
    return scoring.score(tiny_llama, criterion("magnitude"), model_source="tiny", model_fingerprint="f" * 64)


def random_table(shapes: dict[str, tuple[int, int]], seed: int = 0) -> ScoreTable:
    """Made-up scores of modules of these shapes."""
    torch.manual_seed(seed)
    scores = {
        name: {"row": torch.rand(rows), "column": torch.rand(columns)} for name, (rows, columns) in shapes.items()
    }
    provenance = Provenance("random", "made up", "f" * 64, [], shapes, dict.fromkeys(shapes, "float32"))
    return ScoreTable(scores, scores, provenance)


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda sizes: {f"m{number}": size for number, size in enumerate(sizes)}
)


def test_rows_are_the_best_of_their_module(table):
    """Guards scope layer: per module the rows of largest score, as many as the rank says."""
    selection = select(table, Budget("rank", 5))
    for module, axes in table.scores.items():
        best = torch.topk(axes["row"], 5).indices.sort().values
        assert torch.equal(selection.indices[module]["row"], best)
    expected = sum(5 * in_features for _, in_features in table.provenance.shapes.values())
    assert selection.trainable_parameters() == expected


def test_lora_budget_equals_lora(table):
    """Guards comparisons with LoRA: as many trainable parameters as rank 4, but for less than one row."""
    lora = 4 * sum(sum(shape) for shape in table.provenance.shapes.values())
    for axis in ("row", "column"):
        trained = select(table, Budget("lora", 4), axis=axis).trainable_parameters()
        assert lora - 48 < trained <= lora


@given(shapes, st.data(), st.sampled_from(["layer", "global"]), st.sampled_from(["top", "sample", "random"]))
def test_no_budget_is_exceeded(shapes, data, scope, pick):
    """Guards every limit under every way to pick: kept, and short by less than the cheapest unit that is left."""
    table = random_table(shapes)
    whole = sum(rows * columns for rows, columns in shapes.values())
    limit = data.draw(st.integers(1, whole))
    axis = data.draw(st.sampled_from(["row", "column", "auto"]))
    kind = data.draw(st.sampled_from(["params", "memory"]))
    budget = Budget(kind, limit if kind == "params" else 16 * limit)
    chosen_axes = {m: axis if axis != "auto" else ("column" if c > r else "row") for m, (r, c) in shapes.items()}
    costs = {m: shapes[m][1 if own == "row" else 0] for m, own in chosen_axes.items()}
    if limit < min(costs.values()):
        with pytest.raises(InputError, match="smaller than one unit"):
            select(table, budget, scope=scope, axis=axis, pick=pick)
        return
    selection = select(table, budget, scope=scope, axis=axis, pick=pick)
    trained = selection.trainable_parameters()
    remaining = []
    for module, own in chosen_axes.items():
        chosen = selection.indices.get(module, {}).get(own, torch.tensor([]))
        if len(chosen) < shapes[module][0 if own == "row" else 1]:
            remaining.append(costs[module])
    assert trained <= limit
    assert not remaining or limit - trained < min(remaining)


def test_global_rank_costs_what_rank_costs(table):
    """Guards scope global with rank and ratio: they are the total that they cost in every module."""
    for budget in (Budget("rank", 5), Budget("ratio", 0.1)):
        local = select(table, budget).trainable_parameters()
        assert local - 48 < select(table, budget, scope="global").trainable_parameters() <= local


def test_global_takes_the_best_of_all():
    """Guards scope global: by default Torch-Pruning's ranking, the score over the mean of its module."""
    table = random_table({"a": (30, 10), "b": (20, 10), "c": (25, 10)})
    selection = select(table, Budget("params", 300), scope="global")
    ranked = sorted(
        ((float(score / axes["row"].mean()), module, row) for module, axes in table.scores.items()
         for row, score in enumerate(axes["row"])), reverse=True,
    )  # fmt: skip
    expected = {(module, row) for _, module, row in ranked[:30]}
    assert {(m, row) for m, axes in selection.indices.items() for row in axes["row"].tolist()} == expected
    raw = select(table, Budget("params", 300), scope="global", normalizer="none")
    ranked = sorted(
        (
            (float(score), module, row)
            for module, axes in table.scores.items()
            for row, score in enumerate(axes["row"])
        ),
        reverse=True,
    )
    expected = {(module, row) for _, module, row in ranked[:30]}
    assert {(m, row) for m, axes in raw.indices.items() for row in axes["row"].tolist()} == expected


def test_coupled_channels_are_whole(tiny_llama, table):
    """Guards scope coupled: gate rows, up rows and down columns are one set; k and q, v and o follow the head map."""
    groups = trace(tiny_llama).groups
    selection = select(table, Budget("lora", 3), scope="coupled", groups=groups)
    lora = 3 * sum(sum(shape) for shape in table.provenance.shapes.values())
    assert lora - 240 < selection.trainable_parameters() <= lora
    by_id = {group.id: group for group in groups}
    for block in ("model.layers.0", "model.layers.1"):
        gate, up = (selection.indices[f"{block}.mlp.{name}_proj"] for name in ("gate", "up"))
        down = selection.indices[f"{block}.mlp.down_proj"]
        assert set(gate) == {"row"}
        assert set(down) == {"column"}
        assert torch.equal(gate["row"], up["row"])
        assert torch.equal(gate["row"], down["column"])
        group = by_id[f"{block}.self_attn.vo"]
        chosen = selection.indices[f"{block}.self_attn.v_proj"]["row"].tolist()
        output = next(member for member in group.members if "o_proj" in member.module)
        columns = sorted(index for channel in chosen for index in group.indices(output, channel))
        assert selection.indices[f"{block}.self_attn.o_proj"]["column"].tolist() == columns


@pytest.mark.parametrize("scope", ["coupled", "coupled-global"])
@pytest.mark.parametrize("pick", ["top", "sample", "diverse", "random"])
def test_heads_are_whole(tiny_llama, table, scope, pick):
    """Guards heads=True: a key/value head is in q, k, v and o entirely, or in none of them; channels fill the rest."""
    selection = select(
        table, Budget.parse("params=20K"), scope=scope, pick=pick, heads=True, groups=trace(tiny_llama).groups,
        vectors=weight_matrices(tiny_llama),
    )  # fmt: skip
    assert 20_000 - 3 * 48 < selection.trainable_parameters() <= 20_000
    for block in ("model.layers.0", "model.layers.1"):
        heads = []
        for name, axis, width in (("q", "row", 30), ("k", "row", 10), ("v", "row", 10), ("o", "column", 30)):
            index = selection.indices.get(f"{block}.self_attn.{name}_proj", {}).get(axis, torch.tensor([]))
            taken = {int(position) // width for position in index}
            assert len(index) == width * len(taken)
            heads.append(taken)
        assert all(taken == heads[0] for taken in heads)


def test_a_fused_weight_collects_all_its_groups():
    """Guards GPT-2: rows of queries and keys and rows of values are rows of one weight, none of them is lost."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=1, n_head=4)).eval()
    table = scoring.score(model, criterion("magnitude"))
    groups = trace(model).groups
    rows = select(table, Budget("rank", 5), scope="coupled", groups=groups).indices["transformer.h.0.attn.c_attn"][
        "row"
    ]
    assert [((rows >= 24 * part) & (rows < 24 * part + 24)).sum() for part in range(3)] == [5, 5, 5]
    whole = select(table, Budget("rank", 2), scope="coupled", heads=True, groups=groups)
    assert len(whole.indices["transformer.h.0.attn.c_attn"]["row"]) == 2 * 3 * 6


def test_coupled_channels_are_the_best(tiny_llama, table):
    """Guards the choice: no channel left out scores higher than one picked."""
    groups = [group for group in trace(tiny_llama).groups if group.kind == "mlp"]
    selection = select(table, Budget("rank", 7), scope="coupled", groups=groups)
    scores = channel_scores(groups[0], table)
    chosen = selection.indices["model.layers.0.mlp.up_proj"]["row"]
    rest = [channel for channel in range(groups[0].size) if channel not in chosen.tolist()]
    assert scores[chosen].min() >= scores[rest].max()


def test_axes_by_module(table):
    """Guards axis: auto takes columns where inputs outnumber outputs; a mapping decides by the end of the name."""
    auto = select(table, Budget("rank", 2), axis="auto")
    axes = {module.rpartition(".")[2]: next(iter(own)) for module, own in auto.indices.items()}
    assert axes == {
        "q_proj": "row", "k_proj": "column", "v_proj": "column", "o_proj": "column",
        "gate_proj": "row", "up_proj": "row", "down_proj": "column",
    }  # fmt: skip
    given = select(table, Budget("rank", 2), axis={"mlp.up_proj": "column", "down_proj": "auto"})
    axes = {module.rpartition(".")[2]: next(iter(own)) for module, own in given.indices.items()}
    assert axes == dict.fromkeys(axes, "row") | {"up_proj": "column", "down_proj": "column"}
    assert given.origin["axis"] == "mlp.up_proj=column,down_proj=auto"
    with pytest.raises(InputError, match="no scored module ends in 'up_prj'"):
        select(table, Budget("rank", 2), axis={"up_prj": "column"})
    with pytest.raises(InputError, match="did you mean 'column'"):
        select(table, Budget("rank", 2), axis={"up_proj": "colum"})


def test_convolutions_cost_their_kernels(tmp_path):
    """Guards the count of trained weights where a row is a filter: when selected, and when read from a file again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (5, 1), groups=4), nn.Flatten(), nn.Linear(9, 3)
    )
    table = scoring.score(model, criterion("magnitude"))
    selection = select(table, Budget("rank", 2))
    trained = 2 * 4 * 9 + 2 * 2 * 5 + 2 * 9
    assert selection.trainable_parameters() == trained
    assert select(table, Budget("rank", 2), axis="column").trainable_parameters() == 2 * 8 * 9 + 2 * 2 * 5 + 2 * 3
    for name in ("s.yaml", "s.safetensors"):
        selection.save(tmp_path / name)
        assert Selection.load(tmp_path / name).trainable_parameters() == trained


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
selections = st.dictionaries(
    names,
    st.tuples(
        st.dictionaries(st.sampled_from(["row", "column"]), st.sets(st.integers(0, 99), min_size=1), min_size=1),
        st.one_of(st.none(), st.integers(1, 10**12)),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("suffix", [".safetensors", ".yaml"])
@given(selections, st.dictionaries(names, names, max_size=3))
def test_selections_round_trip(tmp_path_factory, suffix, chosen, origin):
    """Guards both formats, whatever a module is called ('null', '1e3', 'on'): the same selection comes back."""
    path = tmp_path_factory.mktemp("selection") / f"s{suffix}"
    written = Selection(
        {module: {axis: torch.tensor(sorted(i)) for axis, i in axes.items()} for module, (axes, _) in chosen.items()},
        dict.fromkeys(chosen, (100, 100)),
        "f" * 64,
        origin,
        {module: size for module, (_, size) in chosen.items() if size},
    )
    written.save(path)
    read = Selection.load(path)
    assert list(read.indices) == list(written.indices)
    for module, axes in written.indices.items():
        assert {axis: index.tolist() for axis, index in read.indices[module].items()} == {
            axis: index.tolist() for axis, index in axes.items()
        }
    assert (read.shapes, read.origin, read.sizes) == (written.shapes, written.origin, written.sizes)
    assert (read.model_fingerprint, read.trainable_parameters()) == ("f" * 64, written.trainable_parameters())


def test_what_is_drawn_is_seeded(tiny_llama, table):
    """Guards determinism: the same seed draws the same rows, another one others, and the record says which."""
    for scope in ("layer", "global"):
        for pick in ("sample", "random"):
            first, again, other = (
                select(table, Budget("rank", 5), scope=scope, pick=pick, seed=seed) for seed in (1, 1, 2)
            )
            rows = [[axes["row"].tolist() for axes in s.indices.values()] for s in (first, again, other)]
            assert rows[0] == rows[1] != rows[2]
            assert (first.origin["pick"], first.origin["seed"]) == (pick, "1")


def test_impossible_selections(tiny_llama, table):
    """Guards against budgets beyond the model or below one unit, NaN scores, unknown names and missing axes."""
    with pytest.raises(InputError, match="no module has more than 80"):
        select(table, Budget("rank", 81))
    with pytest.raises(InputError, match="budget params=80M is more than all"):
        select(table, Budget.parse("params=80M"))
    for scope in ("layer", "global"):
        with pytest.raises(InputError, match=r"budget params=47 is smaller than one unit \(48 weights\)"):
            select(table, Budget("params", 47), scope=scope)
    for name in ("scope", "pick", "normalizer", "group_reduction"):
        with pytest.raises(InputError, match=f"unknown {name.replace('_', ' ')} 'xyz'"):
            select(table, Budget("rank", 1), **{name: "xyz"})
    with pytest.raises(InputError, match="--heads needs --scope coupled"):
        select(table, Budget("rank", 1), heads=True)
    with pytest.raises(InputError, match="layer_floor=2"):
        select(table, Budget("rank", 1), layer_floor=2)
    with pytest.raises(InputError, match="layer_cap=nan"):
        select(table, Budget("rank", 1), layer_cap=math.nan)
    with pytest.raises(InputError, match="no coupled groups"):
        select(table, Budget("rank", 1), scope="coupled")
    rows = {module: {"row": axes["row"]} for module, axes in table.scores.items()}
    only_rows = ScoreTable(rows, rows, table.provenance)
    with pytest.raises(InputError, match="no column scores"):
        select(only_rows, Budget("rank", 1), axis="column")
    with pytest.raises(InputError, match="--axis both"):
        select(only_rows, Budget("rank", 1), scope="coupled", groups=trace(tiny_llama).groups)
    table.scores["model.layers.0.mlp.up_proj"]["row"][3] = math.nan
    with pytest.raises(InputError, match="up_proj hold NaN"):
        select(table, Budget("rank", 1))


def test_score_keeps_modules_in_order(tiny_llama, table):
    """Guards tables and reports: modules come in the model's order, whatever order a criterion found them in."""
    assert list(table.scores) == list(linear_modules(tiny_llama))
    assert isinstance(table.provenance, Provenance)
