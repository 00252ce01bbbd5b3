"""What removing channels would save, against models that are really built smaller."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rowscope import InputError, trace
from rowscope.graph.savings import parse_removals, savings
from rowscope.graph.statistics import statistics

LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture
def graph(tiny_llama):
    """Of two blocks with 80 feed-forward channels and 2 key/value heads of 10."""
    return trace(tiny_llama)


def smaller(model, **settings):
    """A model of the same configuration with other sizes."""
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config)


def test_parameters_and_work_are_those_of_a_smaller_model(tiny_llama, graph):
    """Guards the arithmetic: fewer feed-forward channels and heads cost what a model built so costs."""
    removals = {f"{layer}.mlp": 30 for layer in LAYERS} | {f"{layer}.self_attn.vo": range(10, 20) for layer in LAYERS}
    found = savings(graph, removals)
    built = smaller(tiny_llama, intermediate_size=50, num_key_value_heads=1, num_attention_heads=3)
    assert found.before.parameters == tiny_llama.num_parameters()
    assert found.after.parameters == built.num_parameters()
    for model, cost in ((tiny_llama, found.before), (built, found.after)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.ones(1, graph.inputs["input_ids"][1], dtype=torch.long))
        counted = counter.get_flop_counts()["Global"]
        assert cost.flops == sum(
            count for name, count in counted.items() if "mm" in str(name) and "bmm" not in str(name)
        )


def test_the_cache_is_that_of_the_heads(graph):
    """Guards keys and values: two heads of ten in both layers, and half of them without one head."""
    found = savings(graph, {f"{LAYERS[0]}.self_attn.vo": range(10)})
    assert (found.before.key_value_elements, found.after.key_value_elements) == (
        2 * 2 * 2 * 10,
        2 * 2 * 2 * 10 - 2 * 10,
    )


def test_partners_go_along(graph):
    """Guards heads: the queries and keys of a head go with its values, pair by pair."""
    found = savings(graph, {f"{LAYERS[0]}.self_attn.vo": range(10, 20)})
    assert found.removed == {
        f"{LAYERS[0]}.self_attn.vo": tuple(range(10, 20)),
        f"{LAYERS[0]}.self_attn.qk": tuple(range(5, 10)),
    }
    assert found.shapes[f"{LAYERS[0]}.self_attn.q_proj.weight"] == (30, 48)


def test_removing_residual_channels_touches_everything(tiny_llama, graph):
    """Guards groups that span the model: a narrower stream is a narrower model."""
    built = smaller(tiny_llama, hidden_size=40)
    assert savings(graph, {"residual": 8}).after.parameters == built.num_parameters()


def test_one_expert_shrinks_alone():
    """Guards 3-D weights: channels of one expert are a slice of one copy."""
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    graph = trace(MixtralForCausalLM(config))
    found = savings(graph, {"model.layers.0.mlp.experts.1": 5})
    assert found.before.parameters - found.after.parameters == 5 * 24 * 3
    assert found.shapes == {
        "model.layers.0.mlp.experts.gate_up_proj.1": (30, 24),
        "model.layers.0.mlp.experts.down_proj.1": (24, 15),
    }


def test_heads_that_share_a_key_cannot_go():
    """Guards latent attention: its rotary key serves all heads, so a dry run without one of them is refused."""
    sizes = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    config = DeepseekV3Config(
        vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, first_k_dense_replace=1, **sizes,
    )  # fmt: skip
    graph = trace(DeepseekV3ForCausalLM(config))
    with pytest.raises(InputError, match=r"no head of model\.layers\.0\.self_attn\.vo can go alone"):
        savings(graph, {"model.layers.0.self_attn.vo": range(6)})


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["model.layers.0.mlp=3"], {"model.layers.0.mlp": 3}),
        (["model.layers.*.mlp=0-2,7"], {f"{layer}.mlp": [0, 1, 2, 7] for layer in LAYERS}),
        (["residual=5-5"], {"residual": [5]}),
    ],
)
def test_removals_are_read(graph, texts, expected):
    """Guards how removals are written: a number of channels, or which; of one group, or of a pattern."""
    assert parse_removals(graph, texts) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.layers.0.mpl=3", "did you mean 'model.layers.0.mlp'"),
        ("model.layers.0.mlp", "write GROUP=CHANNELS"),
        ("model.layers.0.mlp=-3", "write GROUP=CHANNELS"),
        ("model.layers.0.mlp=0-80", "channels 0 to 79"),
        ("model.layers.0.mlp=0-999999999999", "channels 0 to 79"),
        ("model.layers.0.mlp=81", "81 cannot be removed"),
        ("model.layers.0.mlp=80", "would lose all its 80 channels"),
        ("model.layers.0.self_attn.vo=3", "remove whole heads"),
        ("*.mpl=3", "no group is called so"),
    ],
)
def test_impossible_removals(graph, text, message):
    """Guards the one-line answers, before anything is computed."""
    with pytest.raises(InputError, match=message):
        savings(graph, parse_removals(graph, [text]))


def kept_numbers(graph, removed):
    """How many parameters are left, counted in masks of their shapes."""
    masks = {
        name: torch.ones(shape, dtype=torch.bool) for name, shape in graph.shapes.items() if "running" not in name
    }
    for name, channels in removed.items():
        group = graph.group(name)
        for member in (member for member in group.members if member.port.parameter in masks):
            gone = {index for channel in channels for index in group.indices(member, channel)}
            if member.shared:
                staying = set(range(group.size)) - set(channels)
                gone -= {index for channel in staying for index in group.indices(member, channel)}
            mask, dim = masks[member.port.parameter], member.port.dim
            if member.port.expert is not None:
                mask, dim = mask[member.port.expert], dim - 1
            mask.index_fill_(dim, torch.tensor(sorted(gone), dtype=torch.long), False)
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("name", ["Qwen3", "GPT-2", "GPT-NeoX", "Qwen3-MoE", "T5", "CNN, residual", "CNN, flattened"])
def test_numbers_are_those_of_masks(name):
    """Guards every kind of layout (per-head norms, fused and 3-D weights, shared heads): each group by masks alone."""
    architecture = ARCHITECTURES[name]
    graph = trace(architecture.model(), None if architecture.is_transformer else architecture.inputs)
    for group, found in zip(graph.groups, statistics(graph), strict=True):
        total = kept_numbers(graph, {})
        assert found.parameters == total - kept_numbers(graph, {group.id: range(group.size)})
        assert found.parameters_per_channel == total - kept_numbers(graph, {group.id: [0]})
        if group.heads != 1:
            dry = savings(graph, {group.id: group.size // (group.heads or group.size)})
            assert dry.after.parameters == kept_numbers(graph, dry.removed)


def test_each_attention_has_one_cache():
    """Guards heads that many layers share (T5's position bias), and no guess where other rows meet the keys."""
    t5 = savings(trace(ARCHITECTURES["T5"].model()), {})
    assert t5.before.key_value_elements == 6 * 2 * 4 * 12  # self-attention twice on both sides, cross-attention twice
    assert savings(trace(ARCHITECTURES["DeBERTa-v2, classifier"].model()), {}).before.key_value_elements is None
