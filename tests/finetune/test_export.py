"""An adapter of rows and columns as a LoRA that plain PEFT loads, and merged into a plain checkpoint."""

import json
import subprocess
import sys
import sysconfig

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rowscope import InputError, RowsConfig, Selection
from rowscope.finetune import merge_adapters, save_as_lora, train
from rowscope.finetune.export import lora_factors
from rowscope.finetune.layer import RowsLayer
from rowscope.runs import RunFolder
from rowscope.settings import TrainingSettings

IDS = torch.arange(12).reshape(2, 6)
AXES = ("row", "column")


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, bos_token_id=1, eos_token_id=2)
    ).eval()


def convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5))
    return model.requires_grad_(False)


def tied():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(model, **fields):
    """The model with a rows adapter of random numbers, k of them different from module to module."""
    config = RowsConfig(num_rows=3, rows_pattern={"0": 2}, init_weights=False, **fields)
    return get_peft_model(model, config).eval()


def output(model, x=IDS):
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


def rows_layers(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, RowsLayer)}


CASES = {
    "all linear": (None, {"target_modules": "all-linear"}, IDS),
    "Conv1D with biases": (gpt2, {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "train_bias": True}, IDS),
    "embedding and head": (None, {"target_modules": ["embed_tokens", "lm_head"]}, IDS),
    "a module saved whole": (None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, IDS),
    "convolution": (convolutions, {"target_modules": ["0", "3"]}, torch.randn(2, 3, 6, 6)),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_plain_peft_loads_the_same_function(make_model, tmp_path, case, axis):
    """The LoRA's delta weights are ours bit for bit, so merged it answers bit for bit, apart to rounding."""
    make, fields, x = CASES[case]
    make = make or make_model
    model = adapted(make(), axis=axis, **fields)
    expected = output(model, x)
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    torch.testing.assert_close(output(lora, x), expected, atol=1e-5, rtol=1e-5)
    merged = lora.merge_and_unload()
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name


@pytest.mark.parametrize("axis", AXES)
def test_unmerged_it_gives_the_bits_of_the_delta(make_model, tmp_path, axis):
    """Where both add the delta's part to the base's output, no bit differs in fp32: one-hot products are exact."""
    model = adapted(make_model(), axis=axis, target_modules="all-linear")
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make_model(), tmp_path / "lora").get_base_model()
    for name, layer in rows_layers(model).items():
        x = torch.randn(5, layer.in_features)
        apart = layer.with_delta(layer.get_base_layer()(x), x, "default")
        assert torch.equal(lora.get_submodule(name)(x), apart)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("make", [gpt2, convolutions])
def test_the_factors_multiply_to_the_delta(make, axis):
    """B A, a convolution's at every place of the kernel, is the dense delta."""
    targets = "all-linear" if make is gpt2 else ["0", "3"]
    for layer in rows_layers(adapted(make(), axis=axis, target_modules=targets)).values():
        a, b = lora_factors(layer)
        product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1))
        delta = torch.zeros(layer.out_features, *a.shape[1:])
        index = layer.rows_index["default"].long()
        if axis == "row":
            delta[index] = layer.rows_delta["default"].data
        else:
            delta[:, index] = layer.rows_delta["default"].data
        assert torch.equal(product.view_as(delta), delta)


def test_the_configuration_names_every_rank(make_model, tmp_path):
    """Each module has its own rank and scaling 1, also where one module's name ends another's."""
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    model.forward = lambda x: model["head"]["fc"](model["fc"](x))
    model.requires_grad_(False)
    index = {"fc": {"row": torch.tensor([1])}, "head.fc": {"row": torch.tensor([0, 2, 3])}}
    selection = Selection(index, {"fc": (4, 4), "head.fc": (4, 4)})
    rows = get_peft_model(model, RowsConfig.from_selection(selection, init_weights=False))
    config = save_as_lora(rows, tmp_path / "lora")
    assert config.rank_pattern == config.alpha_pattern == {"^fc": 1, "head.fc": 3}
    expected = output(rows, torch.eye(4))
    plain = rows.unload()
    plain.forward = lambda x: plain["head"]["fc"](plain["fc"](x))
    lora = PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert lora.base_model.model["fc"].scaling == lora.base_model.model["head"]["fc"].scaling == {"default": 1.0}
    torch.testing.assert_close(output(lora, torch.eye(4)), expected)


