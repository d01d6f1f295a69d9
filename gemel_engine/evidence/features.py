"""Describe the candidates of a mention by numbers, from the reasons of the candidate pool.

Every feature is 0 where nothing is known of a candidate, so that a source that a knowledge base or
a mention lacks, such as pictures, has no effect, and entities outside the pool score 0.

Shapes: N candidates, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from gemel_engine.evidence.normal_form import normal_form, without_qualifier

FEATURES = (
    "form_prior",  # log of the number of the form's training mentions that mean the entity, smoothed
    "equal_name",
    "equal_alias",
    "equal_base_name",  # the name without its qualifier
    "initials",
    "likeness",  # share of characters in common blocks of form and name without its qualifier
    "words_of_form",  # share of the form's words that the name has
    "words_of_name",  # share of the name's words that the form has
    "similar_form",  # cosine with the most similar form of training that means the entity
    "similar_name",  # cosine of form and name, alias or description
    "similar_text",  # cosine of text and name, alias or description
    "context",  # BM25 of form and text, share of the highest of the pool
    "lexical",  # BM25 of the form, share of the highest of the pool
    "in_text",  # whether the whole name occurs in the text
    "popularity",  # log of the popularity
    "frequency",  # log of the number of training mentions
    "picture",  # cosine of the mention's picture with one of the entity
    "training_picture",  # cosine with a picture of a training mention of the form
    "pool_score",  # share of the highest fused score
)

_SMOOTHING = 0.1  # training mentions
_COMPARED = 80  # number of characters


def features_of(
    form: str, names: Sequence[str], candidates: Sequence[tuple[float, Mapping[str, float]]]
) -> NDArray[np.float64]:
    """Return the features of the candidates of a mention, (N, F).

    Args:
        form: Surface form.
        names: Names of N candidates.
        candidates: Score and reasons of each candidate in the pool.
    """
    words = normal_form(form).split()
    highest = {
        source: max((reasons.get(source, 0.0) for _, reasons in candidates), default=0.0)
        for source in ("context", "words")
    }
    best_score = max((score for score, _ in candidates), default=1.0)
    rows = []
    for name, (score, reasons) in zip(names, candidates, strict=True):
        base = normal_form(without_qualifier(name))
        of_name = set(normal_form(name).split())
        rows.append(
            [
                math.log1p(reasons.get("form", 0.0) / _SMOOTHING),
                reasons.get("name", 0.0),
                reasons.get("alias", 0.0),
                reasons.get("base_name", 0.0),
                float("initials" in reasons),
                _likeness(" ".join(words), base),
                len(of_name & set(words)) / max(1, len(set(words))),
                len(of_name & set(words)) / max(1, len(of_name)),
                reasons.get("similar_form", 0.0),
                reasons.get("similar_name", 0.0),
                reasons.get("text_name", 0.0),
                reasons.get("context", 0.0) / (highest["context"] or 1.0),
                reasons.get("words", 0.0) / (highest["words"] or 1.0),
                float("in_text" in reasons),
                math.log1p(reasons.get("popularity", 0.0)),
                math.log1p(reasons.get("frequency", 0.0)),
                max(0.0, reasons.get("picture", 0.0)),
                max(0.0, reasons.get("training_picture", 0.0)),
                score / (best_score or 1.0),
            ]
        )
    return np.array(rows, np.float64).reshape(len(rows), len(FEATURES))


def _likeness(form: str, name: str) -> float:
    return SequenceMatcher(None, form[:_COMPARED], name[:_COMPARED], autojunk=False).ratio()
