"""The picture of a block: everything that is in the block is in the picture."""

import itertools

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from rowscope import InputError, trace
from rowscope.analysis.boxes import boxes, branches
from rowscope.analysis.structure import block_picture, structure_figure

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}


@pytest.fixture
def graph(tiny_llama):
    """Of a model with grouped-query attention."""
    return trace(tiny_llama)


def words(figure):
    """All text of a figure."""
    return " | ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_every_weight_of_the_block_is_drawn(graph):
    """Guards completeness: seven matrices with their shapes, four groups in words."""
    text = words(structure_figure(graph, "model.layers.1"))
    for word in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "80 × 48", "48 × 60"):
        assert word in text
    for word in ("residual stream (48)", "query/key pairs, 2 heads × 5", "value/output channels, 2 heads × 10"):
        assert word in text
    assert "feed-forward channels (80)" in text
    assert "one of 2 identical blocks" in text


def test_branches_are_attention_and_feed_forward(graph):
    """Guards the layout: what is joined by groups stands together, what writes to the stream last."""
    parts = branches(graph, "model.layers.0", graph.group("residual"))
    assert [part.title for part in parts] == ["attention · self_attn", "feed-forward · mlp"]
    assert parts[0].boxes[-1].label[0] == "o_proj"
    assert len(boxes(graph, "model.layers.0")) == 7


def test_a_model_without_blocks_is_drawn_as_groups():
    """Guards plain modules: each group a card."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    text = words(structure_figure(trace(model, torch.zeros(1, 4))))
    assert "2 coupled groups" in text
    assert "8 channels" in text
    assert "6 channels" in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_file_is_written_and_the_same_twice(graph, tmp_path, suffix):
    """Guards the file: of its kind, and reproducible byte for byte."""
    paths = [tmp_path / f"{name}.{suffix}" for name in ("first", "second")]
    for path in paths:
        block_picture(graph, path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_unknown_blocks_are_refused(graph, tmp_path):
    """Guards the one-line answer, with nothing written."""
    with pytest.raises(InputError, match="unknown block"):
        block_picture(graph, tmp_path / "x.png", "model.layers.7")
    assert not (tmp_path / "x.png").exists()


def test_nothing_covers_anything_else():
    """Guards legibility: no two labels of a picture overlap, and none leaves it, also with long names and experts."""
    mixture = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    t5 = T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4)
    bert = BertConfig(**SIZES, num_attention_heads=4)
    models = MixtralForCausalLM(mixture), T5ForConditionalGeneration(t5), BertModel(bert)
    chain = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(9)))
    graphs = [trace(model) for model in models] + [trace(chain, torch.zeros(1, 3, 4, 4))]
    for graph in graphs:
        figure = structure_figure(graph)
        canvas = FigureCanvasAgg(figure)
        boxes_of_text = [text.get_window_extent(canvas.get_renderer()) for text in figure.axes[0].texts]
        for first, second in itertools.combinations(boxes_of_text, 2):
            assert not first.overlaps(second)
        for box in boxes_of_text:
            assert figure.bbox.contains(*box.min)
            assert figure.bbox.contains(*box.max)


def test_one_expert_stands_for_all():
    """Guards mixtures of experts: one expert with its own shape, and how many there are."""
    mixture = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    text = words(structure_figure(trace(MixtralForCausalLM(mixture))))
    assert "× 3 experts" in text
    assert "40 × 24" in text
    assert text.count("feed-forward channels") == 1


def test_groups_of_one_kind_are_told_apart():
    """Guards the legend: two attentions of one block are named, and boxes of one name within a branch too."""
    t5 = T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4)
    text = words(structure_figure(trace(T5ForConditionalGeneration(t5)), "decoder.block.0"))
    assert "value/output channels, 4 heads × 6 of layer.1.EncDecAttention.vo" in text
    bert = words(structure_figure(trace(BertModel(BertConfig(**SIZES, num_attention_heads=4)))))
    assert "output.dense" in bert
