"""The groups are right when removing one equals masking it; and the traced model is left alone."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from rowscope import InputError, trace
from rowscope.graph import CouplingGroup

TOKENS = torch.arange(3, 15).unsqueeze(0)


def remove(model: nn.Module, removals: list[tuple[CouplingGroup, list[int]]]) -> None:
    """Slice channels of groups out of every parameter of theirs, in place; attention keeps the other heads."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group, channels in removals:
        for member in group.members:
            indices = gone.setdefault((member.port.parameter, member.port.dim), set())
            indices.update(index for channel in channels for index in group.indices(member, channel))
    for (name, dim), indices in gone.items():
        module = model.get_submodule(name.rpartition(".")[0])
        parameter = model.get_parameter(name)
        keep = torch.tensor([index for index in range(parameter.shape[dim]) if index not in indices])
        setattr(module, name.rpartition(".")[2], nn.Parameter(parameter.detach().index_select(dim, keep)))
        if isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
    model.tie_weights()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def groups_of(model: nn.Module) -> dict[str, CouplingGroup]:
    return {group.id: group for group in trace(model).groups}


def assert_removed_equals_masked(removed: nn.Module, masked: nn.Module, original: nn.Module) -> None:
    """Equal to 1e-4 of the output's scale, where the mask itself has an effect far above that."""
    scale = logits(original).abs().max()
    effect = (logits(masked) - logits(original)).abs().max()
    assert effect > 1e-2 * scale, "the mask must be visible, or this test could not fail"
    assert (logits(removed) - logits(masked)).abs().max() < 1e-4 * scale


def test_feed_forward_channels_of_the_demo_model(demo):
    """Guards the promise that removing feed-forward channels of the group equals masking them."""
    group = groups_of(demo.model)["model.layers.3.mlp"]
    channels = list(range(0, group.size, 2))
    removed, masked = copy.deepcopy(demo.model), copy.deepcopy(demo.model)
    remove(removed, [(group, channels)])
    masked.model.layers[3].mlp.down_proj.weight.data[:, channels] = 0
    assert_removed_equals_masked(removed, masked, demo.model)


def test_key_value_head_of_the_demo_model(demo):
    """Guards the promise that value/output and query/key channels of a KV head take all their query heads along."""
    groups = groups_of(demo.model)
    config = demo.model.config
    head_dim, repeat = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    channels = list(range(head_dim))  # KV head 0
    removed, masked = copy.deepcopy(demo.model), copy.deepcopy(demo.model)
    remove(removed, [(groups[f"model.layers.2.self_attn.{kind}"], channels) for kind in ("vo", "qk")])
    masked.model.layers[2].self_attn.o_proj.weight.data[:, : repeat * head_dim] = 0
    assert repeat == 3
    assert_removed_equals_masked(removed, masked, demo.model)


def test_residual_dimensions_of_the_demo_model(demo):
    """Guards the promise that a residual dimension spans all blocks, norms and (tied) embeddings."""
    group = groups_of(demo.model)["residual"]
    channels = [1, 5, 40, 41]
    removed, masked = copy.deepcopy(demo.model), copy.deepcopy(demo.model)
    remove(removed, [(group, channels)])
    masked.model.embed_tokens.weight.data[:, channels] = 0
    for block in masked.model.layers:
        block.self_attn.o_proj.weight.data[channels] = 0
        block.mlp.down_proj.weight.data[channels] = 0
    kept = 1 - len(channels) / group.size
    for module in masked.modules():  # RMSNorm divides by the mean over all dimensions, masked ones included
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data *= kept**0.5
    assert_removed_equals_masked(removed, masked, demo.model)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_heads_at_every_grouping(kv_heads):
    """Guards ratios 6, 3, 2 and 1 (at 2 Torch-Pruning's own groups never end), with head_dim x heads != hidden."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=36, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=kv_heads, head_dim=8, attention_bias=True, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    groups = groups_of(model)
    value_output, query_key = (groups[f"model.layers.1.self_attn.{kind}"] for kind in ("vo", "qk"))
    assert value_output.size == query_key.size == kv_heads * 8
    value, output = (next(m for m in value_output.members if part in m.module) for part in ("v_proj", "o_proj"))
    repeat = 6 // kv_heads
    for channel in (0, value_output.size - 1):
        head, dim = divmod(channel, 8)
        assert value_output.indices(value, channel) == (channel,)
        assert value_output.indices(output, channel) == tuple((head * repeat + r) * 8 + dim for r in range(repeat))
    if kv_heads > 1:
        removed, masked = copy.deepcopy(model), copy.deepcopy(model)
        remove(removed, [(value_output, list(range(8, 16))), (query_key, list(range(8, 16)))])
        masked.model.layers[1].self_attn.o_proj.weight.data[:, repeat * 8 : 2 * repeat * 8] = 0
        assert_removed_equals_masked(removed, masked, model)


SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED | {"head_dim": 10},
    "mistral": GROUPED | {"head_dim": 10},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 10},
    "gemma": GROUPED | {"head_dim": 10},
    "gemma2": GROUPED | {"head_dim": 10},
    "gemma3_text": GROUPED | {"head_dim": 10},
    "phi": GROUPED,
    "phi3": GROUPED,
    "gpt2": {"n_inner": 56},
    "gpt_neox": {},
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 48},
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A tiny random model of each family, biases and norms away from their trivial start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param]))
    for parameter in model.parameters():
        parameter.data += (0.1 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter)
    return model.eval()


def masked_copy(model: nn.Module, group: CouplingGroup, channels: list[int]) -> nn.Module:
    """A copy in which what reads the channels, the columns of the group's last weight, is zero."""
    copied = copy.deepcopy(model)
    for member in group.members:
        if member.axis == "column":
            columns = [index for channel in channels for index in group.indices(member, channel)]
            copied.get_parameter(member.port.parameter).data.index_fill_(member.port.dim, torch.tensor(columns), 0)
    return copied


