"""Tiny real models, made once a session: language models of two architectures with a tokenizer of their own."""

from __future__ import annotations

import os

# Before Ray, vLLM or transformers are imported: no usage reports, no hub, and an engine in the test's own process.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}

from pathlib import Path

import pytest
import torch
from s3_server import run_s3_server  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

ENTITY_NAMES = [
    "brown bear", "polar bear", "teddy bear", "bear", "steam train", "bullet train", "train", "tram", "red apple",
    "green apple", "apple", "apple pie", "crescent moon", "full moon", "moon cake", "star", "shooting star", "starfish",
    "dog", "guide dog", "hot dog", "cat", "black cat", "wild cat", "sun", "sunflower", "sun with face", "rainbow",
]  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an EOS and a BOS token, trained on the entity names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ENTITY_NAMES, "What does it refer to? [Text] [Question] [Answer]\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|begin|>", model_max_length=2048
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Random causal language models, with the tokenizer, as local directories; logits wide enough to be decided."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=0,
        initializer_range=0.2,
    )
    opt = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        ffn_dim=128,
        word_embed_proj_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        init_std=0.2,
    )
    directories = {}
    for name, model_type, config in (("llama", LlamaForCausalLM, llama), ("opt", OPTForCausalLM, opt)):
        directories[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model_type(config).save_pretrained(directories[name])
        tokenizer.save_pretrained(directories[name])
    return directories
