"""Shared by all tests: small real models, no network, one thread a process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

import rowscope
from rowscope import data
from rowscope.models import LoadedModel
from rowscope.settings import CalibrationSettings

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # machines are noisy, no test is timed
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The embedded model. Tests must leave it as they found it."""
    return rowscope.load_model("demo")


@pytest.fixture(scope="session")
def demo_batches(demo: LoadedModel) -> list[data.Batch]:
    """Four small calibration batches of the embedded task."""
    return data.calibration_batches(data.load("demo")["train"], demo.tokenizer, CalibrationSettings(4, 4, 64))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of two blocks in which no two sizes are equal, with untied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def make_mixture():
    """Builds a random mixture with experts in 3-D parameters, the same at every call."""

    def make(kind="mixtral", experts=4, layers=2):
        sizes = {
            "vocab_size": 41, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
        }  # fmt: skip
        config = {
            "mixtral": lambda: MixtralConfig(**sizes, num_local_experts=experts),
            "qwen3_moe": lambda: Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=experts),
            "gpt_oss": lambda: GptOssConfig(**sizes, num_local_experts=experts),  # transposed weights, biases
        }[kind]()
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    return make
