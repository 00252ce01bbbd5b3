"""Zero order by responses of blocks: what is measured against exact Jacobians, what it costs and leaves behind."""

from collections import Counter

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from rowscope import InputError, criterion, scoring
from rowscope.models import layers, linear_modules
from rowscope.scoring.agreement import agreement
from rowscope.scoring.criteria import Task
from rowscope.scoring.readout import Sensitivity
from rowscope.scoring.responses import _Batch
from rowscope.scoring.weights import scored_weights


def text(count=3, examples=2, length=9, classes=0, mask=True):
    """Batches of token ids; the last example of each is padded at its end."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        tokens = torch.randint(3, 97, (examples, length), generator=generator)
        real = torch.ones_like(tokens)
        real[-1, length - 2 :] = 0
        labels = tokens.masked_fill(real == 0, -100)
        labels = torch.randint(classes, (examples,), generator=generator) if classes else labels
        made.append({"input_ids": tokens, "labels": labels} | ({"attention_mask": real} if mask else {}))
    return made


def pictures(size=16):
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])} for _ in range(2)]


def scored(model, passes, batches, seed=0, **options):
    return scoring.score(model, criterion(f"zo-taylor:passes={passes}"), batches, seed=seed, **options)


def numbers(table) -> torch.Tensor:
    return torch.cat([values for axes in table.scores.values() for values in axes.values()])


def assert_nothing_left(model):
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# ------------------------------------------------------------------------------------ what is measured


def exact_squares(model, batch, sensitive) -> dict[str, torch.Tensor]:
    """Module name -> for each row the sum over a block's outputs, weighted, and over the positions of the row's own
    output, of the squared derivative, one output after the other by torch.autograd."""
    outputs, ends, hooks = {}, {}, []
    for name, module in {**layers(model), **linear_modules(model)}.items():
        to = ends if name in layers(model) else outputs
        hooks.append(module.register_forward_hook(lambda _, __, out, name=name, to=to: to.update({name: out})))
    model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    scale = (sensitive.positions.unsqueeze(-1) * sensitive.features).sqrt().flatten()
    found = {name: torch.zeros(out.shape[-1]) for name, out in outputs.items()}
    for block, end in ends.items():
        names = [name for name in outputs if name.startswith(f"{block}.")]
        for number in scale.nonzero().flatten():
            one = torch.zeros_like(end).flatten()
            one[number] = scale[number]
            wanted = [outputs[name] for name in names]
            for name, gradient in zip(
                names, torch.autograd.grad(end, wanted, one.view_as(end), retain_graph=True), strict=True
            ):
                found[name] += gradient.square().flatten(0, -2).sum(0)
    return found


def test_rows_sizes_against_jacobians(tiny_llama):
    """Guards d: with many probes, the mean over the read positions of the squared Jacobian, in size and in order.

    Where a row's output reaches several positions (attention) one draw of signs stands for the mean over all.
    """
    (batch,) = text(1, examples=2, length=6)
    generator = torch.Generator().manual_seed(0)
    positions, features = torch.rand(2, 6, generator=generator), torch.rand(48, generator=generator)
    positions[0, :2] = 0
    sensitive = Sensitivity(positions / positions[positions > 0].mean(), features / features.mean())
    exact = exact_squares(tiny_llama, batch, sensitive)
    task = Task(tiny_llama, scored_weights(tiny_llama), [batch])
    with torch.inference_mode():
        found = _Batch(task, layers(tiny_llama), 0, sensitive, generator).row_variances(512, 1e-3)
    assert list(found) == list(exact)
    measured_squares = {name: triple[0].clone() for name, triple in found.items()}
    for name, squares in exact.items():
        measured, expected = measured_squares[name], squares / 10  # positions that are read
        if "mlp" in name or "o_proj" in name:  # reaches its own position only
            assert float(measured.mean()) == pytest.approx(float(expected.mean()), rel=0.1)
            assert spearmanr(measured, expected).statistic > 0.8
        else:
            assert 0.2 < float(measured.mean() / expected.mean()) < 5
    together = [torch.cat([table[name] for name in exact]) for table in (measured_squares, exact)]
    assert spearmanr(*together).statistic > 0.95


def test_scores_factor(tiny_llama):
    """Guards s_i = d_i Σ_j |w_ij| ‖x_j‖: the d that rows imply, put into the columns' formula, gives the columns."""
    batches = text(1)
    table = scored(tiny_llama, 40, batches)  # too few to ask the head: all real tokens count alike
    inputs = {}
    hooks = [
        module.register_forward_hook(lambda _, args, __, name=name: inputs.update({name: args[0]}))
        for name, module in linear_modules(tiny_llama).items()
    ]
    with torch.no_grad():
        tiny_llama(**batches[0])
    for hook in hooks:
        hook.remove()
    real = batches[0]["attention_mask"] != 0
    for name, module in linear_modules(tiny_llama).items():
        weight, norms = module.weight.detach().abs(), torch.linalg.vector_norm(inputs[name][real], dim=0)
        sizes = table.scores[name]["row"] / (weight @ norms)
        torch.testing.assert_close(table.scores[name]["column"], norms * (weight.T @ sizes), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(table.noise[name]["row"] / (weight @ norms), sizes.mean().expand_as(sizes))


def test_without_signal_it_is_wanda(tiny_llama):
    """Guards the shrinkage: the fewest passes give scores near Wanda's, and say that they have little signal."""
    batches = text(1)
    table, plain = scored(tiny_llama, 30, batches), scoring.score(tiny_llama, criterion("wanda"), batches)
    assert table.provenance.signal_to_noise < 2
    for name, axes in plain.scores.items():
        for axis, expected in axes.items():
            assert spearmanr(table.scores[name][axis], expected).statistic > 0.7
    found = agreement(table, plain, "row").median.spearman
    assert found > 0.9
    assert found > agreement(scored(tiny_llama, 2000, batches), plain, "row").median.spearman


def test_more_passes_less_noise(tiny_llama):
    """Guards the signal-to-noise: it grows with the passes, and the halves agree as it says."""
    ratios = [scored(tiny_llama, passes, text()).provenance.signal_to_noise for passes in (40, 150, 600)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 2


def medians(model, batches, rules) -> dict[str, tuple[float, float]]:
    """Rule -> median partial Spearman with the exact Taylor scores, of rows and of columns."""
    exact = scoring.score(model, criterion("taylor"), batches)
    tables = {rule: scoring.score(model, criterion(rule), batches) for rule in rules}
    return {
        rule: tuple(agreement(exact, table, axis).median.partial for axis in ("row", "column"))
        for rule, table in tables.items()
    }


def test_better_than_wanda_on_the_demo_model(demo, demo_batches):
    """Guards what it is for, with few passes: beyond the weight norm it is nearer to exact Taylor than Wanda."""
    found = medians(demo.model, demo_batches[:1], ["wanda", "zo-taylor:passes=96"])
    (row, column), (plain_row, plain_column) = found["zo-taylor:passes=96"], found["wanda"]
    assert row > plain_row + 0.07
    assert column > plain_column + 0.048


@pytest.mark.slow
def test_better_than_the_published_estimator_on_the_demo_model(demo, demo_batches):
    """Guards the reason for a second estimator: at equal passes it beats the published one, and Wanda, clearly."""
    ours, published = "zo-taylor:passes=256", "zo-taylor:estimator=spsa,passes=256"
    found = medians(demo.model, demo_batches, [ours, published, "wanda"])
    assert found[ours][0] > found[published][0] + 0.2
    assert found[ours][0] > found["wanda"][0] + 0.19
    assert found[ours][1] > found[published][1] + 0.44
    assert found[ours][1] > found["wanda"][1] + 0.075


# ------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("passes", [30, 60, 100, 200, 400, 800])
@pytest.mark.parametrize("count", [1, 3])
def test_passes_are_kept_to(tiny_llama, passes, count):
    """Guards the price, counted by hooks: no more than was allowed, and what is reported is what was run."""
    calls = Counter()
    blocks = [f"model.layers.{number}.mlp.down_proj" for number in (0, 1)]  # each runs once when its block does
    for name in [*blocks, "lm_head"]:
        tiny_llama.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    table = scored(tiny_llama, passes, text(count))
    within = sum(module.weight.numel() for module in linear_modules(tiny_llama).values())
    head = tiny_llama.lm_head.weight.numel()
    run = (within * sum(calls[name] for name in blocks) / 2 + head * calls["lm_head"]) / (within + head)
    assert calls[blocks[0]] == calls[blocks[1]]
    assert run <= table.provenance.forward_passes <= passes
    assert run > 0.85 * table.provenance.forward_passes
    assert table.provenance.backward_passes == 0


def test_too_few_passes(tiny_llama):
    """Guards the refusal: one line with the least number, which suffices, as two less do not."""
    with pytest.raises(InputError, match="passes=8 do not suffice here: use at least") as caught:
        scored(tiny_llama, 8, text())
    least = int(str(caught.value).split()[-1])
    assert scored(tiny_llama, least, text()).provenance.forward_passes <= least
    with pytest.raises(InputError, match=f"use at least {least}"):
        scored(tiny_llama, least - 2, text())
    assert_nothing_left(tiny_llama)


def test_one_seed_one_result(tiny_llama):
    """Guards determinism: equal seeds give equal scores bit for bit, other seeds others."""
    first, again, other = (numbers(scored(tiny_llama, 100, text(), seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------ what it leaves behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaves_the_model_alone(tiny_llama, dtype):
    """Guards weights bit for bit, hooks, forwards and flags, also when a batch fails midway."""
    tiny_llama.to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in tiny_llama.named_parameters()}
    batches = text()
    scored(tiny_llama, 100, batches)
    assert_nothing_left(tiny_llama)
    batches[1]["input_ids"] = torch.full((2, 9), 10**6)
    with pytest.raises(InputError, match="rejects batch 1"):
        scored(tiny_llama, 600, batches)
    assert_nothing_left(tiny_llama)
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(before[name], parameter)
        assert not parameter.is_inference()
        assert parameter.requires_grad
        assert parameter.grad is None


def test_forwards_of_others_are_kept(tiny_llama):
    """Guards models that accelerate has spread over devices: it keeps a forward of its own on a block."""
    block = tiny_llama.model.layers[1]
    original = block.forward
    block.forward = theirs = lambda *args, **kwargs: original(*args, **kwargs)
    scored(tiny_llama, 100, text())
    assert block.forward is theirs


def test_forward_only(tiny_llama):
    """Guards 'forward passes only': every run of every layer is in inference mode, where no graph can exist."""
    seen = Counter()
    for module in tiny_llama.modules():
        module.register_forward_pre_hook(lambda *_: seen.update([torch.is_inference_mode_enabled()]))
    table = scored(tiny_llama, 100, text())
    assert set(seen) == {True}
    for part in (table.scores, table.noise, *table.halves):
        assert not any(values.is_inference() for axes in part.values() for values in axes.values())


# ------------------------------------------------------------------------------------ which models


def test_half_precision(tiny_llama):
    """Guards coarse dtypes: responses are large enough to be seen, in bf16 and in fp16, and scores are float32."""
    exact = scored(tiny_llama, 300, text(1))
    for dtype in (torch.bfloat16, torch.float16):
        rough = scored(tiny_llama.to(dtype), 300, text(1))
        assert rough.provenance.signal_to_noise > 1
        assert numbers(rough).dtype == torch.float32
        assert agreement(exact, rough, "row").median.spearman > 0.8


def test_quantised(tiny_llama):
    """Guards bitsandbytes layers: scores are those of a full model that holds the dequantised weights."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    held = {}
    for name, module in linear_modules(tiny_llama).items():
        sizes = (module.in_features, module.out_features)
        layer = Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(module.state_dict())
        layer = layer.to("cpu").eval()
        held[name] = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        tiny_llama.set_submodule(name, layer)
    table = scored(tiny_llama, 150, text())
    for name, values in held.items():
        layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
        layer.weight.data = values
        tiny_llama.set_submodule(name, layer)
    torch.testing.assert_close(numbers(table), numbers(scored(tiny_llama, 150, text())), rtol=1e-2, atol=1e-6)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
PATCHES = {"image_size": 16, "patch_size": 4, "num_labels": 3}
MODELS = {
    "gpt2": lambda: (
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=3)),
        text(),
    ),
    "bert": lambda: (
        BertForSequenceClassification(BertConfig(**SIZES, num_labels=4, pad_token_id=0)),
        text(classes=4),
    ),
    "deberta": lambda: (  # its projections run on tokens and on relative positions
        DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **RELATIVE, num_labels=4, pad_token_id=0)),
        text(classes=4),
    ),
    "albert": lambda: (  # one block that runs twice
        AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=12, num_labels=4, pad_token_id=0)),
        text(classes=4),
    ),
    "vit": lambda: (
        ViTForImageClassification(ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **PATCHES)),
        pictures(),
    ),
    "resnet": lambda: (  # convolutions, in blocks of different shapes
        ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
        pictures(),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    """Guards other kinds of layers and blocks: all scores are finite and positive, and near the direct gradient's."""
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    table = scored(model.eval(), 600, batches)
    assert bool(numbers(table).isfinite().all())
    assert all(axes["row"].mean() > 0 for axes in table.scores.values())
    assert set(table.scores) == set(scored_weights(model))
    rule = "taylor" if name in ("resnet", "albert") else "direct-taylor"
    exact = scoring.score(model, criterion(rule), batches)
    assert agreement(exact, table, "row").overall.spearman > 0.2
    assert_nothing_left(model)


def test_adapters(tiny_llama):
    """Guards PEFT models, whose forward does not say that it takes a cache: blocks run again without one."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2)).eval()
    table = scored(model, 100, text(), target_modules=["up_proj", "down_proj"])
    assert len(table.scores) == 4
    assert all(bool((axes["row"] > 0).all()) for axes in table.scores.values())


def test_no_mask(tiny_llama):
    """Guards batches without an attention mask: all tokens are real, as a mask of ones says."""
    bare = text(mask=False)
    masked = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in bare]
    for passes in (40, 200):
        torch.testing.assert_close(
            numbers(scored(tiny_llama, passes, bare)),
            numbers(scored(tiny_llama, passes, masked)),
            rtol=1e-2,
            atol=1e-6,
        )


def test_padding_content_is_irrelevant(tiny_llama):
    """Guards the mask: other tokens in the padding change no score."""
    batches = text(1)
    for passes in (40, 200):
        first = scored(tiny_llama, passes, batches)
        batches[0]["input_ids"] = batches[0]["input_ids"].masked_fill(batches[0]["attention_mask"] == 0, 50)
        torch.testing.assert_close(numbers(first), numbers(scored(tiny_llama, passes, batches)), rtol=1e-2, atol=1e-6)


class Experts(nn.Module):
    """A block that sends each token to one of three experts by what it holds; to the last of them none goes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        y = x + self.first(x).tanh()
        flat = y.flatten(0, 1).clone()
        chosen = (flat[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()
            if len(mine):
                flat[mine] = flat[mine] + expert(flat[mine]).tanh()
        return (flat.view_as(y), chosen)  # a tuple, as many blocks return


class Stack(nn.Module):
    """Blocks of any kind between an embedding and a loss of every token."""

    def __init__(self, blocks):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 12)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(12, 97)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="none")


def token_losses(model, batch):
    """Parts that sum to the mean loss, one for each token."""
    return model(**batch) / batch["labels"].numel()


def plain_batches(length=40):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(97, (2, 2, length), generator=generator)
    return [{"input_ids": row, "labels": row.roll(-1, 1)} for row in rows]


def test_experts():
    """Guards experts: token counts that change from run to run, one seed one result, zeros where no token came."""
    model = Stack([Experts(), Experts()]).eval()
    first, again = (scored(model, 300, plain_batches(), loss=token_losses) for _ in range(2))
    assert torch.equal(numbers(first), numbers(again))
    for block in (0, 1):
        used, unused = (first.scores[f"blocks.{block}.experts.{expert}"] for expert in (0, 2))
        assert bool((used["row"] > 0).all())
        assert not unused["row"].any()
        assert not unused["column"].any()
    assert bool(numbers(first).isfinite().all())


def test_a_block_in_several_places():
    """Guards shared blocks: they are scored once, over all their runs, and their forward is given back."""
    shared = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    model = Stack([shared, shared, shared]).eval()
    table = scored(model, 300, plain_batches(), loss=token_losses)
    assert list(table.scores) == ["blocks.0.0", "blocks.0.2"]
    exact = scoring.score(model, criterion("taylor"), plain_batches(), loss=token_losses)
    assert agreement(exact, table, "row").median.spearman > 0.3
    assert_nothing_left(model)


class Forgetful(nn.Module):
    """A block that changes what it was given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        return x.add_(self.linear(x))


def test_refusals(tiny_llama):
    """Guards the one-line answers where blocks cannot be run again and again, or are not what is scored."""
    with pytest.raises(InputError, match="two outputs for one input: use zo-taylor:estimator=spsa"):
        scored(Stack([Forgetful(), Forgetful()]).eval(), 64, plain_batches(), loss=token_losses)
    with pytest.raises(InputError, match=r"blocks.0 is one: use zo-taylor:estimator=spsa"):
        scored(Stack([nn.Linear(12, 12), nn.Linear(12, 12)]).eval(), 64, plain_batches(), loss=token_losses)
    with pytest.raises(InputError, match="lm_head is in none: use zo-taylor:estimator=spsa"):
        scored(tiny_llama, 64, text(), target_modules=["lm_head", "q_proj"])
    torch.manual_seed(0)
    with pytest.raises(InputError, match="needs a model of blocks"):
        scored(nn.Linear(4, 3), 64, [{"x": torch.randn(2, 4)}], loss=lambda m, batch: m(batch["x"]).sum())
