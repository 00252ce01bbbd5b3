"""Removing a group equals masking it, on every architecture of the table; writes ``docs/architectures.md``."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, SIZES, Architecture, transformer
from exactness import VISIBLE, Finding, expert_parameters, findings, partners, violations, with_group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from rowscope import InputError, ModelGraph, trace
from rowscope.graph import CouplingGroup, IndexMap

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
COMMAND = "python tests/graph/test_architectures.py --write"
PARTS = ("feed-forward", "heads", "residual")
FINEST = -6
"""Powers of ten below this are rounding, which differs between machines."""


@dataclass(frozen=True)
class Case:
    """An architecture with its graph and all that was tried on it."""

    name: str
    model: nn.Module = field(repr=False)
    graph: ModelGraph = field(repr=False)
    findings: tuple[Finding, ...] = field(repr=False)

    def of(self, part: str) -> list[Finding]:
        """What was tried of ``feed-forward``, ``heads`` or ``residual``."""
        return [finding for finding in self.findings if finding.part == part]


@functools.cache
def case_of(name: str) -> Case:
    """The case of that name in the table of architectures."""
    architecture = ARCHITECTURES[name]
    model, graph = traced(architecture)
    return Case(name, model, graph, tuple(findings(model, graph, architecture.inputs)))


def traced(architecture: Architecture) -> tuple[nn.Module, ModelGraph]:
    """A random model and its graph."""
    model = architecture.model()
    graph = trace(model) if architecture.is_transformer else trace(model, architecture.inputs)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default one has alignment limits
    return model, graph


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request) -> Case:
    """Every architecture, one after the other."""
    return case_of(request.param)


@pytest.mark.parametrize("part", PARTS)
def test_removing_equals_masking(case, part):
    """Guards the promise of the graph: each group, cut out of the weights, leaves what masking it leaves."""
    inexact = [str(finding) for finding in case.of(part) if not finding.exact]
    assert not inexact, "\n".join(inexact)


def test_groups_are_consistent(case):
    """Guards the invariants: indices unique and in range, heads equal, partners mutual, readers and writers there."""
    found = violations(case.model, case.graph)
    assert not found, "\n".join(found)


def test_every_part_is_found(case):
    """Guards against groups that vanish: a transformer has all three parts, each block a feed-forward and heads."""
    if not ARCHITECTURES[case.name].is_transformer:
        assert case.findings
        return
    assert all(case.of(part) for part in PARTS)
    assert case.graph.blocks
    for block in case.graph.blocks:
        kinds = {g.kind for g in case.graph.groups if g.kind != "residual" and _lies_in(g, block)}
        assert {"mlp", "attention-vo", "attention-qk"} <= kinds, block


def _lies_in(group, block):
    return any(member.module.startswith(f"{block}.") for member in group.members)


def test_every_layer_is_covered(case):
    """Guards completeness: within blocks every row and column of a layer is in a group, and so is every filter."""
    covered: dict[tuple[str, int], set[int]] = {}
    for group in case.graph.groups:
        for member in group.members:
            indices = covered.setdefault((member.port.parameter, member.port.dim), set())
            indices.update(member.index.table.ravel().tolist())
    dims = {
        name: (0,) if isinstance(layer, nn.Conv2d) else (0, 1)
        for name, layer in case.model.named_modules()
        if isinstance(layer, nn.Conv2d)
        or (isinstance(layer, nn.Linear | Conv1D) and name.startswith(tuple(f"{b}." for b in case.graph.blocks)))
    }
    missing = [
        f"{name}.weight, dim {dim}"
        for name in dims
        for dim in dims[name]
        if covered.get((f"{name}.weight", dim)) != set(range(case.graph.shapes[f"{name}.weight"][dim]))
    ]
    assert not missing, "\n".join(missing)


def test_traced_twice_is_traced_alike(case):
    """Guards determinism: the graph hangs on the architecture alone."""
    assert traced(ARCHITECTURES[case.name])[1] == case.graph


BREAKABLE = ("Llama, grouped query (2)", "GPT-2", "Mixtral", "Swin, classifier", "CNN, residual")
"""Models whose layers, between them, are of every kind."""
NO_MATTER = "k_proj.bias"
"""Adds the same to all scores of a query (where nothing rotates), so no test could tell which index it has."""


def alone(graph: ModelGraph, group: CouplingGroup) -> ModelGraph:
    """The graph with only the groups that a removal from this one needs."""
    experts = expert_parameters(group)
    alike = [other for other in graph.groups if experts & expert_parameters(other)]
    return replace(graph, groups=tuple(alike or partners(graph, group)))


def assert_noticed(name: str, breaks: Callable[[CouplingGroup, int], CouplingGroup], but: str = " ") -> None:
    """Every group, broken at any of its members, fails the test of exactness; `but` those of that name."""
    case = case_of(name)
    for group in case.graph.groups:
        for number, member in enumerate(group.members):
            if member.shared or member.port.parameter.endswith(but):
                continue
            graph = with_group(alone(case.graph, group), breaks(group, number))
            tried = findings(case.model, graph, ARCHITECTURES[name].inputs)
            assert not all(finding.exact for finding in tried), (group.id, member.port)


@pytest.mark.parametrize("name", BREAKABLE)
def test_a_missing_member_is_noticed(name):
    """Guards the tests above: they fail if a group lacks any one of its members."""

    def without(group, number):
        return replace(group, members=group.members[:number] + group.members[number + 1 :])

    assert_noticed(name, without)


@pytest.mark.parametrize("name", BREAKABLE)
def test_a_wrong_index_is_noticed(name):
    """Guards the tests above: they fail if any one member of a group is a channel late."""

    def late(group, number):
        member = group.members[number]
        late = replace(member, index=IndexMap(np.roll(member.index.table, 1, axis=0)))
        return replace(group, members=(*group.members[:number], late, *group.members[number + 1 :]))

    assert_noticed(name, late, but=NO_MATTER)


@st.composite
def decoders(draw) -> Architecture:
    """A decoder of one block of any heads, grouping, widths, ties and biases."""
    model = draw(st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM", "Phi3ForCausalLM"]))
    key_value_heads, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([4, 8, 12]))
    heads = key_value_heads * repeat
    config = SIZES | {
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
        "hidden_size": heads * head_dim, "intermediate_size": draw(st.integers(6, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    if model == "GPTNeoXForCausalLM":
        config |= {"rotary_pct": draw(st.sampled_from([0.5, 1.0])), "attention_bias": draw(st.booleans())}
        config |= {"use_parallel_residual": draw(st.booleans())}
    if model in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        config |= {"head_dim": head_dim, "hidden_size": heads * draw(st.integers(3, 9))}
        config |= {"attention_bias": draw(st.booleans())}
    if model == "LlamaForCausalLM":
        config |= {"mlp_bias": draw(st.booleans())}
    return transformer(f"{model} {config}", model, config)


@given(decoders())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_decoder(architecture):
    """Guards the same promises at sizes that nobody chose."""
    model, graph = traced(architecture)
    assert not violations(model, graph)
    tried = findings(model, graph, architecture.inputs)
    assert {finding.part for finding in tried} == set(PARTS)
    inexact = [str(finding) for finding in tried if not finding.exact]
    assert not inexact, "\n".join(inexact)


# The table


def table() -> str:
    """Markdown: what holds of which architecture."""
    lines = [
        "| architecture | groups | feed-forward | heads | residual | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    refused = 0
    for name in ARCHITECTURES:
        try:
            lines.append(_row(case_of(name)))
        except InputError as error:
            refused += 1
            lines.append(f"| {name} | refused: {error} | no | no | no | – |")
    return "\n".join([*lines, "", f"Refused: {refused} of {len(ARCHITECTURES)}.", ""])


def _row(case: Case) -> str:
    differences = [finding.difference for finding in case.findings]
    cells = [_verdict(case.of(part)) for part in PARTS]
    return f"| {case.name} | {len(case.graph.groups)} | {' | '.join(cells)} | {_power_of_ten(max(differences))} |"


def _verdict(tried: list[Finding]) -> str:
    if not tried:
        return "–"
    return "yes" if all(finding.exact for finding in tried) else "no"


def _power_of_ten(number: float) -> str:
    if not math.isfinite(number):
        return "no result"
    return f"< 1e{max(FINEST, math.floor(math.log10(max(number, 1e-9))) + 1)}"


def page() -> str:
    """``docs/architectures.md``."""
    return f"""# Architectures

