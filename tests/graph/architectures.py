"""Tiny random models of every supported architecture, and an input for each.

No two sizes of a model are equal where its configuration allows it, so that no coincidence can hide an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SEED = 3


@dataclass(frozen=True)
class Architecture:
    """A model to be built and something it can be called with.

    Attributes:
        name: as in ``docs/architectures.md``.
        build: makes the model, with fresh weights.
        inputs: keyword arguments of its forward.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]

    @property
    def is_transformer(self) -> bool:
        """Whether it is one of transformers' models, which know an input for themselves."""
        return "x" not in self.inputs

    def model(self) -> nn.Module:
        """A random model in evaluation mode, biases, norms and statistics away from their trivial start."""
        torch.manual_seed(SEED)
        return randomised(self.build()).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Move every weight, so that no bias is zero, no norm is one and no batch statistic is trivial."""
    for parameter in model.parameters():
        parameter.data += (0.1 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 6**0.5  # torch's own start lets a signal fade away
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def tokens(count: int, vocabulary: int = 67) -> Tensor:
    """Two sequences of token ids above all special ones."""
    return torch.randint(3, vocabulary, (2, count), generator=torch.Generator().manual_seed(count))


def images(size: int) -> Tensor:
    """Two square images of three channels."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


TOKENS = {"input_ids": tokens(9)}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = SPECIAL | {
    "vocab_size": 67, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 37, "initializer_range": 0.3,
}  # fmt: skip
WIDE = SIZES | {"hidden_size": 40, "head_dim": 12}
"""Where the configuration allows it, heads x head_dim (4 x 12) is not the hidden size."""
GROUPED = {"num_key_value_heads": 2}
DEBERTA = SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 48}
FALCON = SIZES | {"ffn_hidden_size": 56, "alibi": False}
GPT2 = SPECIAL | {
    "vocab_size": 67, "n_embd": 48, "n_inner": 56, "n_layer": 2, "n_head": 4, "n_positions": 37,
    "initializer_range": 0.3,
}  # fmt: skip
MOE = WIDE | GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 28}
QWEN_MOE = WIDE | GROUPED | {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "mlp_only_layers": [1],
}  # fmt: skip
VIT = {
    "image_size": 12, "patch_size": 4, "num_labels": 5, "hidden_size": 48, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3,
}  # fmt: skip
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "mlp_ratio": 1.5, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
T5 = SPECIAL | {
    "vocab_size": 67, "d_model": 40, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0,
}  # fmt: skip


def transformer(name: str, model: str, settings: dict[str, Any], inputs: dict[str, Tensor] = TOKENS) -> Architecture:
    """A model class of transformers with the settings of its own configuration class."""
    model_class = getattr(transformers, model)
    return Architecture(name, lambda: model_class(model_class.config_class(**copy.deepcopy(settings))), inputs)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, two stages of basic blocks, global pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.layer1 = nn.Sequential(BasicBlock(12, 10, 12, 1), BasicBlock(12, 14, 12, 1))
        self.layer2 = nn.Sequential(BasicBlock(12, 18, 20, 2), BasicBlock(20, 22, 20, 1))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class DepthwiseSeparable(nn.Module):
    """MobileNet's way: depthwise 3x3, then pointwise 1x1."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(8, 14), (14, 22), (22, 18)]
        blocks = [nn.Sequential(_conv(i, i, 3, groups=i), _conv(i, o, 1)) for i, o in widths]
        self.features = nn.Sequential(_conv(3, 8, 3, 2), *blocks, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.fc(self.features(x).flatten(1))


class GroupedConvolutions(nn.Module):
    """ResNeXt's way: between 1x1 convolutions one of four groups, here with unequal widths, around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 14, 3)
        self.reduce = _conv(14, 16, 1)
        self.grouped = _conv(16, 24, 3, groups=4)
        self.expand = _conv(24, 14, 1)
        self.fc = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.stem(x)
        return self.fc((x + self.expand(self.grouped(self.reduce(x)))).mean((2, 3)))