WITHOUT_ROWSCOPE = """
import importlib.util, sys
assert importlib.util.find_spec("rowscope") is None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)

def answer(model):
    ids = torch.arange(2, 8)[None]
    tokens = model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        return tokens, model(input_ids=ids).logits

answers = {}
for axis in ("row", "column"):
    base = AutoModelForCausalLM.from_pretrained("base")
    answers[axis, "lora"] = answer(PeftModel.from_pretrained(base, f"lora-{axis}"))
    answers[axis, "merged"] = answer(AutoModelForCausalLM.from_pretrained(f"merged-{axis}"))
torch.save(answers, "answers.pt")
"""


def test_it_answers_the_same_where_rowscope_is_not_installed(make_model, tokenizer, tmp_path):
    """Trained here, loaded in a process that cannot import rowscope: the same tokens as LoRA, the same bits merged."""
    make_model().save_pretrained(tmp_path / "base")
    dataset = Dataset.from_list([{"prompt": "one plus two", "completion": " is three"}] * 8)
    settings = TrainingSettings(learning_rate=2e-2, max_steps=5, warmup_steps=0)
    ids = torch.arange(2, 8)[None]
    expected = {}
    for axis in AXES:
        run = RunFolder.create(tmp_path / f"run-{axis}")
        config = RowsConfig(target_modules="all-linear", num_rows=4, axis=axis)
        train(make_model(), tokenizer, dataset, None, config, settings, run)
        model = PeftModel.from_pretrained(make_model(), run.adapter).eval()
        expected[axis] = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False), output(model, ids)
        assert not torch.equal(expected[axis][1], output(make_model(), ids))
        save_as_lora(model, tmp_path / f"lora-{axis}")
        merge_adapters(make_model(), [run.adapter]).save_pretrained(tmp_path / f"merged-{axis}")

    # Without site, what is installed for development is not on the path; the libraries' own folder is put back.
    environment = {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-P", "-c", WITHOUT_ROWSCOPE]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    answers = torch.load(tmp_path / "answers.pt")
    for axis, (tokens, logits) in expected.items():
        assert torch.equal(answers[axis, "lora"][0], tokens)
        torch.testing.assert_close(answers[axis, "lora"][1], logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(answers[axis, "merged"][0], tokens)
        assert torch.equal(answers[axis, "merged"][1], logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disjoint_adapters_merge_exactly(make_model, tmp_path, dtype):
    """Two adapters of different rows give, merged one after the other, each one's rows as if it were alone."""
    module = "model.layers.0.mlp.up_proj"
    merged_alone = []
    for name, rows in (("a", [0, 5]), ("b", [2, 40])):
        selection = Selection({module: {"row": torch.tensor(rows)}}, {module: (48, 32)})
        model = get_peft_model(make_model(dtype), RowsConfig.from_selection(selection, init_weights=False))
        model.save_pretrained(tmp_path / name)
        merged_alone.append((rows, model.merge_and_unload().get_submodule(module).weight))
    both = merge_adapters(make_model(dtype), [tmp_path / "a", tmp_path / "b"]).get_submodule(module).weight
    expected = make_model(dtype).get_submodule(module).weight.data.clone()
    for rows, weight in merged_alone:
        expected[rows] = weight[rows]
    assert torch.equal(both, expected)


def test_a_tied_embedding_that_was_trained_is_untied(tmp_path):
    """Merged into the embedding alone, the adapter leaves the head as it was, also after saving and loading."""
    model = adapted(tied(), target_modules=["embed_tokens"], axis="column")
    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapters(tied(), [tmp_path / "adapter"]).save_pretrained(tmp_path / "merged")
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    torch.testing.assert_close(output(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)


def test_what_has_no_lora_is_refused(make_model, tmp_path):
    """Other PEFT methods, convolutions that PEFT cannot copy and partial biases are named; nothing is written."""

    def refused(model, message):
        with pytest.raises(InputError, match=message):
            save_as_lora(model, tmp_path / "lora")
        assert not list(tmp_path.iterdir())

    refused(get_peft_model(make_model(), LoraConfig(target_modules=["up_proj"])), "not one of rows and columns")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)).requires_grad_(False)
    refused(adapted(grouped, target_modules=["0"]), "'0' is a grouped, dilated")
    dilated = nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)).requires_grad_(False)
    refused(adapted(dilated, target_modules=["0"]), "'0' is a grouped, dilated")
    mixed = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).requires_grad_(False)
    refused(adapted(mixed, target_modules=["0", "1"], train_bias=True), "'0' has no bias")
    with pytest.raises(InputError, match="no adapter"):
        save_as_lora(adapted(make_model(), target_modules=["up_proj"]), tmp_path / "lora", "absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="already holds something"):
        save_as_lora(adapted(make_model(), target_modules=["up_proj"]), tmp_path / "full")
