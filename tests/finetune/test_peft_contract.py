"""Rows are a PEFT method like any other: what PEFT promises for its methods, kept for this one."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import convert_to_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from rowscope import InputError, RowsConfig, Selection
from rowscope.finetune import RowsLayer, RowsModel, load_adapter

IDS = torch.arange(12).reshape(2, 6)
MLP = "model.layers.0.mlp"
ATTENTION = "model.layers.1.self_attn"

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES),
    "phi3": Phi3Config(**SIZES),  # fused qkv and gate_up
    "gpt2": GPT2Config(  # Conv1D, biases, tied table and head
        n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=16, n_positions=8, resid_pdrop=0.0, attn_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    ),
}  # fmt: skip


def chosen(**modules):
    """A selection by hand: module, axis and indices, of modules of 32 features but the feed-forward ones."""
    indices = {name.replace("__", "."): {axis: torch.tensor(index)} for name, (axis, index) in modules.items()}
    return Selection(indices, dict.fromkeys(indices, (200, 200)))


SELECTIONS = {
    "llama": chosen(
        model__layers__0__mlp__gate_proj=("row", [3, 5, 40]),
        model__layers__0__mlp__up_proj=("row", [3, 5, 40]),
        model__layers__0__mlp__down_proj=("column", [3, 5, 40]),
        model__layers__1__self_attn__o_proj=("column", [7]),
    ),
    "phi3": chosen(
        model__layers__0__self_attn__qkv_proj=("row", [0, 33, 63]),  # of q, k and v
        model__layers__1__mlp__gate_up_proj=("row", [2, 50]),
        model__layers__1__mlp__down_proj=("column", [2]),
    ),
    "gpt2": chosen(
        transformer__h__0__attn__c_attn=("row", [0, 40, 95]),
        transformer__h__0__mlp__c_fc=("row", [1, 2]),
        transformer__h__0__mlp__c_proj=("column", [1, 2]),
    ),
    "gpt2 tied": chosen(
        transformer__wte=("row", [1, 31]), lm_head=("row", [0, 3, 5]), transformer__h__1__mlp__c_proj=("row", [4])
    ),
}
ROWS = {"target_modules": "all-linear", "num_rows": 3, "axis": "row"}
CASES = {
    **{f"{name} mixed": (name.split()[0], selection) for name, selection in SELECTIONS.items()},
    **{f"{name} rows": (name, ROWS) for name in ARCHITECTURES},
    **{f"{name} columns": (name, ROWS | {"axis": "column"}) for name in ARCHITECTURES},
}


class Case:
    """A tiny architecture, a dtype, and what to train in it."""

    def __init__(self, name, dtype):
        self.architecture, self.trained = CASES[name]
        self.dtype = dtype
        self.tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}

    def base(self):
        """The same random model at every call."""
        torch.manual_seed(0)
        config = copy.deepcopy(ARCHITECTURES[self.architecture])
        return AutoModelForCausalLM.from_config(config).to(self.dtype).eval()

    def config(self, **fields):
        if isinstance(self.trained, Selection):
            return RowsConfig.from_selection(self.trained, task_type="CAUSAL_LM", **fields)
        return RowsConfig(**self.trained, task_type="CAUSAL_LM", **fields)

    def adapted(self):
        """The model with an adapter that has values, as after training."""
        return randomise(get_peft_model(self.base(), self.config()))


@pytest.fixture(params=[(name, dtype) for name in CASES for dtype in (torch.float32, torch.bfloat16)], ids=str)
def case(request):
    """Every architecture, axis and dtype."""
    return Case(*request.param)


@pytest.fixture(params=CASES)
def float_case(request):
    """Every architecture and axis, in fp32."""
    return Case(request.param, torch.float32)


@pytest.fixture
def selection():
    """Rows of one module, columns of two, none of the rest."""
    return Selection(
        indices={
            f"{MLP}.up_proj": {"row": torch.tensor([3, 5, 40])},
            f"{MLP}.down_proj": {"column": torch.tensor([0, 47])},
            f"{ATTENTION}.o_proj": {"column": torch.tensor([7])},
        },
        shapes={f"{MLP}.up_proj": (48, 32), f"{MLP}.down_proj": (32, 48), f"{ATTENTION}.o_proj": (32, 32)},
    )


def randomise(model):
    """Give the trained rows values, as training would."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "rows_delta" in name or "rows_bias" in name:
            nn.init.normal_(parameter.data, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_weights(model):
    """The weights of the model without adapters, by their names there."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "rows_" not in name
    }


def assert_same_weights(weights, others):
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


def train(model, steps=2):
    """Optimizer steps on the adapter; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved_adapter(make_model, selection, folder):
    """An adapter with values in `folder`, and the logits it gives."""
    model = randomise(get_peft_model(make_model(), RowsConfig.from_selection(selection, task_type="CAUSAL_LM")))
    model.save_pretrained(folder)
    return logits(model)


def test_trainable_parameters_are_those_of_the_selection(make_model, selection):
    """Exactly the selected rows and columns are trained, and the model starts as the base model."""
    base = make_model()
    before = logits(base)
    model = get_peft_model(base, RowsConfig.from_selection(selection))
    assert model.get_nb_trainable_parameters()[0] == selection.trainable_parameters()
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, RowsLayer)}
    assert layers.keys() == selection.indices.keys()
    for name, layer in layers.items():
        ((axis, index),) = selection.indices[name].items()
        assert layer.rows_axis["default"] == axis
        assert torch.equal(layer.rows_index["default"].long(), index)
    assert torch.equal(logits(model), before)


