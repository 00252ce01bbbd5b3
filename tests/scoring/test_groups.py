"""Scores of coupled units: Torch-Pruning's where it is right, and whole where it is not."""

import pytest
import torch
import torch_pruning
from torch import nn

from rowscope import InputError, ScoreTable, criterion, scoring, trace
from rowscope.graph import CouplingGroup
from rowscope.scoring.groups import channel_scores, head_members, normalize, scored_members, with_partners


@pytest.fixture
def table(tiny_llama) -> ScoreTable:
    return scoring.score(tiny_llama, criterion("magnitude"))


def graph_of(model, inputs) -> torch_pruning.DependencyGraph:
    return torch_pruning.DependencyGraph().build_dependency(
        model, inputs, output_transform=lambda out: getattr(out, "logits", out)
    )


def llama_case(tiny_llama):
    tiny_llama.config.use_cache = False
    up = tiny_llama.model.layers[0].mlp.up_proj
    graph = graph_of(tiny_llama, {"input_ids": torch.arange(3, 8).unsqueeze(0)})
    theirs = graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, list(range(80)))
    return tiny_llama, trace(tiny_llama).group("model.layers.0.mlp"), theirs


def mlp_case(_):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    theirs = graph_of(model, torch.randn(2, 7)).get_pruning_group(
        model[0], torch_pruning.prune_linear_out_channels, list(range(12))
    )
    return (
        model,
        next(group for group in trace(model, {"input": torch.randn(2, 7)}).groups if group.size == 12),
        theirs,
    )


def cnn_case(_):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3))
    image = torch.randn(1, 3, 8, 8)
    theirs = graph_of(model, image).get_pruning_group(model[0], torch_pruning.prune_conv_out_channels, list(range(12)))
    return model, next(group for group in trace(model, {"input": image}).groups if group.size == 12), theirs


@pytest.mark.parametrize("case", [llama_case, mlp_case, cnn_case])
@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_channel_scores_equal_torch_pruning(tiny_llama, case):
    """Guards Torch-Pruning's names on full groups: every reduction with every normalizer, to 1e-6."""
    model, group, theirs = case(tiny_llama)
    table = scoring.score(model, criterion("magnitude"))
    for reduction in ("sum", "mean", "max"):
        for normalizer in ("mean", "max", "sum", "standarization", "none"):
            importance = torch_pruning.importance.GroupMagnitudeImportance(
                p=2, group_reduction=reduction, normalizer=None if normalizer == "none" else normalizer
            )
            ours = channel_scores(group, table, reduction, normalizer)
            torch.testing.assert_close(ours, importance(theirs), rtol=1e-6, atol=1e-6)


def test_normalizers_by_hand():
    """Guards the formulas without Torch-Pruning, and that scores which are all 0 stay numbers."""
    scores = torch.tensor([1.0, 2.0, 5.0])
    assert normalize(scores, "mean").tolist() == pytest.approx([3 / 8, 6 / 8, 15 / 8])
    assert normalize(scores, "sum").tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert normalize(scores, "max").tolist() == pytest.approx([1 / 5, 2 / 5, 1])
    assert normalize(scores, "standarization").tolist() == pytest.approx([0, 1 / 4, 1])
    for name in ("mean", "max", "sum", "standarization", "none"):
        assert normalize(torch.zeros(3), name).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="did you mean 'standarization'"):
        normalize(scores, "standardization")


def test_grouped_heads_add_up(tiny_llama, table):
    """Guards what Torch-Pruning drops: a key pair's score counts every query row that shares it."""
    group = trace(tiny_llama).group("model.layers.1.self_attn.qk")
    members = {member.module.rsplit(".", 1)[-1]: member for member in scored_members(group, table)}
    assert members["q_proj"].index.shape == (10, 6)
    query = table.scores["model.layers.1.self_attn.q_proj"]["row"].view(2, 3, 2, 5).sum((1, 2)).flatten()
    key = table.scores["model.layers.1.self_attn.k_proj"]["row"].view(2, 2, 5).sum(1).flatten()
    torch.testing.assert_close(channel_scores(group, table, "sum"), query + key)


def test_a_head_is_all_of_its_rows_and_columns(tiny_llama, table):
    """Guards whole heads: of grouped-query attention a key/value head with all its query heads, in four weights."""
    traced = trace(tiny_llama)
    groups = with_partners(traced.group("model.layers.0.self_attn.vo"), {group.id: group for group in traced.groups})
    members = {member.module.rsplit(".", 1)[-1]: member for member in head_members(groups, table)}
    assert {name: member.axis for name, member in members.items()} == {
        "q_proj": "row", "k_proj": "row", "v_proj": "row", "o_proj": "column",
    }  # fmt: skip
    for name, width in (("q_proj", 30), ("k_proj", 10), ("v_proj", 10), ("o_proj", 30)):
        for head in range(2):
            expected = list(range(head * width, (head + 1) * width))
            assert sorted(members[name].index[head].tolist()) == expected


def test_heads_that_cannot_go_alone_are_refused(table):
    """Guards latent attention: a partner with another number of heads makes whole heads impossible, by name."""
    alone = CouplingGroup("vo", "attention-vo", 4, (), 2, ("qk",))
    serving = CouplingGroup("qk", "attention-qk", 4, (), 1, ("vo",))
    with pytest.raises(InputError, match="heads of vo cannot be taken whole, qk has 1 of 2"):
        head_members(with_partners(alone, {"vo": alone, "qk": serving}), table)
