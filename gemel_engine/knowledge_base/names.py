"""Tokenisation of entity names, and the reasons why a name is unusable.

Shapes: S names, T tokens.
"""

from __future__ import annotations

import gc
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from gemel_engine.display import UNSEEN, without_unseen
from gemel_engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Delimiters of the parts of a prompt: one in a name would be read as the start of the next part.
_PROMPT_MARKER = r"\[(?:Text|Question|Answer)\]"
_CONTROL_OR_SEPARATOR = r"[\p{Cc}\p{Zl}\p{Zp}]"
_MAX_DEMONSTRATION_CHARACTERS = 1 << 16
_CHUNK_SIZE = 65_536
_NUM_EXAMPLES = 5

logger = logging.getLogger(__name__)


def normalised_name(name: str) -> str:
    """Return a name as a knowledge base stores it.

    It is in Unicode's form NFC, without white space around and without idle characters of no width.
    """
    return unicodedata.normalize("NFC", without_unseen(name)).strip()


def normalised_names(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return names as `normalised_name` does."""
    names = names.combine_chunks()
    is_affected = pc.match_substring_regex(names, UNSEEN)
    seen = [without_unseen(name) for name in names.filter(is_affected).to_pylist()]
    names = pc.replace_with_mask(names, is_affected, pa.array(seen, names.type))
    return pa.chunked_array([pc.utf8_trim_whitespace(pc.utf8_normalize(names, form="NFC"))])


@contextmanager
def _without_cycle_search() -> Iterator[None]:
    """Pause garbage collection, to save a fifth of the time; lists of tokens form no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class TokenisedNames:
    """The tokens of S names.

    Attributes:
        token_ids: Concatenated token ids of all names; (T,).
        lengths: Number of tokens of each name; (S,).
        is_decodable: Whether the tokens of each name decode to the name itself; (S,).
    """

    token_ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    is_decodable: NDArray[np.bool_]

    @classmethod
    def tokenise(cls, names: pa.ChunkedArray, tokenizer: PreTrainedTokenizerFast) -> Self:
        """Tokenise names; the spelling of a special token in a name is encoded as plain text."""
        # `tokenizers` without the wrapper of transformers is more than twice as fast.
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        token_ids, lengths, is_decodable = [], [], []
        with _without_cycle_search():
            for start in tqdm(range(0, len(names), _CHUNK_SIZE), "tokenising names", disable=None):
                chunk = names.slice(start, _CHUNK_SIZE).to_pylist()
                ids = [encoding.ids for encoding in backend.encode_batch_fast(chunk, add_special_tokens=False)]
                decoded = backend.decode_batch(ids, skip_special_tokens=False)
                token_ids.append(np.fromiter(chain.from_iterable(ids), np.uint32))
                lengths.append(np.fromiter(map(len, ids), np.int64))
                is_decodable.append(np.array(decoded, object) == np.array(chunk, object))
        return cls(np.concatenate(token_ids), np.concatenate(lengths), np.concatenate(is_decodable))

    def select(self, is_kept: NDArray[np.bool_]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the token ids of the kept names, and their offsets; (T,) and (S + 1,)."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[is_kept])])
        return self.token_ids[np.repeat(is_kept, self.lengths)], offsets

    def hold_any(self, token_ids: list[int]) -> NDArray[np.bool_]:
        """Return whether each name contains one of `token_ids`; (S,)."""
        row_of_token = np.repeat(np.arange(len(self.lengths)), self.lengths)
        num_found = np.bincount(row_of_token[np.isin(self.token_ids, token_ids)], minlength=len(self.lengths))
        return num_found > 0


def reasons_to_skip(
    texts: pa.ChunkedArray, names: TokenisedNames, tokenizer: PreTrainedTokenizerFast, max_name_tokens: int
) -> NDArray[np.object_]:
    """Return the first reason why each name is unusable, "" for a usable name; (S,)."""
    added_tokens = tokenizer.added_tokens_decoder.items()
    special_ids = {*tokenizer.all_special_ids, *(token_id for token_id, token in added_tokens if token.special)}
    tests = {
        "empty": pc.equal(texts, "").to_numpy(),
        "control or line-separating character": pc.match_substring_regex(texts, _CONTROL_OR_SEPARATOR).to_numpy(),
        "replacement character U+FFFD": pc.match_substring(texts, "\ufffd").to_numpy(),
        "prompt marker": pc.match_substring_regex(texts, _PROMPT_MARKER).to_numpy(),
        "special token": names.hold_any(sorted(special_ids)),
        "tokens do not decode to the name": ~names.is_decodable,
        f"more than {max_name_tokens} tokens": names.lengths > max_name_tokens,
    }
    reasons: NDArray[np.object_] = np.full(len(texts), "", object)
    for reason, is_unusable in reversed(tests.items()):
        reasons[is_unusable] = reason
    return reasons


def count_skipped(
    entity_ids: pa.ChunkedArray, reasons: NDArray[np.object_], on_bad_name: Literal["error", "skip"]
) -> dict[str, int]:
    """Return and log the number of entities left out for each reason.

    Raises:
        InputError: Some names are unusable and `on_bad_name` is "error", or all of them are.
    """
    rows = np.flatnonzero(reasons != "")
    if not len(rows):
        return {}
    if on_bad_name == "error" or len(rows) == len(reasons):
        examples = "; ".join(f"row {row} ({entity_ids[row].as_py()!r}): {reasons[row]}" for row in rows[:_NUM_EXAMPLES])
        raise InputError(
            f"{len(rows)} of {len(reasons)} names are unusable, the first {examples}; "
            "correct them, or leave out their entities with `--on-bad-name skip` if others remain"
        )
    num_skipped = dict(Counter(reasons[rows].tolist()))
    logger.warning("skipped %d of %d entities for their names: %s", len(rows), len(reasons), num_skipped)
    return num_skipped


def are_demonstrable(texts: pa.Array, mentions: pa.Array, names: pa.Array) -> NDArray[np.bool_]:
    """Return whether each training mention can be a demonstration.

    Its name must be a single line, no column may contain a prompt marker, and the text must not be
    too long to tokenise in reasonable time; the text may have several lines.

    Returns:
        Shape (S,).
    """
    is_spoilt = pc.match_substring_regex(names, _CONTROL_OR_SEPARATOR)
    for column in (texts, mentions, names):
        is_spoilt = pc.or_(is_spoilt, pc.match_substring_regex(column, _PROMPT_MARKER))
    is_spoilt = pc.or_(is_spoilt, pc.greater(pc.utf8_length(texts), _MAX_DEMONSTRATION_CHARACTERS))
    are_fit: NDArray[np.bool_] = pc.invert(is_spoilt).to_numpy(zero_copy_only=False)
    return are_fit
