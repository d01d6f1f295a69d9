"""Makes tiny models with random weights, and the artifacts of a linking run with them, in local directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.decoding.language_model import language_model_fingerprint
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.vision.encoder import ImageEncoder
from gemel_engine.vision.mapper import FeatureMapper
from support.names import ENTITY_NAMES

SLIDING_WINDOW = 12  # less than a prompt, so that it shows whether sliding windows are kept
TINY_VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 1}


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
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|begin|>", model_max_length=2048
    )


def llama_2_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters and bytes that begins each text with a space, as Llama 2's does."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=2048, **names)  # type: ignore[no-untyped-call]


def tiny_config(family: str, vocab_size: int) -> PreTrainedConfig:
    """A language model of two layers and width 64; its logits are wide enough to be decided."""
    shape: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2Config(**shape, n_embd=64, n_layer=2, n_head=2, n_positions=1024, initializer_range=0.2)
    shape |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024}
    if family == "opt":
        return OPTConfig(**shape, ffn_dim=128, word_embed_proj_dim=64, init_std=0.2, pad_token_id=0)
    gated = shape | {"intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.2}
    if family == "mistral":
        return MistralConfig(**gated, sliding_window=SLIDING_WINDOW)
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        window: dict[str, Any] = {"sliding_window": SLIDING_WINDOW, "layer_types": layers}
        return Gemma3TextConfig(**gated, **window, query_pre_attn_scalar=32)
    return LlamaConfig(**gated) if family == "llama" else Qwen3Config(**gated)


def save_tiny_model(family: str, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """A random language model with the tokenizer, as a local directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer)))  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_mention_encoder(directory: Path) -> Path:
    """A random BERT of width 32 over single characters, with special tokens, as a local directory."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(33, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=40, **names)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)  # type: ignore[no-untyped-call]
    return directory


def write_image_encoder(directory: Path, vision_config: Mapping[str, object], seed: int = 0) -> Path:
    """A random open_clip model as a local directory."""
    text_config = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision_config, "text_cfg": text_config, "custom_text": True}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return directory


def save_artifacts(directory: Path, language_model: Path, mention_encoder: Path) -> dict[str, Path]:
    """All that a linking run needs, made of tiny models: entities Q0, Q1, ... have the `ENTITY_NAMES`."""
    ids = [f"Q{n}" for n in range(len(ENTITY_NAMES))]
    entities = pa.table({"entity_id": ids, "name": ENTITY_NAMES})
    build_knowledge_base(
        entities, load_tokenizer(str(language_model)), directory / "knowledge_base", KnowledgeBaseSettings()
    )
    (directory / "image_encoder").mkdir()
    image_encoder_directory = write_image_encoder(directory / "image_encoder", TINY_VIT)
    image_encoder = ImageEncoder(str(image_encoder_directory))
    features = np.random.default_rng(0).normal(size=(len(ids), image_encoder.width)).astype(np.float32)
    demonstrations = [
        Demonstration(f"d{n}", f"There was a {name}.", name, entity_id, name, f"d{n}", features[n] if n % 2 else None)
        for n, (entity_id, name) in enumerate(zip(ids, ENTITY_NAMES, strict=True))
    ]
    DemonstrationIndex.build(
        directory / "demonstrations",
        demonstrations,
        MentionEncoder(str(mention_encoder)),
        image_encoder_fingerprint=image_encoder.fingerprint,
    )
    FeatureMapper.random(
        image_encoder.width,
        2,
        64,
        seed=0,
        language_model_fingerprint=language_model_fingerprint(str(language_model)),
        image_encoder_fingerprint=image_encoder.fingerprint,
    ).save(directory / "feature_mapper")
    return {
        "language_model": language_model,
        "mention_encoder": mention_encoder,
        "image_encoder": image_encoder_directory,
        **{name: directory / name for name in ("knowledge_base", "demonstrations", "feature_mapper")},
    }
