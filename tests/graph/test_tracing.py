"""From any model to its graph: live, frozen, quantised, offloaded, or only a configuration; and refusals."""

import copy
import dataclasses
import threading
import time
import warnings

import peft
import pytest
import torch
import torch_pruning
from accelerate import cpu_offload
from torch import nn
from torch_pruning.dependency import index_mapping
from transformers import (
    AutoConfig,
    AutoModel,
    DeepseekV3ForCausalLM,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
)

from rowscope import InputError, trace
from rowscope.graph.backend import dependency_graph, disagreement
from rowscope.graph.skeleton import blocks, made_up, skeleton

TOKENS = torch.arange(3, 15).unsqueeze(0)


def tiny(architecture, **settings):
    """A random model whose sizes differ, from its class."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2}
    return architecture(
        architecture.config_class(**{**sizes, "num_attention_heads": 6, "pad_token_id": 0, **settings})
    )


# Groups as they should be


@pytest.mark.parametrize("tied", [True, False])
def test_every_group_is_complete(tiny_llama, tied):
    """Guards completeness: every index of every weight of a block is in exactly one channel of one group."""
    config = copy.deepcopy(tiny_llama.config)
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config)
    graph = trace(model)
    assert graph.unreached == ()
    seen = set()
    for group in graph.groups:
        for member in group.members:
            size = model.get_parameter(member.port.parameter).shape[member.port.dim]
            assert sorted(member.index.table.ravel().tolist()) == list(range(size)), (group.id, member)
            assert member.port not in seen
            seen.add(member.port)
    for name, parameter in model.named_parameters():
        dims = [dim for dim in range(parameter.ndim) if any(p.parameter == name and p.dim == dim for p in seen)]
        is_vocabulary = name in ("lm_head.weight", "model.embed_tokens.weight")
        assert dims == ([1] if is_vocabulary else list(range(parameter.ndim))), name
    ties = (("model.embed_tokens.weight", "lm_head.weight"),) if tied else ()
    assert graph.group("residual").ties == ties


def test_grouped_heads_and_rotary_pairs(tiny_llama):
    """Guards the index maps: a key/value head with its three query heads, rotary pairs half a head apart."""
    graph = trace(tiny_llama)
    value, query = (graph.group(f"model.layers.1.self_attn.{kind}") for kind in ("vo", "qk"))
    assert (value.size, value.heads, value.partners, value.rotary) == (20, 2, (query.id,), False)
    assert (query.size, query.heads, query.partners, query.rotary) == (10, 2, (value.id,), True)
    indices = {
        member.module.rsplit(".", 1)[-1]: [group.indices(member, channel) for channel in (0, group.size - 1)]
        for group in (value, query)
        for member in group.members
    }
    assert indices["v_proj"] == [(0,), (19,)]
    assert indices["o_proj"] == [(0, 10, 20), (39, 49, 59)]
    assert indices["k_proj"] == [(0, 5), (14, 19)]
    assert indices["q_proj"] == [(0, 5, 10, 15, 20, 25), (34, 39, 44, 49, 54, 59)]


def test_per_head_norms_serve_all_heads():
    """Guards Qwen3: a norm of one head's size is shared, each of its weights goes when all its channels go."""
    model = tiny(Qwen3ForCausalLM, num_key_value_heads=2, head_dim=10)
    group = trace(model).group("model.layers.0.self_attn.qk")
    norms = [member for member in group.members if member.shared]
    assert [member.module.rsplit(".", 1)[-1] for member in norms] == ["q_norm", "k_norm"]
    for member in norms:
        assert member.index.table.tolist() == [[pair, pair + 5] for pair in [*range(5), *range(5)]]


