"""Say in words why one entity has a higher score than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.weights import ScoreWeights

_LEAST = 0.005  # a smaller difference is not mentioned

# What a higher feature of one of the two says of it.
_WORDS = {
    "unseen_entity": "no training mention means {}, so that their number does not count against it",
    "equal_name": "the name or an alias of {} equals the form",
    "equal_base_name": "the name of {} without its qualifier equals the form",
    "initials": "{} has the form as initials",
    "likeness": "the name of {} is more like the form",
    "words_of_form": "the name of {} has more words of the form",
    "similar_name": "{} means more nearly what the form says",
    "similar_text": "the name of {} means more nearly what the text says",
    "similar_description": "the description of {} fits the text better",
    "popularity": "{} is better known",
    "picture": "{} has a picture more like the mention's",
}


class Argument(NamedTuple):
    """Something that speaks for the first of two entities, or for the second.

    Attributes:
        difference: What it adds to the score of the first beyond what it adds to that of the
            second.
        words: What it is.
    """

    difference: float
    words: str


def arguments(
    form: str,
    pool: Mapping[str, tuple[str, Mapping[str, float]]],
    pair: Sequence[str],
    log_probs: Sequence[float | None],
    weights: ScoreWeights,
) -> list[Argument]:
    """Return what speaks for the first and for the second of two entities, the strongest first.

    Args:
        form: Surface form.
        pool: Name and reasons of each entity of the candidate pool, by its id.
        pair: Ids of both entities; outside of the pool, all features are 0.
        log_probs: Log-probs of both; None where it is not known.
        weights: Weights of the score.
    """
    added = weights.parts(form, [name for name, _ in pool.values()], [known for _, known in pool.values()])
    of_entity = dict(zip(pool, added, strict=True))
    of_first, of_second = (of_entity.get(entity_id, {}) for entity_id in pair)
    counts = [f"{pool[entity_id][1].get('form', 0) if entity_id in pool else 0:.0f}" for entity_id in pair]
    differences = {name: of_first.get(name, 0.0) - of_second.get(name, 0.0) for name in FEATURES}
    found = [Argument(value, _words(name, value, counts)) for name, value in differences.items()]
    first, second = log_probs
    if first is not None and second is not None:
        words = f"the language model prefers {_better(first - second)} by {abs(first - second):.1f} nats"
        found.append(Argument(weights.language_model * (first - second), words))
    return sorted((item for item in found if abs(item.difference) >= _LEAST), key=lambda item: -abs(item.difference))


def _words(feature: str, difference: float, counts: Sequence[str]) -> str:
    if feature == "form_prior":
        return f"of the training mentions of this form {counts[0]} mean the first, {counts[1]} the second"
    return _WORDS[feature].format(_better(difference))


def _better(difference: float) -> str:
    return "the first" if difference > 0 else "the second"
