"""Loads, fingerprints and checks tokenizers: text stays text, and every token has an embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemel_engine.errors import ArtifactError, ConfigurationError, not_loadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a SHA-256 hash of everything that determines a tokenizer's token ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting_of_last_call in ("truncation", "padding"):
        del state[setting_of_last_call]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a language model from a local directory or the model hub.

    Raises:
        ArtifactError: The tokenizer is missing or cannot be loaded.
        ConfigurationError: The tokenizer has no fast implementation.
    """
    # These take seconds to import; all other functions need neither.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from gemel_engine.checkpoint import check_files

    check_files(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises a plain Exception for a damaged file
        raise not_loadable("tokenizer", name_or_path, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigurationError(f"the tokenizer of {name_or_path!r} has no fast implementation, which is needed")
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """Return the token ids of a text; the spelling of a special token is encoded as plain text."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def check_embedded(
    tokenizer: PreTrainedTokenizerFast, num_embeddings: int, name: str, added: Iterable[int] = ()
) -> None:
    """Raise unless a model has an embedding for each token that its input can contain.

    A special token may lack an embedding (padding added for training often does) if no text encodes
    to it.

    Args:
        tokenizer: The model's tokenizer.
        num_embeddings: Number of rows of the model's embedding matrix.
        name: Name of the model, for the message.
        added: Special tokens that are added to the tokens of a text.

    Raises:
        ArtifactError: A token has no embedding.
    """
    special = _special_tokens(tokenizer)
    missing = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= num_embeddings}
    reachable = [
        token
        for token_id, token in sorted(missing.items())
        if token_id not in special or token_id in {*added, *encode_text(tokenizer, token)}
    ]
    if reachable:
        raise ArtifactError(
            f"{name} has {num_embeddings} token embeddings, and its tokenizer makes {len(reachable)} tokens beyond "
            f"them, such as {reachable[0]!r}: resize the model's embeddings, or remove the tokens from the tokenizer"
        )


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Return the special tokens by id, without the unknown token."""
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    special.pop(tokenizer.unk_token_id, None)
    return special


def check_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise if a text encodes to a special token: the vocabulary may also contain its spelling.

    Raises:
        ConfigurationError: A text encodes to a special token.
    """
    special = _special_tokens(tokenizer)
    for token in special.values():
        if not special.keys().isdisjoint(encode_text(tokenizer, token)):
            raise ConfigurationError(
                f"the tokenizer of the language model reads the text {token!r} as its special token, which a corpus "
                "could then put into prompts: use another language model"
            )