class DenseNet(nn.Module):
    """DenseNet's way: every layer reads the concatenation of all before it through one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, 1, 1)
        self.norm1, self.conv1 = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 3, 1, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 7, 3, 1, 1)
        self.norm3 = nn.BatchNorm2d(23)
        self.fc = nn.Linear(23, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.stem(x)
        x = torch.cat([x, self.conv1(torch.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(torch.relu(self.norm2(x)))], 1)
        return self.fc(torch.relu(self.norm3(x)).mean((2, 3)))


class Flattened(nn.Module):
    """VGG's way: channels and places are flattened into one before the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 9, 3, 1, 1), nn.Conv2d(9, 11, 3, 1, 1)
        self.fc1, self.fc2 = nn.Linear(11 * 4 * 4, 21), nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of 16x16."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


T5_INPUTS = {"input_ids": tokens(9), "decoder_input_ids": tokens(7)}

_ARCHITECTURES = (
    transformer("Llama", "LlamaForCausalLM", WIDE | {"attention_bias": True, "mlp_bias": True}),
    transformer("Llama, grouped query (2)", "LlamaForCausalLM", WIDE | GROUPED),
    transformer("Llama, grouped query (4)", "LlamaForCausalLM", WIDE | {
        "num_attention_heads": 8, "head_dim": 10, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    transformer("Llama, multi-query", "LlamaForCausalLM", WIDE | {"num_key_value_heads": 1}),
    transformer("Mistral", "MistralForCausalLM", WIDE | GROUPED),
    transformer("Qwen2", "Qwen2ForCausalLM", SIZES | GROUPED),
    transformer("Qwen3", "Qwen3ForCausalLM", WIDE | GROUPED),
    transformer("Gemma", "GemmaForCausalLM", WIDE | GROUPED),
    transformer("Gemma 2", "Gemma2ForCausalLM", WIDE | GROUPED),
    transformer("Gemma 3 (text)", "Gemma3ForCausalLM", WIDE | GROUPED),
    transformer("Phi", "PhiForCausalLM", SIZES | GROUPED | {"partial_rotary_factor": 0.5}),
    transformer("Phi-3", "Phi3ForCausalLM", SIZES | GROUPED),
    transformer("GPT-2", "GPT2LMHeadModel", GPT2),
    transformer("OPT", "OPTForCausalLM", SIZES | {"ffn_dim": 56, "word_embed_proj_dim": 48}),
    transformer("GPT-NeoX", "GPTNeoXForCausalLM", SIZES | {"rotary_pct": 0.5}),
    transformer("Falcon (7B style)", "FalconForCausalLM", FALCON | {"multi_query": True, "parallel_attn": True}),
    transformer("Falcon (40B style)", "FalconForCausalLM", FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
    }),
    transformer("Falcon (RW style, ALiBi)", "FalconForCausalLM", FALCON | {
        "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
    }),
    transformer("Mixtral", "MixtralForCausalLM", MOE),
    transformer("Qwen3-MoE", "Qwen3MoeForCausalLM", QWEN_MOE),
    transformer("BERT", "BertModel", SIZES),
    transformer("BERT, masked language model", "BertForMaskedLM", SIZES),
    transformer("BERT, classifier", "BertForSequenceClassification", SIZES | {"num_labels": 5}),
    transformer("RoBERTa, classifier", "RobertaForSequenceClassification", SIZES | {"num_labels": 5}),
    transformer("DeBERTa-v2, classifier", "DebertaV2ForSequenceClassification", DEBERTA | {"num_labels": 5}),
    transformer("DeBERTa-v3, masked language model", "DebertaV2ForMaskedLM", DEBERTA | {
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 4,
    }),
    transformer("ViT, classifier", "ViTForImageClassification", VIT, {"pixel_values": images(12)}),
    transformer("Swin, classifier", "SwinForImageClassification", SWIN, {"pixel_values": images(16)}),
    transformer("T5", "T5ForConditionalGeneration", T5, T5_INPUTS),
    transformer("T5 v1.1 (gated, untied)", "T5ForConditionalGeneration", T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }, T5_INPUTS),
    Architecture("CNN, residual", ResNet, {"x": images(16)}),
    Architecture("CNN, depthwise separable", DepthwiseSeparable, {"x": images(16)}),
    Architecture("CNN, grouped convolutions", GroupedConvolutions, {"x": images(16)}),
    Architecture("CNN, concatenation", DenseNet, {"x": images(16)}),
    Architecture("CNN, flattened", Flattened, {"x": images(16)}),
)  # fmt: skip
ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}