def test_a_model_starts_as_its_base_and_learns(case):
    """An untrained adapter is the base bit for bit, in training too; training lowers the loss and leaves the base."""
    base, model = case.base(), get_peft_model(case.base(), case.config())
    assert torch.equal(logits(model), logits(base))
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    losses = train(model.train(), steps=4)
    assert losses[-1] < losses[0]
    assert_same_weights(base_weights(model), base_weights(base))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_keep_every_bit(case, tmp_path, low_cpu_mem_usage):
    """A loaded adapter has the saved fp32 deltas and integer indices, on a bf16 base too, for any number of rows."""
    model = case.adapted()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    originals = dict(model.named_modules())
    for name, module in loaded.named_modules():
        if isinstance(module, RowsLayer):
            assert torch.equal(module.rows_delta["default"], saved[f"{name}.rows_delta"])
            assert torch.equal(module.rows_index["default"], originals[name].rows_index["default"])
            assert module.rows_delta["default"].dtype == torch.float32
            assert module.rows_index["default"].dtype == torch.int32
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_in_training_saves_the_base_as_it_was(case, tmp_path):
    """While the weights hold an adapter, state_dict gives the base's own numbers, and training is not disturbed."""
    expected, model = case.base().state_dict(), get_peft_model(case.base(), case.config()).train()
    undisturbed = get_peft_model(case.base(), case.config()).train()
    train(undisturbed)
    train(undisturbed)
    train(model)
    model.save_pretrained(tmp_path)
    assert_same_weights(base_weights(model), expected)
    with torch.no_grad():
        model(input_ids=IDS)
    train(model)
    assert_same_weights(base_weights(model), expected)
    for name, parameter in model.named_parameters():
        if "rows_delta" in name:
            torch.testing.assert_close(parameter, undisturbed.get_parameter(name), atol=0.05, rtol=0.05)
    assert_same_weights(base_weights(model.unload()), expected)


def test_two_steps_saved_between_are_one_training(float_case, tmp_path):
    """Generation and saving between two steps change no bit of what is trained."""
    results = []
    for disturbed in (False, True):
        model = get_peft_model(float_case.base(), float_case.config()).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(2):
            loss = model(input_ids=IDS, labels=IDS).loss
            if disturbed:
                model.eval().generate(input_ids=IDS[:1, :3], max_new_tokens=3, do_sample=False)
                model.train().save_pretrained(tmp_path)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert_same_weights(*results)


