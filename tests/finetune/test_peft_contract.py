"""Rows are a PEFT method like any other: what PEFT promises for its methods, kept for this one."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import convert_to_lora
from safetensors.torch import load_file, save_file
from torch import nn

from rowscope import InputError, RowsConfig, Selection
from rowscope.finetune import RowsLayer, RowsModel, load_adapter

IDS = torch.arange(12).reshape(2, 6)
MLP = "model.layers.0.mlp"
ATTENTION = "model.layers.1.self_attn"


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
        if "rows_delta" in name:
            nn.init.normal_(parameter.data, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_keep_every_bit(make_model, selection, tmp_path, dtype, low_cpu_mem_usage):
    """A loaded adapter has the saved fp32 deltas and integer indices, on a bf16 base too."""
    model = randomise(get_peft_model(make_model(dtype), RowsConfig.from_selection(selection)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, module in loaded.named_modules():
        if isinstance(module, RowsLayer):
            assert torch.equal(module.rows_delta["default"], saved[f"{name}.rows_delta"])
            assert torch.equal(module.rows_index["default"], saved[f"{name}.rows_index"])
            assert module.rows_index["default"].dtype == torch.int32
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_loader(make_model, selection, tmp_path):
    """`model.load_adapter` of transformers reads the adapter as PEFT does."""
    expected = saved_adapter(make_model, selection, tmp_path)
    model = make_model()
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), expected)


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


def test_merge_and_unload_gives_a_plain_model(make_model, selection):
    """Merging and unloading leaves a model without adapter layers that computes the same."""
    model = randomise(get_peft_model(make_model(), RowsConfig.from_selection(selection)))
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, RowsLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_merge_and_disable_restore_the_base(make_model, selection):
    """Unmerging restores base weights exactly; a disabled adapter gives the base model's logits."""
    base = make_model()
    before = logits(base)
    model = randomise(get_peft_model(base, RowsConfig.from_selection(selection)))
    adapted = logits(model)
    assert not torch.equal(adapted, before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)


def test_switching_and_deleting_adapters(make_model, selection):
    """Adapters with other modules, axes and sizes live side by side; each acts as if it were alone."""
    second = RowsConfig(target_modules=["up_proj", "q_proj"], num_rows=4, init_weights=False)
    alone = logits(randomise(get_peft_model(make_model(), RowsConfig.from_selection(selection))))
    model = randomise(get_peft_model(make_model(), RowsConfig.from_selection(selection)))
    model.add_adapter("second", second)
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    switched = logits(model)
    assert not torch.equal(switched, alone)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.endswith("rows_delta.second") for name in trainable)
    model.delete_adapter("default")
    assert torch.equal(logits(model), switched)
    assert not any("default" in name for name in model.state_dict())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_a_second_adapter_on_other_modules(make_model, selection, tmp_path, low_cpu_mem_usage):
    """An adapter loads beside one that trains other modules, and acts as if it were alone."""
    expected = saved_adapter(make_model, selection, tmp_path)
    model = get_peft_model(make_model(), RowsConfig(target_modules=["q_proj"], num_rows=2, init_weights=False))
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


def test_conversion_to_lora_is_exact(make_model, selection):
    """PEFT's converter finds a LoRA of the same function: the rank suffices for every module."""
    model = randomise(get_peft_model(make_model(), RowsConfig.from_selection(selection, task_type="CAUSAL_LM")))
    expected = logits(model)
    lora_config, state_dict = convert_to_lora(model, rank=3, progressbar=False)
    assert isinstance(lora_config, LoraConfig)
    converted = get_peft_model(make_model(), lora_config)
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
        (lambda tensors, name: tensors[f"{name}.rows_delta"].__setitem__((0, 0), torch.nan), "NaN"),
    ],
)
def test_a_damaged_checkpoint_is_refused(make_model, selection, tmp_path, change, message):
    """Missing or wrong indices and NaN never load: PEFT alone would warn at most and give a wrong model."""
    saved_adapter(make_model, selection, tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        PeftModel.from_pretrained(make_model(), tmp_path)


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


def test_other_layer_types_are_refused_by_name(make_model):
    """A layer that is no plain linear one is refused, naming it and what is supported."""
    with pytest.raises(InputError, match=r"'model.embed_tokens' is a Embedding.*Linear"):
        get_peft_model(make_model(), RowsConfig(target_modules=["embed_tokens"]))


@pytest.mark.parametrize("fields", [{"axis": "rows"}, {"axis_pattern": {"a": "x"}}, {"num_rows": 0}])
def test_a_wrong_configuration_is_refused(fields):
    """Unknown axes and empty adapters are input errors."""
    with pytest.raises(InputError):
        RowsConfig(**fields)


def test_registration_leaves_pefts_own_methods(make_model):
    """Importing rowscope adds one method to PEFT's tables, found by its plain name."""
    assert PEFT_TYPE_TO_TUNER_MAPPING["ROWS"] is RowsModel
    assert "LORA" in PEFT_TYPE_TO_TUNER_MAPPING
