"""A tiny language model of random weights and its tokenizer, shared by the tests of training."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parent))  # helpers stand beside the tests, in a folder that is no package
torch.set_num_threads(1)

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = ["<pad>", "<eos>", "<unk>", "plus", "is", *NUMBERS]


@pytest.fixture
def tokenizer():
    """A tokenizer of whole words."""
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None
    )


@pytest.fixture
def make_model():
    """Builds the same random two-layer Llama at every call; its weights differ with the seed."""

    def make(dtype=torch.float32, seed=0, attention_dropout=0.0):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(WORDS),
            max_position_embeddings=64,
            attention_dropout=attention_dropout,
            initializer_range=0.2,  # logits that differ enough to be learned from
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).to(dtype).eval()

    return make
