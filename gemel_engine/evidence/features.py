"""Describe the candidates of a mention by numbers, from the reasons of the candidate pool.

Every feature is 0 where nothing is known of a candidate, so that a source that a knowledge base or
a mention lacks, such as pictures, has no effect, and entities outside the pool score 0.

What form and name have in common says less, the more training mentions say what the form means:
"American" means the United States more often than Americans. So these features are divided by the
square root of 1 + the number of the form's training mentions. An entity that no training mention of
any form means is not one that the form does not mean: it gets back a part of what the others gain,
the more, the rarer such entities are in the pool. Among millions of names nearly every rival has no
training mention, and that says nothing of it.

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
    "unseen_entity",  # form_prior of all the form's mentions, where none means the entity; times the share of others
    "equal_name",  # the name or an alias; divided, as all up to similar_name
    "equal_base_name",  # the name without its qualifier
    "initials",
    "likeness",  # share of characters in common blocks of form and name without its qualifier
    "words_of_form",  # share of the form's words that the name has
    "similar_name",  # cosine of form and name or alias
    "similar_text",  # cosine of text and name or alias
    "similar_description",  # cosine of text and description
    "popularity",  # log of the popularity
    "picture",  # highest cosine with a picture of the entity, or of a training mention of the form
)

_SMOOTHING = 0.1  # training mentions
_COMPARED = 80  # number of characters


def features_of(form: str, names: Sequence[str], reasons: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Return the features of the candidates of a mention, (N, F).

    Args:
        form: Surface form.
        names: Names of N candidates.
        reasons: Reasons of each of the N candidates in the pool.
    """
    normal = normal_form(form)
    words = set(normal.split())
    num_mentions = sum(known.get("form", 0.0) for known in reasons)
    novelty = 1 / math.sqrt(1 + num_mentions)
    share_seen = sum("frequency" in known for known in reasons) / max(1, len(reasons))
    unseen = share_seen * math.log1p(num_mentions / _SMOOTHING)
    rows = [
        [
            math.log1p(known.get("form", 0.0) / _SMOOTHING),
            0.0 if "frequency" in known else unseen,
            novelty * max(known.get("name", 0.0), known.get("alias", 0.0)),
            novelty * known.get("base_name", 0.0),
            novelty * float("initials" in known),
            novelty * _likeness(normal, normal_form(without_qualifier(name))),
            novelty * len(words & set(normal_form(name).split())) / max(1, len(words)),
            novelty * known.get("similar_name", 0.0),
            known.get("text_name", 0.0),
            known.get("description", 0.0),
            math.log1p(known.get("popularity", 0.0)),
            max(0.0, known.get("picture", 0.0), known.get("training_picture", 0.0)),
        ]
        for name, known in zip(names, reasons, strict=True)
    ]
    return np.array(rows, np.float64).reshape(len(rows), len(FEATURES))


def _likeness(form: str, name: str) -> float:
    return SequenceMatcher(None, form[:_COMPARED], name[:_COMPARED], autojunk=False).ratio()
