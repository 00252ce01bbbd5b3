"""Squared gradients: fisher, hessian and gradient-norm against torch.autograd.grad."""

import pytest
import torch

from rowscope import InputError, criterion, scoring
from rowscope.models import linear_modules


@pytest.fixture
def batches():
    """Batches of unequal size, with padding, so that examples and batches weigh differently."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in (3, 2):
        tokens = torch.randint(3, 97, (size, 9), generator=generator)
        labels, mask = tokens.clone(), torch.ones_like(tokens)
        labels[0, :4] = -100
        labels[1, 6:], mask[1, 6:] = -100, 0
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return made


def squared_gradients(model, batches, per) -> dict[str, torch.Tensor]:
    """Module name -> squared gradients of each example (or batch), stacked, by torch.autograd.grad."""
    modules = linear_modules(model)
    parts = []
    for batch in batches:
        size = len(batch["labels"]) if per == "sample" else 1
        rows = [slice(n, n + 1) for n in range(size)] if per == "sample" else [slice(None)]
        parts += [{name: value[row] for name, value in batch.items()} for row in rows]
    weights = [module.weight for module in modules.values()]
    gradients = [torch.autograd.grad(model(**part).loss, weights) for part in parts]
    return {name: torch.stack([g[n] for g in gradients]).square() for n, name in enumerate(modules)}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_fisher(tiny_llama, batches, per, weighted):
    """Guards both meanings of E[g²], with and without w², their halves, and the passes that are counted."""
    table = scoring.score(tiny_llama, criterion(f"fisher:per={per},weighted={weighted}"), batches)
    for name, squares in squared_gradients(tiny_llama, batches, per).items():
        values = squares * tiny_llama.get_submodule(name).weight.detach().square() if weighted else squares
        for axis, dim in (("row", 1), ("column", 0)):
            close(table.scores[name][axis], values.mean(0).sum(dim))
            close(table.halves[0][name][axis], values[0::2].mean(0).sum(dim))
            close(table.halves[1][name][axis], values[1::2].mean(0).sum(dim))
    passes = 5 if per == "sample" else 2
    assert (table.provenance.forward_passes, table.provenance.backward_passes) == (passes, passes)


def test_hessian_is_the_fisher_of_examples(tiny_llama, batches):
    """Guards Torch-Pruning's documented formula w²·h, h the mean over all examples and not the last one's."""
    table = scoring.score(tiny_llama, criterion("hessian"), batches)
    for name, squares in squared_gradients(tiny_llama, batches, "sample").items():
        weight = tiny_llama.get_submodule(name).weight.detach()
        close(table.scores[name]["row"], (weight**2 * squares.mean(0)).sum(1))
    assert table.provenance.criterion == "hessian"
    assert table.provenance.backward_passes == 5


def test_gradient_norm(tiny_llama, batches):
    """Guards the root mean square, over batches, of the norm of a row's and a column's gradient."""
    table = scoring.score(tiny_llama, criterion("gradient-norm"), batches)
    for name, squares in squared_gradients(tiny_llama, batches, "batch").items():
        for axis, dim in (("row", 2), ("column", 1)):
            norms = squares.sum(dim).sqrt()
            close(table.scores[name][axis], norms.square().mean(0).sqrt())
            close(table.halves[0][name][axis], norms[0])
            close(table.halves[1][name][axis], norms[1])
    assert (table.provenance.forward_passes, table.provenance.backward_passes) == (2, 2)


def test_gradient_norm_is_the_gain_of_a_step(tiny_llama, batches):
    """Guards the claim: a small unit step of one row down its gradient lowers the loss by about its score."""
    name, row, step = "model.layers.0.mlp.up_proj", 7, 0.02
    score = scoring.score(tiny_llama, criterion("gradient-norm"), batches[:1]).scores[name]["row"][row]
    weight = tiny_llama.get_submodule(name).weight
    (gradient,) = torch.autograd.grad(tiny_llama(**batches[0]).loss, weight)
    direction, losses = gradient[row] / gradient[row].norm(), []
    with torch.no_grad():
        for move in (step, -2 * step):  # to both sides, which cancels the second order
            weight[row] += move * direction
            losses.append(float(tiny_llama(**batches[0]).loss))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(score), rel=1e-2)


def test_examples_without_labels_do_not_count(tiny_llama, batches):
    """Guards the mean: an example whose labels are all ignored has no loss; it is left out, not a NaN."""
    batches[0]["labels"][2] = -100
    table = scoring.score(tiny_llama, criterion("fisher"), batches)
    assert table.provenance.forward_passes == 4
    assert all(axes["row"].isfinite().all() for axes in table.scores.values())
    for batch in batches:
        batch["labels"][:] = -100
    with pytest.raises(InputError, match="no example has a label"):
        scoring.score(tiny_llama, criterion("fisher"), batches)


def test_errors_name_the_batch(tiny_llama, batches):
    """Guards messages: the number is that of the caller's batch, not of an example."""
    batches[1]["input_ids"][0, 0] = 10**6
    with pytest.raises(InputError, match="rejects batch 1 "):
        scoring.score(tiny_llama, criterion("fisher"), batches)
    with pytest.raises(InputError, match="did you mean 'sample'"):
        criterion("fisher:per=samples")


def test_a_layer_that_one_half_never_uses(batches):
    """Guards sparse experts: a layer without any token in a half, or in the first batch, counts as zero there."""

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)])

        def forward(self, x, expert):
            return {"loss": self.experts[int(expert[0])](x).square().mean()}

    torch.manual_seed(0)
    model = Routed()
    data = [{"x": torch.randn(2, 4), "expert": torch.tensor([n, n])} for n in (0, 1)]
    table = scoring.score(model, criterion("taylor"), data, loss=lambda model, batch: model(**batch)["loss"])
    assert set(table.scores) == {"experts.0", "experts.1"}
    assert (table.halves[1]["experts.0"]["row"] == 0).all()
    torch.testing.assert_close(table.scores["experts.1"]["row"] * 2, table.halves[1]["experts.1"]["row"])