A group of channels is right when *removing* it (slicing its rows and columns out of the weights) gives what *masking*
it gives (zeroing what reads it, in a model of full shape). This page lists the models on which that is tested, every
group of each: tiny random ones of two blocks, no two sizes equal where the configuration allows it. The columns:

- *feed-forward*: channels of feed-forward parts, of experts, of convolutions. A third of each group is removed.
- *heads*: one whole attention head goes, with all query heads that share its keys and values, out of queries, keys,
  values, output and position biases. Besides, if half the channels of values and output (or queries and keys) change
  signs, the output stays the same; this is the only test where there is but one key/value head.
- *residual*: dimensions of the residual stream go, through all blocks, norms and embeddings.
- *largest difference* between the sliced and the masked model, in parts of the output's largest number. The mask
  itself changes more than {VISIBLE:g} of that number.

A dash: the model has no such part.

{table()}
Made by `{COMMAND}`; `tests/graph/test_architectures.py` fails if it does not hold any more.
"""


def verdicts(markdown: str) -> dict[str, list[str]]:
    """Architecture -> its cells of yes and no, as a page says."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: row[2:5] for row in rows[1:]}


def test_the_page_says_what_holds():
    """Guards ``docs/architectures.md``: it lists the architectures of the table, and what is true of them."""
    assert verdicts(PAGE.read_text(encoding="utf-8")) == verdicts(table()), f"run {COMMAND}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table())