def test_experts_are_addressed_one_by_one():
    """Guards mixtures of experts: one group per expert of a 3-D weight, halves of gate and up together."""
    graph = trace(tiny(MixtralForCausalLM, num_key_value_heads=2, num_local_experts=3))
    group = graph.group("model.layers.1.mlp.experts.2")
    assert (group.kind, group.size) == ("mlp", 56)
    up, down = group.members
    assert (up.module, up.port.dim, up.axis) == ("model.layers.1.mlp.experts.gate_up_proj.2", 1, "row")
    assert (down.module, down.port.dim, down.axis) == ("model.layers.1.mlp.experts.down_proj.2", 2, "column")
    assert group.indices(up, 5) == (5, 56 + 5)
    assert not any(
        member.module.endswith("gate") and member.axis == "row" for g in graph.groups for member in g.members
    )


def test_a_shared_position_bias_joins_heads_across_layers():
    """Guards T5: the bias has a column per head and is added in every layer of a stack, so the heads are the same."""
    model = tiny(T5ForConditionalGeneration, d_model=48, d_kv=10, d_ff=56, num_layers=2, num_heads=6)
    graph = trace(model)
    bias = graph.group("encoder.block.0.layer.0.SelfAttention.heads")
    assert (bias.kind, bias.size, bias.heads) == ("attention-heads", 6, 6)
    assert {f"encoder.block.{n}.layer.0.SelfAttention.{kind}" for n in (0, 1) for kind in ("vo", "qk")} == set(
        bias.partners
    )
    crossed = graph.group("decoder.block.0.layer.1.EncDecAttention.vo")
    assert crossed.partners == ("decoder.block.0.layer.1.EncDecAttention.qk",)


def test_what_each_head_has_once_goes_with_it():
    """Guards attention sinks: one number per head, a partner of its values and its scores."""
    graph = trace(tiny(GptOssForCausalLM, num_key_value_heads=2, head_dim=10, num_local_experts=4))
    sinks = graph.group("model.layers.0.self_attn.heads")
    assert sinks.members[0].port.parameter == "model.layers.0.self_attn.sinks"
    assert (sinks.size, sinks.heads) == (2, 2)
    assert sinks.members[0].index.table.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_key_for_all_heads_keeps_them_together():
    """Guards latent attention: its rotary key serves all heads, so no head has partners of as many heads."""
    sizes = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    graph = trace(tiny(DeepseekV3ForCausalLM, num_key_value_heads=6, first_k_dense_replace=2, **sizes))
    value, rotary = (graph.group(f"model.layers.0.self_attn.{name}") for name in ("vo", "qk.1"))
    assert (value.heads, value.size, rotary.heads, rotary.rotary) == (6, 36, 1, True)
    assert rotary.id in value.partners


def test_flops_are_those_of_the_forward(tiny_llama):
    """Guards the counted work: a multiplication and an addition per weight and token."""
    graph = trace(tiny_llama)
    tokens = graph.inputs["input_ids"][1]
    weights = {name: shape for name, shape in graph.shapes.items() if len(shape) == 2 and "embed" not in name}
    assert graph.flops == {name: 2 * tokens * shape[0] * shape[1] for name, shape in weights.items()}


# Any model


def test_the_live_model_is_untouched(tiny_llama):
    """Guards the user's model: frozen flags, mode, configuration, attributes and weights stay as they were."""
    tiny_llama.requires_grad_(False).train()
    tiny_llama.config._attn_implementation = "sdpa"
    before = tiny_llama(TOKENS).logits
    attributes = {name: set(vars(module)) for name, module in tiny_llama.named_modules()}
    assert len(trace(tiny_llama).groups) == 1 + 2 * 3
    assert all(module.training for module in tiny_llama.modules())
    assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert tiny_llama.config._attn_implementation == "sdpa"
    assert attributes == {name: set(vars(module)) for name, module in tiny_llama.named_modules()}
    assert torch.equal(before, tiny_llama(TOKENS).logits)