def test_transformers_own_adapters(case, tmp_path):
    """transformers' load_adapter, set_adapter, disable_adapters, add_adapter and delete_adapter do as PEFT does."""
    trained = case.adapted()
    expected = logits(trained)
    trained.save_pretrained(tmp_path)
    model = case.base()
    original = logits(model)
    model.load_adapter(str(tmp_path), adapter_name="default")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), original)
    model.enable_adapters()
    model.add_adapter(RowsConfig(target_modules="all-linear", num_rows=2, axis="column"), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), original)
    assert train(model)[1] < train(model)[0] * 2
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert not any("second" in name for name in model.state_dict())


@pytest.mark.slow
def test_auto_class_in_a_fresh_process(make_model, selection, tmp_path):
    """After `import rowscope.finetune` a new process loads adapter and base with AutoPeftModelForCausalLM."""
    make_model().save_pretrained(tmp_path / "base")
    expected = saved_adapter(make_model, selection, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    script = (
        "import sys, torch, rowscope.finetune; from peft import AutoPeftModelForCausalLM;"
        "torch.set_num_threads(1);"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]);"
        "torch.save(model(input_ids=torch.arange(12).reshape(2, 6)).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "adapter", tmp_path / "logits.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_merge_and_unload_gives_a_plain_model(case):
    """Merged and unloaded, a model has no adapter layers and computes the same; unloaded alone, it is the base."""
    model, base = case.adapted(), case.base()
    expected = logits(model)
    unloaded = copy.deepcopy(model).unload()
    assert_same_weights(base_weights(unloaded), base_weights(base))
    assert torch.equal(logits(unloaded), logits(base))
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, RowsLayer) for module in merged.modules())
    assert base_weights(merged).keys() == base_weights(base).keys()
    torch.testing.assert_close(logits(merged), expected, **case.tolerance)


def test_merge_and_disable_restore_the_base(case):
    """Unmerging restores base weights exactly; a disabled adapter gives the base model's logits."""
    base, model = case.base(), case.adapted()
    before, adapted = logits(base), logits(model)
    assert not torch.equal(adapted, before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, **case.tolerance)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_weights(base_weights(model), base_weights(base))
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)


def test_adapters_merged_together(float_case):
    """Two adapters merged at once are their sum; of disjoint ones each slice is that of its own merge, bit for bit."""
    model = float_case.adapted()
    disjoint = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, RowsLayer):
            axis, size = layer.rows_axis["default"], layer.out_features
            size = size if axis == "row" else layer.in_features
            free = sorted(set(range(size)) - set(layer.rows_index["default"].tolist()))[:2]
            disjoint[name] = {axis: torch.tensor(free)}
    second = Selection(disjoint, dict.fromkeys(disjoint, (200, 200)))
    model.add_adapter("second", RowsConfig.from_selection(second, task_type="CAUSAL_LM"))
    randomise(model)
    alone = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, RowsLayer)}
    for adapter in ("default", "second"):
        model.merge_adapter([adapter])
        for name, layer in layers.items():
            alone[name, adapter] = layer.matrix().index_select(*layer._slice(adapter)).clone()
        model.unmerge_adapter()
    model.base_model.set_adapter(["default", "second"])
    together = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), together, **float_case.tolerance)
    for (name, adapter), expected in alone.items():
        assert torch.equal(layers[name].matrix().index_select(*layers[name]._slice(adapter)), expected)
    model.unmerge_adapter()
    assert_same_weights(base_weights(model), base_weights(float_case.base()))


def test_switching_and_deleting_adapters(case):
    """Adapters with other modules, axes and sizes live side by side; each acts as if it were alone."""
    second = RowsConfig(target_modules="all-linear", num_rows=4, axis="column", init_weights=False)
    model = case.adapted()
    alone, original = logits(model), logits(case.base())
    model.add_adapter("second", second)
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    switched = logits(model)
    assert not torch.equal(switched, alone)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.endswith("rows_delta.second") for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), switched)
    assert not any("default" in name for name in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(logits(model), original)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(float_case, use_reentrant):
    """Gradients with either kind of activation checkpointing are those without."""
    gradients = []
    for checkpointed in (False, True):
        model = float_case.adapted().train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.add_adapter("second", RowsConfig(target_modules="all-linear", num_rows=1))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "delta.default" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.any()


def test_a_deep_copy_of_a_used_model(float_case):
    """A copy made while weights hold an adapter is a model of its own: training one leaves the other."""
    model = float_case.adapted()
    expected = logits(model)
    copied = copy.deepcopy(model)
    train(copied)
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(model), expected)
    for one in (model, copied):
        assert_same_weights(base_weights(one), base_weights(float_case.base()))


