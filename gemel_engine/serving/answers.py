"""Questions and answers of the JSON API, and what the page shows of an explanation."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gemel_engine.display import visible
from gemel_engine.evidence.reasons import in_words
from gemel_engine.linker import Explanation, VisualMark
from gemel_engine.types import Mention, Prediction

MAX_TEXT = 1 << 16  # number of characters
_MAX_CANDIDATES = 1000


class Question(BaseModel):
    """A mention to link.

    Attributes:
        text: Sentence or caption that contains the mention.
        mention: Surface form of the mention.
        mention_start: Character offset of the surface form in the text.
        picture: Content of an image file, in base64.
        candidate_ids: Identifiers of the only entities to consider; None: the whole knowledge base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Annotated[str, Field(max_length=MAX_TEXT)]
    mention: Annotated[str, Field(min_length=1, max_length=1000)]
    mention_start: Annotated[int, Field(ge=0)] | None = None
    picture: bytes | None = None
    candidate_ids: Annotated[tuple[str, ...], Field(min_length=1, max_length=_MAX_CANDIDATES)] | None = None

    @field_validator("picture", mode="before")
    @classmethod
    def _decode(cls, value: object) -> bytes | None:
        if value is None:
            return None
        try:
            return base64.b64decode(value if isinstance(value, str) else "-", validate=True)
        except binascii.Error as error:
            raise ValueError("picture is not base64: encode the bytes of the image file") from error

    def as_mention(self) -> Mention:
        """Return the mention."""
        return Mention("0", self.text, self.mention, mention_start=self.mention_start, candidate_ids=self.candidate_ids)


def as_answer(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as JSON; the fields are those of the output of `gemel link`."""
    answer = {
        name: getattr(prediction, name)
        for name in (
            *("entity_id", "entity_name", "decided_by", "confidence", "nil_probability", "is_nil", "certified"),
            *("log_prob", "score", "num_rollouts", "error"),
        )
    }
    reasons = {item.entity_id: in_words(item.reasons) for item in prediction.pool}
    answer["candidates"] = [
        {
            "entity_id": candidate.entity_id,
            "name": candidate.entity_name,
            "log_prob": candidate.log_prob,
            "bonus": candidate.bonus,
            "score": candidate.score,
            "evidence": reasons.get(candidate.entity_id, []),
        }
        for candidate in prediction.candidates
    ]
    return answer


def as_explanation(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON, with all texts made visible as `visible` does."""
    entities = explanation.entities
    answer = as_answer(explanation.prediction)
    for candidate in answer["candidates"]:
        entity = entities.get(candidate["entity_id"])
        candidate["description"] = None if entity is None else entity.description
    answer["demonstrations"] = [
        {
            "id": used.id,
            "text": used.demonstration.text,
            "mention": used.demonstration.mention,
            "name": used.demonstration.name,
        }
        for used in explanation.demonstrations
    ]
    answer["prompt"] = "".join(
        f"[picture: {part.num_embeddings} embeddings]" if isinstance(part, VisualMark) else part
        for part in explanation.prompt
    )
    without = explanation.without_picture
    answer["without_picture"] = None if without is None else as_answer(without.prediction)
    shown: dict[str, Any] = _visible(answer)
    return shown


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value, lines=True)
    if isinstance(value, list):
        return [_visible(item) for item in value]
    return {key: _visible(item) for key, item in value.items()} if isinstance(value, dict) else value
