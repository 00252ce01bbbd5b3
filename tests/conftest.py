"""Shared by all tests: small real models, no network, one thread a process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

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
