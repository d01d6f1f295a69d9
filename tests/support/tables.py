"""Tables of entities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import KnowledgeBaseSettings
from support import trouble

SKIP = KnowledgeBaseSettings(on_bad_name="skip")


def fast_tokenizer(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)  # type: ignore[no-untyped-call]


def make_tokenizer(vocabulary_size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Bear Island Bears island", "Zoé Zoo"], trainer)
    return fast_tokenizer(tokenizer, eos_token="<|im_end|>")


def edit_manifest(built: Path, **values: object) -> None:
    trouble.edit_manifest(built / "knowledge_base.json", values)


def damage(path: Path, column: str, groups: Sequence[int]) -> None:
    """Overwrite the values of a column in row groups of a Parquet file."""
    content, metadata = bytearray(path.read_bytes()), pq.read_metadata(path)
    for chunk in (metadata.row_group(group).column(n) for group in groups for n in range(metadata.num_columns)):
        if chunk.path_in_schema.partition(".")[0] == column:
            start, size = chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size
            content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
