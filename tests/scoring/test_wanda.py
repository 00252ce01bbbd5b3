"""Wanda's weights times activations, against activations kept whole."""

import torch

from rowscope import criterion, scoring
from rowscope.models import linear_modules
from rowscope.records import ScoreTable


def batches(lengths=(9, 7, 5)):
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        tokens = torch.randint(3, 97, (2, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, length - 3 :] = 0  # the second example is shorter by three
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})
    return made


def inputs_by_hand(model, names, data) -> dict[str, list[torch.Tensor]]:
    """Every example alone and without its padding: what comes into each layer, ``(tokens, in_features)`` a batch."""
    seen = {name: [] for name in names}
    for batch in data:
        parts = {name: [] for name in names}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda _, args, __, to=to: to.append(args[0]))
            for name, to in parts.items()
        ]
        with torch.no_grad():
            for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=tokens[mask != 0].unsqueeze(0))
        for hook in hooks:
            hook.remove()
        for name in names:
            seen[name].append(torch.cat([part[0] for part in parts[name]]))
    return seen


def test_norms_are_of_real_tokens(tiny_llama):
    """Guards |w|·‖x‖ over rows and columns, its halves, and that padding does not count."""
    data = batches()
    modules = linear_modules(tiny_llama)
    table = scoring.score(tiny_llama, criterion("wanda"), data)
    seen = inputs_by_hand(tiny_llama, modules, data)
    for name, module in modules.items():
        weight = module.weight.detach().abs()
        for half, chosen in ((table.scores, (0, 1, 2)), (table.halves[0], (0, 2)), (table.halves[1], (1,))):
            norms = torch.linalg.vector_norm(torch.cat([seen[name][number] for number in chosen]), dim=0)
            torch.testing.assert_close(half[name]["row"], weight @ norms, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(half[name]["column"], weight.sum(0) * norms, rtol=1e-4, atol=1e-6)
    assert (table.provenance.forward_passes, table.provenance.backward_passes) == (3, 0)


def test_padding_content_is_irrelevant(tiny_llama):
    """Guards the mask bit by bit: other tokens in the padding change no score."""
    data = batches((9,))
    first = scoring.score(tiny_llama, criterion("wanda"), data)
    data[0]["input_ids"] = data[0]["input_ids"].masked_fill(data[0]["attention_mask"] == 0, 50)
    again = scoring.score(tiny_llama, criterion("wanda"), data)
    for name, axes in first.scores.items():
        torch.testing.assert_close(again.scores[name]["row"], axes["row"], rtol=1e-6, atol=0)
    assert first.halves == ()


def test_half_precision_does_not_overflow(tiny_llama):
    """Guards the accumulators: activations whose squares are beyond float16 still have finite norms."""
    data = batches((9,))
    tiny_llama.half()
    with torch.no_grad():
        tiny_llama.model.layers[0].input_layernorm.weight.mul_(1000)
    table = scoring.score(tiny_llama, criterion("wanda"), data)
    row = table.scores["model.layers.0.self_attn.v_proj"]["row"]
    assert row.dtype == torch.float32
    assert row.isfinite().all()
    assert row.max() > 1000


def test_works_where_nothing_may_be_differentiated(tiny_llama):
    """Guards 'forward only', and that a later exact criterion still works on the same model."""
    tiny_llama.requires_grad_(False)
    scoring.score(tiny_llama, criterion("wanda"), batches())
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())
    exact = scoring.score(tiny_llama, criterion("taylor"), batches())
    assert exact.scores["model.layers.1.mlp.down_proj"]["row"].min() > 0


def test_survives_a_round_trip(tiny_llama, tmp_path):
    """Guards scores made in inference mode: they are ordinary tensors, saved and read back."""
    table = scoring.score(tiny_llama, criterion("wanda"), batches())
    table.save(tmp_path / "scores.safetensors")
    again = ScoreTable.load(tmp_path / "scores.safetensors")
    name = next(iter(table.scores))
    assert not table.scores[name]["row"].is_inference()
    assert torch.equal(again.scores[name]["column"], table.scores[name]["column"])


def test_embedding_counts_tokens(tiny_llama):
    """Guards an embedding's one-hot inputs: column j is |w_j| times the root of token j's count, without padding."""
    data = batches()
    table = scoring.score(tiny_llama, criterion("wanda"), data, target_modules=["embed_tokens"])
    real = torch.cat([batch["input_ids"][batch["attention_mask"] != 0] for batch in data])
    norms = torch.tensor([(real == token).sum() for token in range(97)]).float().sqrt()
    weight = tiny_llama.model.embed_tokens.weight.detach().abs()
    torch.testing.assert_close(table.scores["model.embed_tokens"]["column"], weight.sum(1) * norms)
    torch.testing.assert_close(table.scores["model.embed_tokens"]["row"], weight.T @ norms)
