"""Say in words why an entity is in a candidate pool."""

from __future__ import annotations

from collections.abc import Mapping

# Each source of `pool.WEIGHTS` in words, with the place of its score.
_WORDS = {
    "form": "training mentions of this form: {:.0f}",
    "name": "equal name",
    "alias": "equal alias",
    "base_name": "equal name without its qualifier",
    "initials": "equal initials {:.2f}",
    "words": "words in common {:.2f}",
    "context": "all words, and words of the text {:.2f}",
    "beginnings": "words that begin alike {:.2f}",
    "in_text": "in the text, words: {:.0f}",
    "similar_form": "similar form in training {:.2f}",
    "similar_name": "similar name {:.2f}",
    "text_name": "name similar to the text {:.2f}",
    "description": "description similar to the text {:.2f}",
    "picture": "similar picture {:.2f}",
    "training_picture": "similar picture in training {:.2f}",
    "frequency": "training mentions: {:.0f}",
    "popularity": "popularity {:.4g}",
}
_LEAST_SHOWN = 0.005
_EQUAL = ("name", "alias", "base_name")  # have the score 1, or less if the form loses its last s


def in_words(reasons: Mapping[str, float]) -> list[str]:
    """Return the reasons of an entity of a pool as phrases, in their order.

    A source that this release does not know is shown by its name, which may be untrusted text.

    Args:
        reasons: Score by each source, as in `PoolEntity`.
    """
    return [_phrase(source, score) for source, score in reasons.items()]


def _phrase(source: str, score: float) -> str:
    score = 0.0 if abs(score) < _LEAST_SHOWN else score  # not "-0.00"
    if source not in _WORDS:
        return f"{source} {score:.2f}"
    phrase = _WORDS[source].format(score)
    return f"{phrase} but for the last s" if source in _EQUAL and score < 1 else phrase
