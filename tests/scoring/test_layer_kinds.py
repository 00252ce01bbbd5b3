"""Whatever keeps the weight: Conv1D, convolutions, embeddings, quantised linears; and classifiers with an encoder."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from rowscope import criterion, scoring
from rowscope.models import layers, linear_modules
from rowscope.scoring.weights import scored_weights

RULES = ("magnitude", "taylor", "wanda", "fisher")


def text(size=3, vocabulary=97, classes=0):
    """Two batches of token ids, the second example padded at its end."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (9, 7):
        tokens = torch.randint(3, vocabulary, (size, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, length - 2 :] = 0
        labels = tokens.masked_fill(mask == 0, -100)
        labels = torch.randint(classes, (size,), generator=generator) if classes else labels
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return made


def pictures(size=3):
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(size, 3, 16, 16), "labels": torch.tensor([0, 1, 2])} for _ in range(2)]


def products(model, names, batches, rule) -> dict[str, torch.Tensor]:
    """Module name -> the weights' own values whose sums are the scores, in the layer's layout."""
    weights = [model.get_submodule(name).weight for name in names]
    if rule == "magnitude":
        found = [[w.detach().square() for w in weights]]
    else:
        parts = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
        gradients = [torch.autograd.grad(model(**b).loss, weights) for b in (parts if rule == "fisher" else batches)]
        power = 2 if rule == "fisher" else 1
        found = [[(w * g).abs().detach() ** power for w, g in zip(weights, every, strict=True)] for every in gradients]
    return {name: torch.stack([one[n] for one in found]).mean(0) for n, name in enumerate(names)}


def real_inputs(model, names, batches) -> dict[str, torch.Tensor]:
    """Module name -> all that comes into a layer when every example runs alone without padding."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, __, to=to: to.append(args[0]))
        for name, to in seen.items()
    ]
    with torch.no_grad():
        for batch in batches:
            for index in range(len(batch["labels"])):
                one = {name: value[index : index + 1] for name, value in batch.items()}
                if "attention_mask" in one:
                    real = one.pop("attention_mask")[0] != 0
                    one = {name: value[:, real] for name, value in one.items() if name != "labels"}
                model(**one)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten() if x.ndim < 3 else x[0] for x in found]) for name, found in seen.items()}


def assert_scores(table, expected, out, rtol=1e-4):
    """The table's rows and columns are sums of `expected` along and across dimension `out`."""
    for name, values in expected.items():
        torch.testing.assert_close(table.scores[name]["row"], values.sum(1 - out), rtol=rtol, atol=1e-9)
        torch.testing.assert_close(table.scores[name]["column"], values.sum(out), rtol=rtol, atol=1e-9)


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40, pad_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("rule", RULES)
def test_conv1d(gpt2, rule):
    """Guards transformers' Conv1D, kept as (in_features, out_features): rows are its outputs all the same."""
    batches, names = text(), [f"transformer.h.{n}.{part}" for n in (0, 1) for part in ("attn.c_attn", "mlp.c_proj")]
    table = scoring.score(gpt2, criterion(rule), batches, target_modules=["c_attn", r".*mlp\.c_proj"])
    assert list(table.scores) == names
    assert table.provenance.shapes["transformer.h.0.attn.c_attn"] == (72, 24)
    if rule == "wanda":
        inputs = real_inputs(gpt2, names, batches)
        norms = {name: torch.linalg.vector_norm(inputs[name], dim=0) for name in names}
        expected = {name: gpt2.get_submodule(name).weight.detach().abs() * norms[name][:, None] for name in names}
    else:
        expected = products(gpt2, names, batches, rule)
    assert_scores(table, expected, out=1)


