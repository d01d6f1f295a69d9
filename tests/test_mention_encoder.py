"""What an embedding of a surface form depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertModel, PreTrainedTokenizerFast

from gemel_engine.errors import ArtifactError
from gemel_engine.mention_encoder import MentionEncoder

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
