"""Say in words why one entity has a higher score than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemel_engine.evidence.features import FEATURES, features_of
from gemel_engine.evidence.weights import ScoreWeights

_LEAST = 0.005  # a smaller difference is not mentioned

# What a higher feature of one of the two says of it.
_WORDS = {
    "equal_alias": "an alias of {} equals the form",
    "equal_base_name": "the name of {} without its qualifier equals the form",
    "initials": "{} has the form as initials",
    "likeness": "the name of {} is more like the form",
    "words_of_form": "the name of {} has more words of the form",
    "similar_name": "{} means more nearly what the form says",
    "similar_text": "{} means more nearly what the text says",
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
    names: Sequence[str],
    reasons: Sequence[Mapping[str, float]],
    log_probs: Sequence[float | None],
    weights: ScoreWeights,
) -> list[Argument]:
    """Return what speaks for the first and for the second of two entities, the strongest first.

    Args:
        form: Surface form.
        names: Names of both.
        reasons: Reasons of both in the candidate pool; empty for an entity outside of it, whose
            features are 0.
        log_probs: Log-probs of both; None where it is not known.
        weights: Weights of the score.
    """
    of_first, of_second = (
        features_of(form, [name], [known])[0] if known else 0.0 * features_of(form, [name], [{}])[0]
        for name, known in zip(names, reasons, strict=True)
    )
    differences = dict(zip(FEATURES, (of_first - of_second).tolist(), strict=True))
    counts = [f"{known.get('form', 0):.0f}" for known in reasons]
    found = [
        Argument(weights.features.get(feature, 0.0) * difference, _words(feature, difference, counts))
        for feature, difference in differences.items()
    ]
    first, second = log_probs
    if first is not None and second is not None:
        words = f"the language model prefers {_better(first - second)} by {abs(first - second):.1f} nats"
        found.append(Argument(weights.language_model * (first - second), words))
    return sorted((item for item in found if abs(item.difference) >= _LEAST), key=lambda item: -abs(item.difference))


def _words(feature: str, difference: float, counts: Sequence[str]) -> str:
    if feature == "form_prior":
        return f"of the training mentions of this form {counts[0]} mean the first, {counts[1]} the second"
    return _WORDS.get(feature, f"{{}} has more of {feature.replace('_', ' ')}").format(_better(difference))


def _better(difference: float) -> str:
    return "the first" if difference > 0 else "the second"