@pytest.mark.parametrize("rule", RULES)
def test_embeddings(gpt2, rule):
    """Guards embeddings: columns are tokens (or positions), rows their features; a tied head shares the gradient."""
    batches, names = text(), ["transformer.wte", "transformer.wpe"]
    table = scoring.score(gpt2, criterion(rule), batches, target_modules=["wte", "wpe", "lm_head"])
    assert table.provenance.shapes == {"transformer.wte": (24, 97), "transformer.wpe": (24, 16), "lm_head": (97, 24)}
    if rule == "wanda":
        tokens = torch.cat([batch["input_ids"][batch["attention_mask"] != 0] for batch in batches])
        places = torch.cat([batch["attention_mask"].nonzero()[:, 1] for batch in batches])
        counts = [torch.bincount(tokens, minlength=97), torch.bincount(places, minlength=16)]
        weights = [gpt2.get_submodule(name).weight.detach().abs() for name in names]
        expected = {n: w * c.sqrt()[:, None] for n, w, c in zip(names, weights, counts, strict=True)}
    else:
        expected = products(gpt2, names, batches, rule)
        torch.testing.assert_close(table.scores["lm_head"]["row"], table.scores["transformer.wte"]["column"])
    assert_scores(table, expected, out=1)


class Grouped(nn.Module):
    """Convolutions of one, two and three dimensions, some in groups, one with a channel of its own each."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, (3, 2), stride=2, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 1, groups=12)
        self.line = nn.Conv1d(12, 6, 2, groups=3)
        self.solid = nn.Conv3d(6, 4, 1, groups=2)

    def forward(self, pixel_values, labels):
        x = self.depthwise(self.grouped(self.plain(pixel_values).tanh()).tanh()).flatten(2)
        x = self.solid(self.line(x)[..., None, None]).mean((2, 3, 4))
        return {"loss": nn.functional.cross_entropy(x, labels)}


def dense(values: torch.Tensor, groups: int) -> torch.Tensor:
    """A grouped kernel as ``(out_channels, in_channels)``, summed over its positions, in a plain loop."""
    out, per_group = values.shape[:2]
    whole = torch.zeros(out, per_group * groups)
    for row in range(out):
        for column in range(per_group):
            whole[row, row // (out // groups) * per_group + column] = values[row, column].sum()
    return whole


@pytest.mark.parametrize("rule", RULES)
def test_grouped_convolutions(rule):
    """Guards rows and columns of grouped kernels against a dense loop: each row meets its own group's columns."""
    torch.manual_seed(0)
    model, batches = Grouped().eval(), pictures()
    names = ["plain", "grouped", "depthwise", "line", "solid"]
    table = scoring.score(model, criterion(rule), batches, loss=lambda model, batch: model(**batch)["loss"])
    assert list(table.scores) == names
    seen = {name: [] for name in names}
    for name, to in seen.items():
        model.get_submodule(name).register_forward_hook(lambda _, args, __, to=to: to.append(args[0].detach()))
    parts = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(3)]
    found = []
    for batch in parts if rule == "fisher" else batches:
        weights = [model.get_submodule(name).weight for name in names]
        gradients = torch.autograd.grad(model(**batch)["loss"], weights)
        power = 2 if rule == "fisher" else 1
        found.append([(w * g).abs().detach() ** power for w, g in zip(weights, gradients, strict=True)])
    expected = {}
    for number, name in enumerate(names):
        module = model.get_submodule(name)
        if rule in ("magnitude", "wanda"):
            values = dense(module.weight.detach().abs() ** (2 if rule == "magnitude" else 1), module.groups)
            channels = torch.cat([x.transpose(0, 1).flatten(1) for x in seen[name]], dim=1)
            expected[name] = values * torch.linalg.vector_norm(channels, dim=1) if rule == "wanda" else values
        else:
            expected[name] = dense(torch.stack([every[number] for every in found]).mean(0), module.groups)
    assert_scores(table, expected, out=0)


