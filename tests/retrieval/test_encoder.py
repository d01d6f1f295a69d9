"""What an embedding of a surface form depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import save_mention_encoder
from torch import get_num_threads, set_num_threads
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from gemel_engine.errors import ArtifactError
from gemel_engine.retrieval.encoder import MentionEncoder

FORMS = ["bear", "Bear", "train", "paris", "a bear on a train", "[SEP]", "北京", "x"]


def test_embeddings_have_unit_length(encoder: MentionEncoder) -> None:
    embeddings = encoder.encode(FORMS)
    assert embeddings.shape == (len(FORMS), encoder.width)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.width)


@settings(max_examples=10)
@given(batch=st.lists(st.sampled_from(FORMS), min_size=1, max_size=9))
def test_embedding_does_not_depend_on_the_batch(encoder: MentionEncoder, batch: list[str]) -> None:
    alone = np.concatenate([encoder.encode([form]) for form in batch])
    assert encoder.encode(batch).tobytes() == alone.tobytes()


def test_a_text_that_is_too_long_is_read_around_a_mention(encoder: MentionEncoder) -> None:
    filler = "a bear on a train " * encoder.max_tokens
    text = f"{filler}in paris {filler}"
    start = text.index("paris")
    around = encoder.readable(text, start, start + 5)
    assert 0.4 < around.index("paris") / len(around) < 0.6
    assert len(encoder.readable(around, 0, 0)) > 0.9 * len(around)
    short = filler[: encoder.max_tokens]
    assert encoder.readable(short, 0, 0) == short


@pytest.mark.parametrize("num_threads", [1, 3])
def test_embedding_does_not_depend_on_the_number_of_threads(encoder: MentionEncoder, num_threads: int) -> None:
    expected = encoder.encode(FORMS * 3)
    before = get_num_threads()
    set_num_threads(num_threads)
    try:
        assert encoder.encode([*reversed(FORMS)])[::-1].tobytes() == expected[: len(FORMS)].tobytes()
        assert get_num_threads() == num_threads
    finally:
        set_num_threads(before)


def save_encoder(directory: Path, config: PreTrainedConfig, **tokenizer_options: object) -> str:
    """A random encoder over the letters of the fixture's vocabulary, as a local directory."""
    save_mention_encoder(directory)
    torch.manual_seed(0)
    model: Any = T5EncoderModel if isinstance(config, T5Config) else AutoModel.from_config
    model(config).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, **tokenizer_options)
    tokenizer.save_pretrained(directory)
    return str(directory)


SHAPE: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("stated", [34, 1_000_000])
def test_the_limit_of_positions_is_what_the_model_reads(tmp_path: Path, stated: int) -> None:
    """RoBERTa keeps two of its 34 positions for padding, and some tokenizers name no limit."""
    config = RobertaConfig(**SHAPE, intermediate_size=32, max_position_embeddings=34, pad_token_id=1)
    encoder = MentionEncoder(save_encoder(tmp_path, config, model_max_length=stated))
    assert encoder.max_tokens == 32
    assert np.array_equal(*encoder.encode(["x" * 40, "x" * 30]))
    assert not np.array_equal(*encoder.encode(["x" * 40, "x" * 29]))


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
        BartConfig(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=600,
        ),
    ],
    ids=["T5", "BART"],
)  # fmt: skip
def test_models_with_a_decoder_encode(tmp_path: Path, config: PreTrainedConfig) -> None:
    encoder = MentionEncoder(save_encoder(tmp_path, config, model_max_length=1_000_000))
    assert (encoder.width, encoder.max_tokens) == (32, 512)
    embeddings = encoder.encode([*FORMS, "x" * 4000])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_an_encoder_that_lacks_embeddings_is_refused(tmp_path: Path) -> None:
    directory = save_encoder(tmp_path, BertConfig(**SHAPE, intermediate_size=32))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["snorkel"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ArtifactError, match=r"has 99 token embeddings, .* such as 'snorkel'"):
        MentionEncoder(directory)


def test_a_model_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    directory = save_encoder(tmp_path, BertConfig(**SHAPE, intermediate_size=32))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(text_config={**small, "vocab_size": 99}, vision_config={**small, "image_size": 32})
    CLIPModel(config).save_pretrained(directory)
    with pytest.raises(ArtifactError, match=r"can't be used as a mention encoder .* name a model that encodes text"):
        MentionEncoder(directory)


def test_long_surface_form_is_cut_where_special_tokens_in_text_are_letters(encoder: MentionEncoder) -> None:
    text = "[SEP]" * 8  # 8 tokens if it were special, else 40, of which 38 fit
    assert np.array_equal(*encoder.encode([text, text[:38]]))
    assert not np.array_equal(*encoder.encode([text, text[:37]]))


def test_fingerprint_tells_weights_apart(
    encoder: MentionEncoder, mention_encoder_directory: Path, tmp_path: Path
) -> None:
    assert MentionEncoder(str(mention_encoder_directory)).fingerprint == encoder.fingerprint
    model = BertModel.from_pretrained(mention_encoder_directory)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(mention_encoder_directory).save_pretrained(tmp_path)
    assert MentionEncoder(str(tmp_path)).fingerprint != encoder.fingerprint


def test_missing_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        MentionEncoder(str(tmp_path / "nowhere"))