def test_hooks_inputs_and_computed_weights_are_untouched():
    """Guards what hangs on a model: hooks do not run, ids are not written to, a spectral norm takes no step."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4))
    before, seen = model[0].parametrizations.weight[0]._u.clone(), []
    model[2].register_forward_hook(lambda module, args, out: seen.append(float(out.sum())))
    with pytest.raises(InputError, match="vdot"):
        trace(model, torch.zeros(2, 6))
    assert torch.equal(before, model[0].parametrizations.weight[0]._u)
    assert trace(model[1:], torch.zeros(2, 8)).groups == ()
    assert seen == []
    ids = torch.tensor([[1, 50, 3]])
    trace(nn.Sequential(Clamp(), nn.Embedding(9, 8), nn.Linear(8, 4)), ids)
    assert ids.tolist() == [[1, 50, 3]]


class Clamp(nn.Module):
    """Writes to its input."""

    def forward(self, ids):
        """`ids` is ``(batch, tokens)``."""
        return ids.clamp_(max=8)


def test_what_hangs_on_a_model_does_not_hinder():
    """Guards models with kept activations, and one line for what cannot be copied."""
    model = Net(nn.ReLU())
    model.last = model(torch.zeros(2, 6))
    assert trace(model, torch.zeros(2, 6)).groups[0].size == 8
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="cannot be copied for a trace"):
        trace(model, torch.zeros(2, 6))


@pytest.mark.parametrize("change", ["meta", "bfloat16", "frozen", "offloaded", "compiled", "no grad"])
def test_any_state_gives_the_same_graph(tiny_llama, change):
    """Guards that what a model is loaded as makes no difference to its structure."""
    expected = trace(tiny_llama)
    model = copy.deepcopy(tiny_llama)
    if change == "meta":
        model = model.to("meta")
    elif change == "bfloat16":
        model = model.to(torch.bfloat16)
    elif change == "frozen":
        model.requires_grad_(False)
    elif change == "offloaded":
        cpu_offload(model, execution_device="cpu")
    elif change == "compiled":
        model = torch.compile(model)
    with torch.no_grad() if change == "no grad" else torch.enable_grad():
        assert trace(model) == expected


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_base_has_the_same_groups(tiny_llama, kind):
    """Guards 4 and 8 bit bases: packed weights count as what they stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    expected = trace(tiny_llama)
    quantised = copy.deepcopy(tiny_llama)
    for name, module in list(quantised.model.named_modules()):
        if isinstance(module, nn.Linear):
            settings = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
            packed = getattr(bitsandbytes.nn, kind)(module.in_features, module.out_features, bias=False, **settings)
            packed.load_state_dict(module.state_dict())
            quantised.model.set_submodule(name, packed)
    quantised = quantised.to("cpu")
    assert trace(quantised) == expected


