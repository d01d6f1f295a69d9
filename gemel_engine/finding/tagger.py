"""Finds mentions by a token-classification model, such as one for named entity recognition.

transformers' own pipeline reads a long text in overlapping windows, and decides by words: a word
has the label of its first token. Of two overlapping mentions of neighbouring windows the longer is
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, TokenClassificationPipeline

from gemel_engine.checkpoint import check_finite, check_whole, load_model
from gemel_engine.errors import ConfigurationError
from gemel_engine.finding.base import Span
from gemel_engine.tokenizer import check_embedded, load_tokenizer

_WHAT = "token-classification model"
_MAX_TOKENS = 512
_RESERVED_POSITIONS = 2  # RoBERTa and its kin count two positions that no token may have
_OVERLAP = 4  # a window shares a fourth of its tokens with the next one
_OUTSIDE = "O"


class TaggerFinder:
    """Finds mentions by a token-classification model; text never becomes a special token.

    Args:
        name_or_path: Local directory, or name on the model hub; weights must be safetensors.
        labels: Labels of mentions, without `B-` and `I-`; empty: all.
        device: torch device.
        batch_size: Number of texts, or windows, in one pass.

    Raises:
        ArtifactError: There is no such model, it is damaged, or it labels no tokens.
        ConfigurationError: It has none of the labels, or its tokenizer has no fast implementation.
    """

    def __init__(
        self, name_or_path: str, labels: Sequence[str] = (), *, device: str = "cpu", batch_size: int = 16
    ) -> None:
        tokenizer: Any = load_tokenizer(name_or_path)
        model, loaded = load_model(
            _WHAT, AutoModelForTokenClassification, name_or_path, dtype=torch.float32, use_safetensors=True
        )
        loaded["unexpected_keys"] -= {name for name in loaded["unexpected_keys"] if ".pooler." in name}
        check_whole(_WHAT, name_or_path, loaded)
        check_finite(_WHAT, name_or_path, model.state_dict())
        check_embedded(
            tokenizer, model.get_input_embeddings().weight.shape[0], name_or_path, added=tokenizer("")["input_ids"]
        )
        known = {label.removeprefix("B-").removeprefix("I-") for label in model.config.id2label.values()} - {_OUTSIDE}
        if unknown := sorted(set(labels) - known):
            raise ConfigurationError(
                f"finder.labels has {', '.join(map(repr, unknown))}, but the labels of {name_or_path!r} are "
                f"{', '.join(sorted(known))}: name some of them, or leave it empty for all"
            )
        positions = getattr(model.config, "max_position_embeddings", None) or _MAX_TOKENS + _RESERVED_POSITIONS
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - _RESERVED_POSITIONS, _MAX_TOKENS)
        tokenizer.split_special_tokens = True
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self._batch_size = batch_size
        self._pipeline: Any = TokenClassificationPipeline(  # type: ignore[no-untyped-call]
            model=model.eval(),
            tokenizer=tokenizer,
            device=device,
            aggregation_strategy="first",
            stride=tokenizer.model_max_length // _OVERLAP,
            ignore_labels=[_OUTSIDE, *(sorted(known - set(labels)) if labels else ())],
        )

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the mentions of each text."""
        results = self._pipeline(list(texts), batch_size=self._batch_size) if texts else []
        return [_spans(text, found) for text, found in zip(texts, results, strict=True)]


def _spans(text: str, found: Sequence[dict[str, Any]]) -> list[Span]:
    """Return the places of what the pipeline found, without spaces around them and without overlaps."""
    spans: list[Span] = []
    for item in sorted(found, key=lambda item: item["start"]):
        written = text[item["start"] : item["end"]]
        start = item["start"] + len(written) - len(written.lstrip())
        span = Span(start, start + len(written.strip()))
        if span.stop > span.start and (not spans or span.start >= spans[-1].stop):
            spans.append(span)
    return spans
