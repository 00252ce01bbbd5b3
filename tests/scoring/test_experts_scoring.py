"""Rows and columns of experts that a model keeps in 3-D parameters."""

import pytest
import torch

from rowscope import Budget, InputError, criterion, scoring, select, trace
from rowscope.experts import is_fused
from rowscope.models import linear_modules
from rowscope.scoring.vectors import weight_matrices

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
RULES = (
    "random", "magnitude", "wanda", "taylor", "fisher", "fisher:per=batch", "hessian", "gradient-norm",
    "direct-taylor", "zo-taylor:passes=80", "zo-taylor:estimator=spsa,passes=4",
)  # fmt: skip
EXPERTS = "model.layers.{}.mlp.experts"


@pytest.fixture
def batches():
    tokens = torch.randint(3, 41, (3, 2, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


def expert_parameters(model):
    """Parameter name -> the fused parameter, of the weights."""
    return {
        f"{name}.{projection}": getattr(module, projection)
        for name, module in model.named_modules()
        if is_fused(module)
        for projection in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_equals_dense_autograd(make_mixture, batches, kind):
    """Guards scores and halves of every expert against gradients of the whole fused parameters."""
    model = make_mixture(kind)
    table = scoring.score(model, criterion("taylor"), batches)
    parameters = expert_parameters(model)
    products = {name: [] for name in parameters}
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            product = (parameter * gradient).abs().detach()
            products[name].append(product.transpose(1, 2) if kind == "gpt_oss" else product)
    assert len(parameters) == 4
    for name, found in products.items():
        every = torch.stack(found)  # (batches, experts, out_features, in_features)
        for expert in range(4):
            module = f"{name}.{expert}"
            for axis, dim in (("row", 1), ("column", 0)):
                expected = [part[:, expert].mean(0).sum(dim) for part in (every, every[[0, 2]], every[[1]])]
                tables = (table.scores, *table.halves)
                for values, wanted in zip(tables, expected, strict=True):
                    torch.testing.assert_close(values[module][axis], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_every_criterion_scores_experts_and_leaves_the_model(make_mixture, batches, rule):
    """Guards all criteria: every expert is in the table, and modules, flags and bits of the model are as before."""
    model = make_mixture()
    modules = list(model.named_modules())
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = scoring.score(model.train(), criterion(rule), batches)
    names = list(linear_modules(model))
    assert list(table.scores) == names
    assert len(names) == 24
    assert all(bool((scores["row"] > 0).any()) for scores in table.scores.values())
    assert list(table.weight_norm) == names
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(model.named_modules(), modules, strict=True))
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_experts_are_fused_again_after_a_failure(make_mixture, batches):
    """Guards failures: a batch that cannot be scored leaves no experts apart."""
    model = make_mixture()
    modules = list(model.modules())
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    with pytest.raises(InputError, match="loss of batch 1"):
        scoring.score(model, criterion("taylor"), batches)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("rule", ["taylor", "wanda", "fisher", "direct-taylor", "zo-taylor:passes=80"])
def test_an_expert_without_tokens_has_zeros(make_mixture, batches, rule):
    """Guards experts that no token comes to: rows and columns of zeros in the table and in its halves."""
    model = make_mixture("gpt_oss")
    for block in model.model.layers:
        block.mlp.router.bias.data[2] = -1e4
    table = scoring.score(model, criterion(rule), batches)
    for values in (table.scores, *table.halves):
        for name, size in (("gate_up_proj.2", (32, 24)), ("down_proj.2", (24, 16))):
            axes = values[f"{EXPERTS.format(1)}.{name}"]
            assert torch.equal(axes["row"], torch.zeros(size[0]))
            assert torch.equal(axes["column"], torch.zeros(size[1]))
        assert bool((values[f"{EXPERTS.format(1)}.down_proj.1"]["row"] > 0).any())


def test_padding_does_not_count(make_mixture, batches):
    """Guards Wanda's promise where routing has mixed the tokens: experts' scores are those without the padding."""
    model = make_mixture()
    whole = batches[0]
    padded = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in whole.items()}
    padded["labels"][:, 9:] = -100
    plain = scoring.score(model, criterion("wanda"), [whole])
    found = scoring.score(model, criterion("wanda"), [padded])
    for name, axes in plain.scores.items():
        torch.testing.assert_close(found.scores[name]["row"], axes["row"], rtol=1e-4, atol=1e-6)


def test_experts_by_name(make_mixture, batches):
    """Guards targets: an expert is named by the end of its name, or all of a kind by an expression."""
    model = make_mixture()
    table = scoring.score(model, criterion("taylor"), batches, target_modules=["down_proj.3"])
    assert list(table.scores) == [f"{EXPERTS.format(layer)}.down_proj.3" for layer in (0, 1)]
    table = scoring.score(model, criterion("magnitude"), target_modules=[r".*layers\.1.*gate_up_proj\.\d+"])
    assert list(table.scores) == [f"{EXPERTS.format(1)}.gate_up_proj.{expert}" for expert in range(4)]


def test_experts_by_magnitude(make_mixture):
    """Guards transposed weights: a row is an output feature, whichever way the parameter keeps it."""
    model = make_mixture("gpt_oss")
    table = scoring.score(model, criterion("magnitude"))
    weight = model.model.layers[0].mlp.experts.gate_up_proj.detach()[2]  # (in_features, out_features)
    scores = table.scores[f"{EXPERTS.format(0)}.gate_up_proj.2"]
    torch.testing.assert_close(scores["row"], weight.square().sum(0))
    torch.testing.assert_close(scores["column"], weight.square().sum(1))
    assert table.provenance.shapes[f"{EXPERTS.format(0)}.gate_up_proj.2"] == (32, 24)


@pytest.mark.parametrize("pick", ["top", "diverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_coupled_selection(make_mixture, batches, kind, pick):
    """Guards coupled channels: gate and up rows of an expert go with the same columns of its down projection."""
    model = make_mixture(kind)
    table = scoring.score(model, criterion("taylor"), batches)
    options = {"scope": "coupled", "groups": trace(model).groups, "pick": pick}
    selection = select(table, Budget.parse("lora=2"), vectors=weight_matrices(model), **options)
    for layer in (0, 1):
        for expert in range(4):
            down = selection.indices[f"{EXPERTS.format(layer)}.down_proj.{expert}"]["column"]
            rows = selection.indices[f"{EXPERTS.format(layer)}.gate_up_proj.{expert}"]["row"]
            interleaved = kind == "gpt_oss"
            pairs = [2 * down, 2 * down + 1] if interleaved else [down, 16 + down]
            assert rows.tolist() == torch.cat(pairs).sort().values.tolist()
            assert len(down) > 0
    shapes = {name: tuple(linear.weight.shape) for name, linear in linear_modules(model).items()}
    allowed = sum(2 * sum(shape) for shape in shapes.values())
    assert 0.9 * allowed < selection.trainable_parameters() <= allowed
    assert {name: tuple(shape) for name, shape in selection.shapes.items()}.items() <= shapes.items()


def test_top_channels_of_an_expert(make_mixture, batches):
    """Guards the choice itself: an expert's channels of largest mean score over its rows and columns."""
    model = make_mixture()
    table = scoring.score(model, criterion("taylor"), batches)
    selection = select(table, Budget.parse("rank=3"), scope="coupled", groups=trace(model).groups)
    name = EXPERTS.format(1)
    rows = table.scores[f"{name}.gate_up_proj.2"]["row"].unflatten(0, (2, 16)).sum(0)
    scores = rows + table.scores[f"{name}.down_proj.2"]["column"]
    chosen = selection.indices[f"{name}.down_proj.2"]["column"]
    assert chosen.tolist() == scores.topk(len(chosen)).indices.sort().values.tolist()