def test_an_adapter_joins_the_groups_of_what_it_adapts(tiny_llama):
    """Guards LoRA: B's rows are rows of the adapted layer, A's columns its columns, the rank a group of its own."""
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=3, target_modules=["up_proj"]))
    groups = {group.id: group for group in trace(model).groups}
    name = "base_model.model.model.layers.0.mlp"
    assert f"{name}.up_proj.lora_B.default" in {member.module for member in groups[name].members}
    rank = next(group for group in groups.values() if group.size == 3)
    assert [m.axis for m in rank.members] == ["row", "column"]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("bert", {"input_ids": (1, 4), "attention_mask": (1, 4)}),
        ("vit", {"pixel_values": (1, 3, 224, 224)}),
        ("t5", {"input_ids": (1, 4), "attention_mask": (1, 4), "decoder_input_ids": (1, 4)}),
        ("clip", {"input_ids": (1, 4), "attention_mask": (1, 4), "pixel_values": (1, 3, 224, 224)}),
        ("whisper", {"input_features": (1, 80, 3000), "decoder_input_ids": (1, 4)}),
    ],
)
def test_inputs_are_made_up_by_kind(name, inputs):
    """Guards text, images, pairs of stacks and sound, each at its published size and without weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(name))
    graph = trace(model)
    assert graph.inputs == inputs
    assert {"residual", "mlp", "attention-vo", "attention-qk"} <= {group.kind for group in graph.groups}


def test_blocks_are_the_outermost_lists():
    """Guards names and kinds: experts inside a block are no blocks."""
    model = tiny(MixtralForCausalLM, num_key_value_heads=2, num_local_experts=3)
    assert blocks(model) == ["model.layers.0", "model.layers.1"]


# Torch-Pruning as the backend


def test_index_maps_of_the_backend_are_not_asked_for(monkeypatch, tiny_llama):
    """Guards against hangs at two query heads per key/value head; fails when upstream asks for its maps elsewhere."""

    def forbidden(*_):
        raise AssertionError("asked for an index map")

    for name in ("update_concat_index_mapping", "update_split_index_mapping", "update_expand_index_mapping"):
        monkeypatch.setattr(index_mapping, name, forbidden)
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads = 3
    model = LlamaForCausalLM(config)
    trace(model)
    with pytest.raises(AssertionError, match="asked for an index map"):
        torch_pruning.DependencyGraph().build_dependency(
            model, {"input_ids": TOKENS, "use_cache": False}, output_transform=lambda out: out.logits, verbose=False
        )


def test_the_backend_is_a_witness(tiny_llama):
    """Guards the second opinion: groups that are joined wrongly are found by Torch-Pruning's dependencies."""
    bones = skeleton(tiny_llama)
    backend = dependency_graph(bones, made_up(bones)[0], lambda model, inputs: model(**_on_meta(inputs)))
    groups = trace(tiny_llama).groups
    assert disagreement(backend, groups) is None
    mlp = next(group for group in groups if group.kind == "mlp")
    residual = next(group for group in groups if group.kind == "residual")
    wrong = dataclasses.replace(mlp, members=mlp.members + residual.members)
    found = disagreement(backend, [wrong])
    assert found is not None
    assert found[0] is wrong


def _on_meta(inputs):
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


# Refusals


class Net(nn.Module):
    """Two linear layers with something between."""

    def __init__(self, between=None):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 8), nn.Linear(8, 4), between

    def forward(self, x):
        """`x` is ``(…, 6)``."""
        return self.second(self.between(self.first(x)))


def sleep(x):
    """Never ends, for a test."""
    for _ in range(2000):
        time.sleep(0.01)
    return x


def branch(x):
    """Branches on what it computes."""
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Net(), None, "no transformers model: give trace its example_inputs"),
        (Net(), "text", "example_inputs are a str"),
        (Net(nn.ReLU()), torch.zeros(2, 5), r"its forward fails \(.*\): check example_inputs"),
        (Net(branch), torch.zeros(2, 6), "branches on computed values"),
        (Net(torch.fft.rfft), torch.zeros(2, 6), "what the operation _fft_r2c does to channels is not known"),
        (Net(lambda x: x[x > 0]), torch.zeros(2, 6), "selects elements by a computed mask"),
    ],
)
def test_what_cannot_be_read_is_refused(model, inputs, message):
    """Guards against silently wrong groups: one line says what cannot be read, and how to mend it."""
    with pytest.raises(InputError, match=message):
        trace(model, inputs)


def test_a_trace_that_does_not_end_is_refused():
    """Guards the time limit; the refusal comes at once after it."""
    start = time.monotonic()
    with pytest.raises(InputError, match=r"the trace of Net did not end within 0.3 seconds"):
        trace(Net(sleep), torch.zeros(2, 6), time_limit=0.3)
    assert time.monotonic() - start < 10


def test_heads_that_do_not_divide_are_refused(tiny_llama):
    """Guards a configuration that builds and cannot run."""
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads = 4
    with pytest.raises(InputError, match="check its configuration"):
        trace(LlamaForCausalLM(config))


def test_unused_weights_are_named():
    """Guards against a graph that silently leaves weights out."""
    model = Net(nn.ReLU())
    model.idle = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"does not use idle\.weight, idle\.bias"):
        graph = trace(model, torch.zeros(2, 6))
    assert graph.unreached == ("idle.weight", "idle.bias")


def test_a_complete_model_gives_no_warning(tiny_llama):
    """Guards against warnings that mean nothing (Torch-Pruning's unwrapped parameters)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(tiny_llama)