@pytest.mark.parametrize("rule", ["taylor", "fisher", "wanda"])
def test_resnet(rule):
    """Guards a real convolutional network: shapes, sizes and, for gradients, plain autograd."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    model, batches = ResNetForImageClassification(config).eval(), pictures()
    table = scoring.score(model, criterion(rule), batches)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    blocks = tuple(layers(model))
    names = [name for name in convolutions if name.startswith(blocks)]
    assert list(table.scores) == names
    assert len(names) >= 4
    if rule == "wanda":
        inputs = real_inputs(model, names, batches)
        for name in names:
            channels = inputs[name].view(-1, convolutions[name].in_channels, *inputs[name].shape[1:]).flatten(2)
            norms = channels.square().sum((0, 2)).sqrt()
            weight = convolutions[name].weight.detach().abs().sum((2, 3))
            torch.testing.assert_close(table.scores[name]["row"], weight @ norms, rtol=1e-4, atol=1e-9)
        return
    assert_scores(table, {n: v.sum((2, 3)) for n, v in products(model, names, batches, rule).items()}, out=0)


def quantised(model, kind) -> dict[str, torch.Tensor]:
    """Replace the blocks' linears; the weights that the quantised layers hold, by bitsandbytes and by hand."""
    held = {}
    for name, module in linear_modules(model).items():
        sizes = (module.in_features, module.out_features)
        if kind == "4bit":
            layer = Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        else:
            layer = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        layer.load_state_dict(module.state_dict())
        layer = layer.to("cpu").eval()
        model.set_submodule(name, layer)
        if kind == "4bit":
            held[name] = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        else:
            held[name] = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    return held


def plain(model, held):
    """The same model with full linears that hold the dequantised weights."""
    for name, values in held.items():
        layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
        layer.weight.data = values.clone()
        model.set_submodule(name, layer)
    return model


@pytest.mark.parametrize("rule", [*RULES, "direct-taylor", "gradient-norm"])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised(tiny_llama, kind, rule):
    """Guards bitsandbytes layers: scores are those of the dequantised weights in a full model, frozen or not.

    8-bit layers round their inputs too, so that their model is another one by a percent.
    """
    held = quantised(tiny_llama, kind)
    tiny_llama.requires_grad_(False)
    batches = text()
    weights = scored_weights(tiny_llama)
    assert all(weight.is_quantised for weight in weights.values())
    table = scoring.score(tiny_llama, criterion(rule), batches)
    again = scoring.score(tiny_llama, criterion(rule), batches)
    full = scoring.score(plain(tiny_llama, held), criterion(rule), batches)
    assert list(table.scores) == list(held)
    for name, axes in full.scores.items():
        for axis, expected in axes.items():
            error = (table.scores[name][axis] - expected).norm() / expected.norm()
            assert error < (1e-5 if kind == "4bit" or rule == "magnitude" else 0.05)
            assert torch.equal(table.scores[name][axis], again.scores[name][axis])


@pytest.mark.parametrize("rule", ["taylor", "fisher", "wanda"])
@pytest.mark.parametrize("architecture", ["bert", "deberta"])
def test_sequence_classifiers(architecture, rule):
    """Guards encoders with a classifier, DeBERTa's with projections that are used three times in a block."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "num_labels": 4, "pad_token_id": 0}
    if architecture == "bert":
        model = BertForSequenceClassification(BertConfig(**sizes))
    else:
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        config = DebertaV2Config(**sizes, **relative, position_buckets=8, norm_rel_ebd="layer_norm")
        model = DebertaV2ForSequenceClassification(config)
    model, batches = model.eval(), text(classes=4)
    table = scoring.score(model, criterion(rule), batches)
    names = list(linear_modules(model))
    assert list(table.scores) == names
    if rule != "wanda":
        assert_scores(table, products(model, names, batches, rule), out=0)
        return
    names = [name for name in names if "query" not in name and "key" not in name]  # those see positions too
    for name, inputs in real_inputs(model, names, batches).items():
        norms = torch.linalg.vector_norm(inputs, dim=0)
        weight = model.get_submodule(name).weight.detach().abs()
        torch.testing.assert_close(table.scores[name]["row"], weight @ norms, rtol=1e-3, atol=1e-6)