def test_feed_forward_channels_of_every_family(family):
    """Guards the promise beyond Llama: biases, gates and other names make no difference."""
    for group in trace(family).groups:
        if group.kind == "mlp":
            channels = list(range(0, group.size, 2))
            removed = copy.deepcopy(family)
            remove(removed, [(group, channels)])
            assert_removed_equals_masked(removed, masked_copy(family, group, channels), family)


def test_heads_of_every_family(family):
    """Guards fused, interleaved, scaled, grouped and normalised heads: a removed KV head is a masked one."""
    groups = groups_of(family)
    name = next(id_ for id_ in groups if id_.endswith(".vo")).removesuffix(".vo")
    value_output, query_key = groups[f"{name}.vo"], groups[f"{name}.qk"]
    head_dim = getattr(family.config, "head_dim", None) or 8
    head = list(range(head_dim))
    removed = copy.deepcopy(family)
    remove(removed, [(value_output, head), (query_key, head)])
    attention = removed.get_submodule(name)
    heads = value_output.size // head_dim - 1
    attention.config = copy.deepcopy(attention.config)  # what their own reshaping reads
    for owner in (attention, attention.config):
        for attribute, value in (
            ("num_heads", heads),
            ("num_attention_heads", heads * len(query_key.indices(query_key.members[0], 0))),
            ("num_key_value_heads", heads),
            ("split_size", heads * head_dim),
        ):
            if hasattr(owner, attribute):
                setattr(owner, attribute, value)
    assert_removed_equals_masked(removed, masked_copy(family, value_output, head), family)


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("falcon", {}, "cannot be traced"),
        ("mixtral", GROUPED | {"num_local_experts": 4}, "cannot be traced"),
    ],
)
def test_what_cannot_be_read_is_refused(name, extra, message):
    """Guards against silently wrong groups: what is not supported yet is refused by name and reason."""
    with pytest.raises(InputError, match=message):
        trace(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **extra)))


@pytest.mark.parametrize("tied", [True, False])
def test_every_group_is_complete(tiny_llama, tied):
    """Guards the invariants: indices unique, in range, complete, and every weight of a block in a group."""
    config = copy.deepcopy(tiny_llama.config)
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config)
    groups = trace(model).groups
    assert len({group.id for group in groups}) == len(groups)
    covered = set()
    for group in groups:
        for member in group.members:
            size = model.get_parameter(member.port.parameter).shape[member.port.dim]
            indices = [index for channel in range(group.size) for index in group.indices(member, channel)]
            assert sorted(indices) == list(range(size)), (group.id, member)
            assert (member.port, "once") not in covered
            covered.add((member.port, "once"))
    ports = {port for port, _ in covered}
    for name, parameter in model.named_parameters():
        dims = [dim for dim in range(parameter.ndim) if any(p.parameter == name and p.dim == dim for p in ports)]
        is_vocabulary = name in ("lm_head.weight", "model.embed_tokens.weight")
        assert dims == ([1] if is_vocabulary else list(range(parameter.ndim))), name


def test_head_norms_stay_out(tiny_llama):
    """Guards Qwen3: per-head query and key norms, whose size is one head's, are no part of any group."""
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    members = [member for group in trace(Qwen3ForCausalLM(config)).groups for member in group.members]
    assert not [member.module for member in members if "q_norm" in member.module or "k_norm" in member.module]


def test_the_live_model_is_untouched(tiny_llama):
    """Guards the user's model: frozen flags, mode, attention implementation, forward and weights stay as they were."""
    for parameter in tiny_llama.parameters():
        parameter.requires_grad_(False)
    tiny_llama.train()
    before = logits(tiny_llama)
    implementation = tiny_llama.config._attn_implementation
    assert len(trace(tiny_llama).groups) == 1 + 2 * 3
    assert tiny_llama.training
    assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert tiny_llama.config._attn_implementation == implementation
    assert torch.equal(before, logits(tiny_llama))


def test_unsupported_models_are_refused():
    """Guards against silently wrong groups: a model without language-model logits is refused in one line."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    with pytest.raises(InputError, match="cannot be traced"):
        trace(BertModel(config))
