"""Every criterion against an independent computation of its formula."""

import pytest
import torch

from rowscope import InputError, criterion, scoring
from rowscope.models import linear_modules


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (3, 2, 9), generator=generator)
    labels = tokens.clone()
    labels[:, 0, :4] = -100
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(tokens, labels, strict=True)
    ]


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude(tiny_llama, p):
    """Guards sum |w|^p over rows and columns, and the L2 norms kept beside the scores."""
    table = scoring.score(tiny_llama, criterion(f"magnitude:p={p}"))
    for name, module in linear_modules(tiny_llama).items():
        weight = module.weight.detach()
        assert torch.allclose(table.scores[name]["row"], (weight.abs() ** p).sum(1))
        assert torch.allclose(table.scores[name]["column"], (weight.abs() ** p).sum(0))
        assert torch.allclose(table.weight_norm[name]["row"], torch.linalg.vector_norm(weight, dim=1))
        assert torch.allclose(table.weight_norm[name]["column"], torch.linalg.vector_norm(weight, dim=0))
    assert table.provenance.forward_passes == 0


def test_taylor(tiny_llama, batches):
    """Guards the streamed scores and halves against gradients of torch.autograd.grad, batch by batch."""
    modules = linear_modules(tiny_llama)
    table = scoring.score(tiny_llama, criterion("taylor"), batches)
    weights = [module.weight for module in modules.values()]
    products = []
    for batch in batches:
        gradients = torch.autograd.grad(tiny_llama(**batch).loss, weights)
        products.append([(w * g).abs().detach() for w, g in zip(weights, gradients, strict=True)])
    for number, name in enumerate(modules):
        every = torch.stack([product[number] for product in products])
        for axis, dim in (("row", 1), ("column", 0)):
            torch.testing.assert_close(table.scores[name][axis], every.mean(0).sum(dim))
            torch.testing.assert_close(table.halves[0][name][axis], every[[0, 2]].mean(0).sum(dim))
            torch.testing.assert_close(table.halves[1][name][axis], every[1].sum(dim))
    assert (table.provenance.forward_passes, table.provenance.backward_passes) == (3, 3)


def test_multivariable_taylor(tiny_llama, batches):
    """Guards the other form: the sum over the row first, then the absolute value, batch by batch."""
    modules = linear_modules(tiny_llama)
    table = scoring.score(tiny_llama, criterion("taylor:multivariable=true"), batches)
    weights = [module.weight for module in modules.values()]
    gradients = [torch.autograd.grad(tiny_llama(**batch).loss, weights) for batch in batches]
    for number, name in enumerate(modules):
        products = torch.stack([weights[number].detach() * every[number] for every in gradients])
        for axis, dim in (("row", 2), ("column", 1)):
            expected = products.sum(dim).abs().mean(0)
            torch.testing.assert_close(table.scores[name][axis], expected, rtol=1e-4, atol=1e-8)


EXACT = ["taylor", "wanda", "fisher", "fisher:per=batch", "hessian", "gradient-norm", "direct-taylor"]


@pytest.mark.parametrize("name", EXACT)
def test_scores_of_half_precision_models(tiny_llama, batches, name):
    """Guards bf16 models: scores are float32, finite, non-negative and near those of the same model in float32."""
    tiny_llama.to(torch.bfloat16)
    rough = scoring.score(tiny_llama, criterion(name), batches)
    exact = scoring.score(tiny_llama.float(), criterion(name), batches)
    for module, axes in exact.scores.items():
        for axis, expected in axes.items():
            found = rough.scores[module][axis]
            assert found.dtype == torch.float32
            assert bool((found >= 0).all())
            assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["taylor", "direct-taylor"])
def test_forwards_of_others_are_kept(tiny_llama, batches, name):
    """Guards models that accelerate has spread over devices: it keeps a forward of its own on a block."""
    block, calls = tiny_llama.model.layers[1], []
    original = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    theirs = block.forward
    scoring.score(tiny_llama, criterion(name), batches)
    assert block.forward is theirs
    assert calls


def test_taylor_leaves_the_model_alone(tiny_llama, batches):
    """Guards flags, gradients and hooks: nothing of the scoring stays behind, also after a failure."""
    tiny_llama.model.norm.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in tiny_llama.parameters()]
    batches[1]["labels"][:] = -100  # the mean over no token is NaN
    with pytest.raises(InputError, match="loss of batch 1 is nan"):
        scoring.score(tiny_llama, criterion("taylor"), batches)
    assert [parameter.requires_grad for parameter in tiny_llama.parameters()] == flags
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in tiny_llama.parameters())


@pytest.mark.parametrize("name", ["random", *EXACT, "zo-taylor:passes=60", "zo-taylor:estimator=spsa,passes=4"])
def test_one_seed_one_result(tiny_llama, batches, name):
    """Guards determinism: equal seeds give equal scores, and where chance decides, other seeds give others."""
    first, again, other = (scoring.score(tiny_llama, criterion(name), batches, seed=seed) for seed in (0, 0, 1))
    module = next(iter(first.scores))
    assert torch.equal(first.scores[module]["row"], again.scores[module]["row"])
    assert torch.equal(first.scores[module]["row"], other.scores[module]["row"]) == (name in EXACT)


def test_exact_scores_are_stable_on_the_demo_model(demo, demo_batches):
    """Guards the demo's story: Taylor's halves agree."""
    exact = scoring.score(demo.model, criterion("taylor"), demo_batches)
    first, second = (
        torch.cat([half[m]["row"] / half[m]["row"].mean() for m in exact.scores]) for half in exact.halves
    )
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] > 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magntude", "did you mean 'magnitude'"),
        ("magnitude:p=3", "p=3 is not offered"),
        ("magnitude:q=1", "unknown setting of magnitude 'q'"),
        ("magnitude:p=x", "is no int"),
        ("magnitude:p", "has no value"),
        ("random:seed=1", "has no settings"),
        ("zo-taylor:passes=3", "must be even"),
        ("zo-taylor:epsilon=0", "must be greater than 0"),
        ("zo-taylor:epsilon=nan", "must be greater than 0"),
        ("zo-taylor:estimator=spas", "did you mean 'spsa'"),
    ],
)
def test_bad_names_and_settings(text, message):
    """Guards the one-line answers to a wrong criterion."""
    with pytest.raises(InputError, match=message):
        criterion(text)


def test_data_is_asked_for(tiny_llama):
    """Guards against scoring nothing."""
    with pytest.raises(InputError, match="needs data"):
        scoring.score(tiny_llama, criterion("taylor"))


def test_settings_are_spelled_back():
    """Guards provenance: a criterion's spelling builds the same criterion."""
    from rowscope import settings

    for text in (
        "magnitude:p=1",
        "taylor",
        "taylor:multivariable=True",
        "zo-taylor:passes=8,epsilon=0.01",
        "zo-taylor:estimator=spsa,passes=8",
    ):
        rule = criterion(text)
        assert settings.spell(rule.name, rule) == text
        assert criterion(settings.spell(rule.name, rule)) == rule