def test_a_cast_of_a_used_model(float_case):
    """`.to(bfloat16)` of a model in use casts the base's own numbers."""
    model = float_case.adapted()
    logits(model)
    model.to(torch.bfloat16)
    logits(model)
    assert_same_weights(base_weights(model), base_weights(float_case.base().to(torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama mixed", "gpt2 tied mixed"])
def test_compiled(name):
    """torch.compile trains the model to the same gradients, before and after eager use."""
    model = Case(name, torch.float32).adapted().train()
    expected = logits(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), expected)


def test_status_and_counts_of_parameters(capsys):
    """PEFT's status functions and print_trainable_parameters know the method and count its deltas."""
    case = Case("llama mixed", torch.float32)
    model = get_peft_model(case.base(), case.config())
    model.print_trainable_parameters()
    assert "trainable params: 320 ||" in capsys.readouterr().out  # 3 rows of 32 twice, 3 + 1 columns of 32
    assert {status.name for status in get_layer_status(model)} == {f"model.{name}" for name in case.trained.indices}
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.adapter_model_type == "RowsModel"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_modules_to_save_are_trained_and_saved_whole(tmp_path, low_cpu_mem_usage):
    """modules_to_save trains a copy of a module beside the rows; it is saved, loaded and merged with them."""
    case = Case("llama mixed", torch.float32)
    model = get_peft_model(case.base(), case.config(modules_to_save=["lm_head"]))
    train(model, steps=3)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(case.base()))
    merged = loaded.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, case.base().lm_head.weight)
    torch.testing.assert_close(logits(merged), trained, **case.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_rows(dtype, tmp_path):
    """train_bias trains the biases of chosen rows, not of columns; they are saved, loaded, merged and restored."""
    case = Case("gpt2 mixed", dtype)
    model = get_peft_model(case.base(), case.config(train_bias=True))
    biases = {name: p for name, p in model.named_parameters() if "rows_bias" in name}
    assert [parameter.numel() for parameter in biases.values()] == [3, 2]
    train(model)
    assert all(parameter.all() for parameter in biases.values())
    trained = logits(model)
    assert_same_weights(base_weights(model), base_weights(case.base()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits(loaded), trained)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), trained, **case.tolerance)
    loaded.unmerge_adapter()
    assert_same_weights(base_weights(loaded), base_weights(case.base()))


