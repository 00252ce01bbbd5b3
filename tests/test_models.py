"""Models load from every kind of name, or are refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from rowscope import InputError, load_model, models
from rowscope.demo import MODEL_FOLDER


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the embedded model."""
    return shutil.copytree(MODEL_FOLDER, tmp_path / "model")


def test_the_demo_model_is_what_the_readme_says(demo):
    """Guards the embedded model: Llama, grouped-query attention at a ratio other than 2, small, loads plainly."""
    plain = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    assert AutoTokenizer.from_pretrained(MODEL_FOLDER).pad_token_id is not None
    config = plain.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 8
    assert config.num_attention_heads / config.num_key_value_heads not in (1, 2)
    assert plain.num_parameters() <= 6_000_000
    assert plain.dtype == torch.bfloat16
    assert demo.model.dtype == torch.float32
    assert sum(path.stat().st_size for path in MODEL_FOLDER.parent.rglob("*") if path.is_file()) <= 12 * 2**20


def test_layers_and_linears_are_found(demo):
    """Guards the structural search: eight blocks of seven linears each, no embedding, no head."""
    assert list(models.layers(demo.model)) == [f"model.layers.{n}" for n in range(8)]
    assert len(models.linear_modules(demo.model)) == 56


def test_lists_inside_blocks_are_no_blocks():
    """Guards models whose blocks hold longer lists than the model has blocks (experts)."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])

    model = nn.Module()
    model.blocks = nn.ModuleList([Block() for _ in range(3)])
    assert list(models.layers(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert models.layers(nn.Linear(2, 2)) == {}


def test_the_fingerprint_is_of_the_weights(folder):
    """Guards fingerprints: equal for a copy, another for a changed first or last weight of any tensor."""
    original = models.fingerprint(MODEL_FOLDER)
    assert models.fingerprint(folder) == original
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    for position in (0, -1):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[position] += 1
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert models.fingerprint(folder) != original


def test_the_fingerprint_survives_resharding(folder):
    """Guards fingerprints: how tensors are spread over files does not matter."""
    original = models.fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "model.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, folder / "model-2.safetensors")
    assert models.fingerprint(folder) == original


def test_a_nan_in_a_checkpoint_is_named(folder):
    """Guards against scoring garbage: the tensor that holds a NaN is named."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.2\.self_attn\.o_proj\.weight holds NaN"):
        load_model(str(folder))


def test_truncated_weights_are_refused(folder):
    """Guards against half a download."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        load_model(str(folder))


def test_a_missing_tensor_is_named(folder):
    """Guards against random weights in place of lost ones."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_custom_code_is_never_run(folder):
    """Guards the user's machine: a checkpoint that brings code is refused, not asked about."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "m.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError):
        load_model(str(folder))
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_does_not_fit(folder):
    """Guards training: without an end token, or with more tokens than the model knows, nothing is started."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None, "pad_token": None}))
    with pytest.raises(InputError, match="set eos_token"):
        load_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{number}" for number in range(5)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="use its own"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("remove", "message"), [("config.json", "no config.json"), ("model.safetensors", "no .safetensors weights")]
)
def test_folders_without_a_model(folder, remove, message):
    """Guards the answers to a folder that is no checkpoint."""
    (folder / remove).unlink()
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "some-org/some-model", "not a name!"])
def test_unknown_models(source):
    """Guards the answers to a name that is nothing, without a network."""
    with pytest.raises(InputError, match="name a folder"):
        load_model(source)


def test_unknown_devices_and_dtypes():
    """Guards --device and --dtype."""
    for device in ("tpu", "meta"):
        with pytest.raises(InputError, match=f"device '{device}' is not available"):
            load_model("demo", device=device)
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        load_model("demo", dtype="int8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "foo"}, "no configuration of a known architecture"),
        ({}, "no configuration of a known architecture"),
        ({"model_type": "llama", "architectures": ["FooForCausalLM"]}, "which transformers does not have"),
        ({"model_type": "llama", "architectures": [3]}, "which transformers does not have"),
        ({"model_type": "llama", "architectures": ["os"]}, "which transformers does not have"),
        ({"model_type": "foo", "auto_map": {"AutoConfig": "x.Y"}}, "no configuration of a known architecture"),
        ({"model_type": "bert", "hidden_size": 50, "num_attention_heads": 6}, "is not a multiple"),
        ({"model_type": "llama", "hidden_size": -48, "num_attention_heads": 6}, "no model can be built"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, settings, message):
    """Guards the graph of a configuration alone: one line, no code of the configuration's own, no traceback."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        models.empty(str(tmp_path))


def test_a_configuration_is_a_model_without_weights(tmp_path):
    """Guards memory: everything is on the meta device, and the file itself may be named."""
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 6, "num_hidden_layers": 1}))
    model = models.empty(str(tmp_path / "config.json"))
    assert all(parameter.is_meta for parameter in model.parameters())
    for missing in (tmp_path / "nothing", tmp_path / "config.yaml"):
        with pytest.raises(InputError, match="does not exist"):
            models.empty(str(missing))
    with pytest.raises(InputError, match="is empty"):
        models.empty("")


def test_an_encoder_is_no_causal_model(tmp_path):
    """Guards against scores of a loss that means nothing: transformers would load an encoder as a causal model."""

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a BertForMaskedLM, no causal language model"):
        load_model(str(tmp_path))
