"""Rows and columns of experts that a model keeps in 3-D parameters, trained as a PEFT adapter."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rowscope import Budget, InputError, RowsConfig, Selection, cli, criterion, scoring, select, trace
from rowscope.experts import SeparateExperts, is_fused
from rowscope.finetune import RowsLayer, load_adapter, recompute_activations

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = torch.arange(3, 21).reshape(2, 9)
EXPERTS = "model.layers.{}.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS.format(1)}.gate_up_proj.2", f"{EXPERTS.format(1)}.down_proj.0"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(found, expected):
    """Whether logits are equal to 1e-6 of the largest."""
    return float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def randomise(model):
    """Give the trained rows values, as training would."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "rows_" in name:
            nn.init.normal_(parameter.data, std=0.1)
    return model


def tuned_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, RowsLayer)
    }


@pytest.fixture
def selection():
    """Rows of one expert and columns of another, in the second block alone."""
    return Selection(
        indices={GATE_UP: {"row": torch.tensor([3, 19, 31])}, DOWN: {"column": torch.tensor([0, 15])}},
        shapes={GATE_UP: (32, 24), DOWN: (24, 16)},
    )


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_dense_autograd(make_mixture, kind, axis):
    """Guards training: each delta's gradient is the slice of the gradient of the fused parameter W + delta."""
    config = RowsConfig(
        target_modules=["gate_up_proj", "down_proj"], num_rows=3, axis=axis, init_weights=False, train_bias=True
    )
    model = get_peft_model(make_mixture(kind), config)
    layers = tuned_layers(model)
    assert len(layers) == 16
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()

    dense = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    expected = dense(input_ids=IDS, labels=IDS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, layer in layers.items():
        parameter, _, expert = name.rpartition(".")
        gradient = dense.get_parameter(parameter).grad[int(expert)]
        gradient = gradient.T if kind == "gpt_oss" else gradient
        index = layer.rows_index["default"].long()
        expected = gradient[index] if axis == "row" else gradient[:, index]
        found = layer.rows_delta["default"].grad
        if found is None:  # an expert without tokens
            found = torch.zeros_like(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        if "default" in layer.rows_bias:
            bias = dense.get_parameter(f"{parameter}_bias").grad[int(expert)][index]
            torch.testing.assert_close(layer.rows_bias["default"].grad, bias, rtol=1e-4, atol=1e-6)
    assert (kind == "gpt_oss" and axis == "row") == any(layer.rows_bias for layer in layers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_selection_of_experts(make_mixture, selection, kind):
    """Guards what is trained: exactly the selection, from the base on; a block without one stays fused."""
    base = make_mixture(kind)
    before = logits(base)
    model = get_peft_model(base, RowsConfig.from_selection(selection))
    assert model.get_nb_trainable_parameters()[0] == selection.trainable_parameters()
    assert tuned_layers(model).keys() == selection.indices.keys()
    assert is_fused(base.model.layers[0].mlp.experts)
    assert isinstance(base.model.layers[1].mlp.experts, SeparateExperts)
    assert close(logits(model), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(make_mixture, selection, tmp_path, kind, low_cpu_mem_usage):
    """Guards adapters on disk: loaded by PEFT, by transformers and by rowscope onto a new model, to the same bits."""
    model = randomise(get_peft_model(make_mixture(kind), RowsConfig.from_selection(selection)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mixture(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert tuned_layers(loaded).keys() == selection.indices.keys()
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load_adapter(make_mixture(kind), tmp_path)), expected)
    native = make_mixture(kind)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_a_plain_model(make_mixture, selection, tmp_path, kind):
    """Guards merging: the model has its own structure again, and saved it loads in plain transformers, same logits."""
    base = make_mixture(kind)
    names, modules = list(base.state_dict()), list(base.modules())
    model = randomise(get_peft_model(base, RowsConfig.from_selection(selection)))
    expected, before = logits(model), logits(make_mixture(kind))
    merged = model.merge_and_unload(safe_merge=True)
    assert list(merged.state_dict()) == names
    assert all(a is b for a, b in zip(merged.modules(), modules, strict=True))
    assert close(logits(merged), expected)
    assert not close(expected, before)
    merged.save_pretrained(tmp_path)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_unloading_gives_the_base_back(make_mixture, selection):
    """Guards unloading: the base's modules and bits, also after the adapter was in use or merged and unmerged."""
    base = make_mixture()
    modules, bits = list(base.modules()), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = randomise(get_peft_model(base, RowsConfig.from_selection(selection)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.merge_adapter()
    model.unmerge_adapter()
    logits(model)
    unloaded = model.unload()
    assert all(a is b for a, b in zip(unloaded.modules(), modules, strict=True))
    assert all(torch.equal(tensor, bits[name]) for name, tensor in unloaded.state_dict().items())


def test_adapters_side_by_side(make_mixture, selection):
    """Guards several adapters: added, switched, disabled and deleted, also where they are of different blocks."""
    base = make_mixture()
    before = logits(base)
    model = randomise(get_peft_model(base, RowsConfig.from_selection(selection)))
    first = logits(model)
    model.add_adapter("second", RowsConfig(target_modules=["gate_up_proj.1"], num_rows=2, init_weights=False))
    assert isinstance(base.model.layers[0].mlp.experts, SeparateExperts)
    assert close(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not close(second, first)
    with model.disable_adapter():
        assert close(logits(model), before)
    model.delete_adapter("default")
    assert close(logits(model), second)
    assert close(logits(model.merge_and_unload()), second)
    assert not any(isinstance(module, SeparateExperts) for module in base.modules())


def test_many_experts_are_found_again(make_mixture, tmp_path):
    """Guards long lists of targets, which PEFT may shorten to endings: they never mean a block that was left out."""
    places = [(layer, kind, expert) for layer in (0, 2) for kind in ("gate_up", "down") for expert in range(6)]
    names = [f"{EXPERTS.format(layer)}.{kind}_proj.{expert}" for layer, kind, expert in places]
    shapes = {name: (32, 24) if "gate" in name else (24, 16) for name in names}
    selection = Selection({name: {"row": torch.tensor([1, 5])} for name in names}, shapes)
    model = randomise(get_peft_model(make_mixture(experts=6, layers=3), RowsConfig.from_selection(selection)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mixture(experts=6, layers=3), tmp_path)
    assert tuned_layers(loaded).keys() == set(names)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("target_modules", "exclude_modules", "wanted"),
    [
        (["gate_up_proj.3"], None, {(layer, f"gate_up_proj.{3}") for layer in (0, 1)}),
        ([f"{EXPERTS.format(0)}.down_proj.1"], None, {(0, "down_proj.1")}),
        (r".*layers\.1.*down_proj\.[01]", None, {(1, "down_proj.0"), (1, "down_proj.1")}),
        (["down_proj"], ["down_proj.0", "1.mlp.experts.down_proj.2"], {(0, "down_proj.1"), (0, "down_proj.2"),
         (0, "down_proj.3"), (1, "down_proj.1"), (1, "down_proj.3")}),
    ],
)  # fmt: skip
def test_names_of_experts(make_mixture, target_modules, exclude_modules, wanted):
    """Guards targets: an ending, a whole name, an expression, and the parameter's name for all experts in it."""
    config = RowsConfig(target_modules=target_modules, exclude_modules=exclude_modules, num_rows=2)
    found = tuned_layers(get_peft_model(make_mixture(), config))
    assert found.keys() == {f"{EXPERTS.format(layer)}.{name}" for layer, name in wanted}


def test_a_failed_injection_leaves_experts_fused(make_mixture, selection):
    """Guards against half a change: a target that is not there leaves the model's modules as they were."""
    base = make_mixture()
    modules = list(base.modules())
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(base, RowsConfig(target_modules=["gate_up_proj.9"]))
    shapes = {**selection.shapes, "model.nowhere": (2, 2)}
    wrong = Selection({**selection.indices, "model.nowhere": {"row": torch.tensor([0])}}, shapes)
    with pytest.raises(InputError, match=r"no module 'model\.nowhere'"):
        get_peft_model(base, RowsConfig.from_selection(wrong))
    assert all(a is b for a, b in zip(base.modules(), modules, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_after_use(make_mixture, selection, kind):
    """Guards `.to` while a weight holds an adapter: the fused parameter gets the base's numbers, the delta stays."""
    base = make_mixture(kind)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in base.state_dict().items()}
    model = randomise(get_peft_model(base, RowsConfig.from_selection(selection)))
    logits(model)
    assert any(layer._replaced for layer in tuned_layers(model).values())
    model.to(torch.bfloat16)
    logits(model)
    unloaded = model.unload()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unloaded.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_lowers_the_loss_of_scored_and_selected_channels(make_mixture, kind):
    """Guards the chain: score, select coupled channels, train them by plain steps, with activations recomputed."""
    base = make_mixture(kind)
    table = scoring.score(base, criterion("taylor"), [{"input_ids": IDS, "labels": IDS}])
    chosen = select(table, Budget.parse("lora=2"), scope="coupled", groups=trace(base).groups)
    model = get_peft_model(base, RowsConfig.from_selection(chosen))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    recompute_activations(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for layer in tuned_layers(model).values():
        layer.restore()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.slow
def test_commands_on_a_mixture(make_mixture, demo, tmp_path, monkeypatch):
    """Guards the command line: a mixture is scored, channels of experts are selected, trained and evaluated."""
    monkeypatch.chdir(tmp_path)
    config = make_mixture().config
    config.vocab_size = len(demo.tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained("mixture")
    demo.tokenizer.save_pretrained("mixture")
    data = ["--data", "demo"]
    score = ["--score-batches", "1", "--score-batch-size", "2", "--score-tokens", "48"]
    steps = ["--max-steps", "2", "--per-device-train-batch-size", "2", "--output-dir", "run"]
    for arguments in (
        ["score", "mixture", *data, *score, "--out", "s.safetensors"],
        ["select", "s.safetensors", "--budget", "lora=2", "--scope", "coupled", "--out", "s.yaml"],
        ["finetune", "rows", "mixture", *data, "--selection", "s.yaml", *steps],
        ["evaluate", "mixture", *data, "--adapter", "run", "--tasks", "perplexity"],
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
    selection = Selection.load(tmp_path / "s.yaml")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    deltas = {name: tensor for name, tensor in adapter.items() if name.endswith("rows_delta")}
    assert f"base_model.model.{DOWN}.rows_delta" in deltas
    assert sum(tensor.numel() for tensor in deltas.values()) == selection.trainable_parameters()
    assert any(bool(tensor.any()) for name, tensor in deltas.items() if "experts" in name)