def test_dropout_is_off_in_evaluation():
    """In training two passes with dropout differ; in evaluation the adapter acts as one without dropout."""
    case = Case("llama mixed", torch.float32)
    model = randomise(get_peft_model(case.base(), case.config(dropout=0.5))).eval()
    assert torch.equal(logits(model), logits(case.adapted()))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_the_file_holds_nothing_else(make_model, selection, tmp_path):
    """An adapter's file has 4 bytes a trained weight and 4 a row or column, and the header that names them."""
    saved_adapter(make_model, selection, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    rows = sum(index.numel() for axes in selection.indices.values() for index in axes.values())
    assert file.stat().st_size == header + 4 * selection.trainable_parameters() + 4 * rows


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_a_second_adapter_on_other_modules(make_model, selection, tmp_path, low_cpu_mem_usage):
    """An adapter loads beside one that trains other modules, and acts as if it were alone."""
    expected = saved_adapter(make_model, selection, tmp_path)
    model = get_peft_model(make_model(), RowsConfig(target_modules=["q_proj"], num_rows=2, init_weights=False))
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", [name for name in CASES if "tied" not in name])
def test_conversion_to_lora_is_exact(name):
    """PEFT's converter finds a LoRA of the same function: the rank suffices for every module."""
    case = Case(name, torch.float32)
    model = case.adapted()
    expected = logits(model)
    lora_config, state_dict = convert_to_lora(model, rank=3, progressbar=False)
    assert isinstance(lora_config, LoraConfig)
    converted = get_peft_model(case.base(), lora_config)
    keys = {name.replace(".default", ""): name for name in converted.state_dict()}
    converted.load_state_dict({keys[name]: tensor for name, tensor in state_dict.items()}, strict=False)
    torch.testing.assert_close(logits(converted), expected, atol=1e-5, rtol=1e-5)


def damage(folder, change):
    """Apply `change` to the tensors of a saved adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, f"base_model.model.{MLP}.up_proj")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.rows_index"), "rows_index.*missing"),
        (lambda tensors, name: tensors.pop(f"{name}.rows_delta"), "rows_delta.*missing"),
        (lambda tensors, name: tensors[f"{name}.rows_index"].__setitem__(2, 48), r"outside 0\.\.47"),
        (lambda tensors, name: tensors[f"{name}.rows_index"].__setitem__(2, 3), "sorted and unique"),
        (
            lambda tensors, name: tensors.update({f"{name}.rows_index": torch.tensor([3, 5])}),
            r"shape \(2,\), not \(3,\)",
        ),
        (lambda tensors, name: tensors[f"{name}.rows_delta"].__setitem__((0, 0), torch.nan), "NaN"),
    ],
)
def test_a_damaged_checkpoint_is_refused(make_model, selection, tmp_path, change, message):
    """Missing or wrong indices and NaN never load: PEFT alone would warn at most and give a wrong model."""
    saved_adapter(make_model, selection, tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_damaged_biases_are_refused(tmp_path):
    """Missing or infinite biases of rows are refused as deltas are."""
    case = Case("gpt2 mixed", torch.float32)
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.transformer.h.0.mlp.c_fc.rows_bias"
    get_peft_model(case.base(), case.config(train_bias=True)).save_pretrained(tmp_path)
    tensors = load_file(path)
    save_file(tensors | {name: torch.tensor([0.0, torch.inf])}, path)
    with pytest.raises(InputError, match="NaN or infinite"):
        PeftModel.from_pretrained(case.base(), tmp_path)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"rows_bias.*missing"):
        PeftModel.from_pretrained(case.base(), tmp_path)


def test_load_adapter_refuses_what_is_no_adapter_of_the_model(make_model, selection, tmp_path):
    """load_adapter gives the saved function; a missing, cut-off or foreign adapter is an input error."""
    expected = saved_adapter(make_model, selection, tmp_path / "rows")
    loaded = load_adapter(make_model(), tmp_path / "rows")
    assert torch.equal(logits(loaded), expected)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_adapter(make_model(), tmp_path)
    with pytest.raises(InputError, match="no adapter of this model"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path / "rows")
    get_peft_model(make_model(), LoraConfig(target_modules=["up_proj"])).save_pretrained(tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(InputError, match="missing adapter keys"):
        load_adapter(make_model(), tmp_path / "lora")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="damaged"):
        load_adapter(make_model(), tmp_path / "lora")


def test_all_linear_takes_the_rows_of_largest_norm(make_model):
    """Without a selection, every linear layer but the head trains its rows of largest L2 norm."""
    base = make_model()
    model = get_peft_model(
        base, RowsConfig(target_modules="all-linear", num_rows=4, axis_pattern={"v_proj": "column"})
    )
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, RowsLayer)]
    assert len(layers) == 14
    for name, layer in layers:
        axis = "column" if "v_proj" in name else "row"
        vectors = layer.get_base_layer().weight if axis == "row" else layer.get_base_layer().weight.T
        norms = [vector.norm().item() for vector in vectors]
        largest = sorted(sorted(range(len(norms)), key=norms.__getitem__)[-4:])
        assert layer.rows_axis["default"] == axis
        assert layer.rows_index["default"].tolist() == largest


def test_too_many_rows_are_clipped_with_a_note(make_model):
    """num_rows above the size of a weight trains all its rows and says so once."""
    config = RowsConfig(target_modules=["k_proj"], num_rows=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model = get_peft_model(make_model(), config)
    assert len([note for note in caught if "num_rows=100" in str(note.message)]) == 1
    assert model.get_nb_trainable_parameters()[0] == 2 * 16 * 32


def test_exact_names_and_patterns(make_model):
    """rows_pattern and axis_pattern go by exact name first, then by suffix or regular expression."""
    config = RowsConfig(
        target_modules=["up_proj"], num_rows=2, rows_pattern={"up_proj": 3, "model.layers.1.mlp.up_proj": 5}
    )
    model = get_peft_model(make_model(), config).get_base_model()
    assert model.model.layers[0].mlp.up_proj.rows_index["default"].numel() == 3
    assert model.model.layers[1].mlp.up_proj.rows_index["default"].numel() == 5


def test_a_selection_names_modules_exactly():
    """A module whose name merely ends like a selected one is left alone."""
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    selection = Selection({"fc": {"row": torch.tensor([1])}}, {"fc": (4, 4)})
    RowsModel(model, RowsConfig.from_selection(selection), "default")
    assert isinstance(model["fc"], RowsLayer)
    assert isinstance(model["head"]["fc"], nn.Linear)


def test_selections_that_cannot_be_trained_are_refused(make_model):
    """Both axes of one module, an empty selection, and a selection of another model are input errors."""
    shapes = {"a": (4, 4)}
    both = Selection({"a": {"row": torch.tensor([1]), "column": torch.tensor([1])}}, shapes)
    with pytest.raises(InputError, match="rows and columns"):
        RowsConfig.from_selection(both)
    with pytest.raises(InputError, match="empty"):
        RowsConfig.from_selection(Selection({}, {}))
    with pytest.raises(InputError, match="no module 'a'"):
        get_peft_model(make_model(), RowsConfig.from_selection(Selection({"a": {"row": torch.tensor([1])}}, shapes)))
    wrong = Selection({f"{MLP}.up_proj": {"row": torch.tensor([99])}}, {f"{MLP}.up_proj": (100, 32)})
    with pytest.raises(InputError, match=r"outside 0\.\.47"):
        get_peft_model(make_model(), RowsConfig.from_selection(wrong))


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.GRU(4, 4)])
def test_other_layer_types_are_refused_by_name(module):
    """A layer that is none of the supported ones is refused, naming it and what is supported."""
    message = f"'layer' is a {type(module).__name__}.*only in Linear, Conv1D, Conv1d, Conv2d, Embedding"
    with pytest.raises(InputError, match=message):
        get_peft_model(nn.ModuleDict({"layer": module}), RowsConfig(target_modules=["layer"]))


def test_subclasses_of_a_layer_are_refused():
    """A subclass may compute something else (attention's output layer is never called), so it is refused too."""
    with pytest.raises(InputError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        get_peft_model(nn.MultiheadAttention(4, 2), RowsConfig(target_modules=["out_proj"]))


def test_a_layer_with_another_method_is_refused(make_model):
    """Rows of a layer that LoRA has changed are refused: PEFT would forget one of the two when unloading."""
    model = get_peft_model(make_model(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(InputError, match="another PEFT method"):
        get_peft_model(model, RowsConfig(target_modules=["up_proj"]))


@pytest.mark.parametrize(
    "fields",
    [{"axis": "rows"}, {"axis_pattern": {"a": "x"}}, {"num_rows": 0}, {"rows_pattern": {"a": 0}}, {"dropout": 1.0}],
)
def test_a_wrong_configuration_is_refused(fields):
    """Unknown axes and empty adapters are input errors."""
    with pytest.raises(InputError):
        RowsConfig(**fields)


def test_registration_leaves_pefts_own_methods(make_model):
    """Importing rowscope adds one method to PEFT's tables, found by its plain name."""
    assert PEFT_TYPE_TO_TUNER_MAPPING["ROWS"] is RowsModel
    assert "LORA" in PEFT_TYPE_TO_TUNER_MAPPING
