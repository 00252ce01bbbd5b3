"""Budgets are kept, the best units are picked, and coupled units stay whole."""

import math

import pytest
import torch
import torch_pruning
from hypothesis import given
from hypothesis import strategies as st

from rowscope import Budget, InputError, criterion, scoring, select, trace
from rowscope.models import linear_modules
from rowscope.records import Provenance, ScoreTable
from rowscope.scoring.budget import Share
from rowscope.scoring.groups import channel_scores, scored_members


@pytest.fixture
def table(tiny_llama) -> ScoreTable:
    return scoring.score(tiny_llama, criterion("magnitude"), model_source="tiny", model_fingerprint="f" * 64)


shares = st.lists(
    st.builds(Share, st.just("m"), st.integers(1, 300), st.integers(1, 500), st.integers(2, 1000)),
    min_size=1,
    max_size=9,
)


@given(shares, st.integers(1, 64))
def test_lora_budget_is_kept_and_used(shares, rank):
    """Guards 'equal to a LoRA of rank r': never more, and short by less than the cheapest unit that is left."""
    allowance = rank * sum(share.lora_cost for share in shares)
    try:
        counts = Budget("lora", rank).units(shares)
    except InputError:
        assert all(share.cost > allowance for share in shares)
        return
    spent = sum(count * share.cost for count, share in zip(counts, shares, strict=True))
    remaining = [share.cost for count, share in zip(counts, shares, strict=True) if count < share.units]
    assert all(0 <= count <= share.units for count, share in zip(counts, shares, strict=True))
    assert spent <= allowance
    assert not remaining or allowance - spent < min(remaining)


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


def test_coupled_channels_are_the_best(tiny_llama, table):
    """Guards the choice: no channel left out scores higher than one picked."""
    groups = [group for group in trace(tiny_llama).groups if group.kind == "mlp"]
    selection = select(table, Budget("rank", 7), scope="coupled", groups=groups)
    scores = channel_scores(groups[0], table)
    chosen = selection.indices["model.layers.0.mlp.up_proj"]["row"]
    rest = [channel for channel in range(groups[0].size) if channel not in chosen.tolist()]
    assert scores[chosen].min() >= scores[rest].max()


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_group_scores_equal_torch_pruning(tiny_llama, table, reduction):
    """Guards Torch-Pruning's meaning of a group's magnitude on full feed-forward groups, to 1e-6."""
    group = next(group for group in trace(tiny_llama).groups if group.id == "model.layers.0.mlp")
    tiny_llama.config.use_cache = False
    graph = torch_pruning.DependencyGraph().build_dependency(
        tiny_llama, {"input_ids": torch.arange(3, 8).unsqueeze(0)}, output_transform=lambda out: out.logits
    )
    up = tiny_llama.model.layers[0].mlp.up_proj
    theirs = graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, list(range(group.size)))
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction=reduction, normalizer=None)
    torch.testing.assert_close(channel_scores(group, table, reduction), importance(theirs), rtol=1e-6, atol=1e-6)


def test_grouped_heads_add_up(tiny_llama, table):
    """Guards what Torch-Pruning drops: a key pair's score counts every query row that shares it."""
    group = next(group for group in trace(tiny_llama).groups if group.id == "model.layers.1.self_attn.qk")
    members = {member.module.rsplit(".", 1)[-1]: member for member in scored_members(group, table)}
    assert members["q_proj"].index.shape == (10, 6)
    query = table.scores["model.layers.1.self_attn.q_proj"]["row"].view(2, 3, 2, 5).sum((1, 2)).flatten()
    key = table.scores["model.layers.1.self_attn.k_proj"]["row"].view(2, 2, 5).sum(1).flatten()
    torch.testing.assert_close(channel_scores(group, table, "sum"), query + key)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=0", "trains nothing"),
        ("rank=-3", "trains nothing"),
        ("lora=2.5", "whole number"),
        ("lora", "whole number"),
        ("rnak=3", "did you mean 'rank'"),
    ],
)
def test_bad_budgets(text, message):
    """Guards the one-line answers to a wrong budget."""
    with pytest.raises(InputError, match=message):
        Budget.parse(text)


def test_impossible_selections(tiny_llama, table):
    """Guards against budgets beyond the model, NaN scores and missing axes."""
    with pytest.raises(InputError, match="no module has more than 80"):
        select(table, Budget("rank", 81))
    with pytest.raises(InputError, match="unknown scope 'layers'"):
        select(table, Budget("rank", 1), scope="layers")
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
