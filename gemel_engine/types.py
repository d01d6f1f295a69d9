"""Row types of the engine, each with the Arrow schema of its table.

This module depends on no model, not on Ray, and reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel_engine.display import without_unseen
from gemel_engine.errors import InvalidMentionError
from gemel_engine.storage.columns import FEATURES, IDENTIFIER, PICTURE, TEXT, Column

Features = npt.NDArray[np.float32]  # one picture: (C,); a batch: (B, C)

MENTION_REQUIRED_COLUMNS = ("mention_id", "text", "mention")
_MAX_MENTION_CHARACTERS = 4096
# Far above the features of any image encoder; squares of much larger ones overflow.
_LARGEST_FEATURE = 1e6

MENTION_COLUMNS = {
    "mention_id": IDENTIFIER,
    "text": TEXT,
    "mention": TEXT,
    "mention_start": Column(
        pa.int64(), "integer of at most 63 bits", lambda found: pa.types.is_integer(found) and found != pa.uint64()
    ),
    "candidate_ids": Column.list_of(IDENTIFIER),
    "group": IDENTIFIER,
    "image_uri": TEXT,
    "image_bytes": PICTURE,
    "image_features": FEATURES,
    "entity_id": IDENTIFIER,
    "entity_name": TEXT,
}


def mention_columns(
    stored_names: Mapping[str, str],
    *,
    or_own: bool = False,
    columns: Mapping[str, Column] = MENTION_COLUMNS,
) -> dict[str, Column]:
    """Return the columns of mentions as a file names them.

    Args:
        stored_names: The file's names of columns that have another name there.
        or_own: Whether a file may also have these columns under their own names.
        columns: The columns; by default all columns of mentions.
    """
    return {
        name: replace(column, stored_names=(theirs, *((name,) if or_own else ())))
        if (theirs := stored_names.get(name))
        else column
        for name, column in columns.items()
    }


@dataclass(frozen=True, slots=True)
class Mention:
    """A surface form in a text, with or without a picture.

    Attributes:
        mention_id: Identifier, unique in its corpus.
        text: Sentence or caption.
        mention: Surface form. The prompt uses it as given, even if `text` does not contain it.
        mention_start: Character offset of the surface form in `text`; None: unknown.
        candidate_ids: Identifiers of the entities to which decoding is restricted; None: the whole
            knowledge base.
        group: Identifier shared by mentions that must not be each other's demonstrations in
            training, such as their document or the artist of their pictures; None: the mention is a
            group of its own.
    """

    mention_id: str
    text: str
    mention: str
    mention_start: int | None = None
    candidate_ids: tuple[str, ...] | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One entity that a mention may refer to.

    Attributes:
        entity_id: Identifier in the knowledge base.
        entity_name: Generated name, which several entities may share.
        log_prob: Sum of the log-probabilities of the name's tokens and its terminator, in nats;
            None if the language model was not asked for it.
        bonus: What evidence adds to the score; 0 for an entity outside the candidate pool, None if
            the language model ranks alone.
        score: Score of the entity, from log-prob and bonus; None if either is None.
    """

    entity_id: str
    entity_name: str
    log_prob: float | None
    bonus: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class PoolEntity:
    """An entity of a mention's candidate pool.

    Attributes:
        entity_id: Identifier in the knowledge base.
        score: Fused score of its sources; only its order within one pool has a meaning.
        reasons: Score by each source that proposed the entity, such as a count or a similarity.
    """

    entity_id: str
    score: float
    reasons: Mapping[str, float]


CARD_PREFIX = "card:"  # begins the id of a card among `demonstration_ids`


@dataclass(frozen=True, slots=True)
class Prediction:
    """Result of linking one mention.

    If `error` is set, all fields other than it and `mention_id` are None or empty.

    Attributes:
        mention_id: Identifier of the mention.
        entity_id: Identifier of the best entity.
        entity_name: Name of the best entity.
        log_prob: Log-probability of the best name in nats: the sum over its tokens and the
            terminator; None if evidence decided alone.
        score: Score of the best entity from language model and evidence; None if one of them
            decided alone.
        decided_by: `score`, `language_model` or `evidence`.
        probability: Lower bound of the best name's share of the probability mass of all names;
            unexplored mass counts against it. Not calibrated.
        confidence: Probability that the entity is correct, by the calibration, or else by score or
            evidence; None without any of them.
        nil_probability: Probability that the knowledge base lacks the mention's entity; None
            without a calibration, or if it was fitted without such mentions.
        unexplored_mass: Upper bound of the probability of all names that the search did not reach.
        margin: Objective of the first name minus that of the second, negative if the ranking
            differs from the objective; of two entities, the difference of their scores. None if
            only one was found.
        certified: Whether the first name or entity is proved to be the best of all allowed ones by
            the ranking of the search; false if evidence decided alone.
        num_certified: Number of leading candidates whose ranks are proved.
        is_nil: Whether the mention refers to no entity of the knowledge base, according to the
            calibration; None if `nil_probability` is None. The best entity is returned in any case.
        candidates: Candidates, the best first; entities that share a name are adjacent, as many as
            there is room for.
        demonstration_ids: Values of `mention_id` of the demonstrations in the prompt, in its order:
            the last one is right before the question. A card has the id `card:` and that of its
            entity.
        demonstration_entity_ids: Identifiers of the entities of demonstrations and cards, in the
            same order.
        num_demonstrations_dropped: Number of demonstrations and cards omitted to keep the prompt
            within its limit.
        num_characters_dropped: Number of characters of the text omitted for the same reason; a
            window around the surface form is kept.
        pool: Candidate pool of the mention, the best first; empty without an evidence index.
        num_rollouts: Number of rollouts that the search requested from the language model,
            including those of the previous run if this prediction continues one of its predictions.
        error: Reason why the mention could not be linked, as `kind: message`; None: it was linked.
    """

    mention_id: str
    entity_id: str | None = None
    entity_name: str | None = None
    log_prob: float | None = None
    score: float | None = None
    decided_by: str | None = None
    probability: float | None = None
    confidence: float | None = None
    nil_probability: float | None = None
    unexplored_mass: float | None = None
    margin: float | None = None
    certified: bool | None = None
    num_certified: int | None = None
    is_nil: bool | None = None
    candidates: tuple[Candidate, ...] = ()
    demonstration_ids: tuple[str, ...] = ()
    demonstration_entity_ids: tuple[str, ...] = ()
    num_demonstrations_dropped: int | None = None
    num_characters_dropped: int | None = None
    pool: tuple[PoolEntity, ...] = ()
    num_rollouts: int | None = None
    error: str | None = None


def fault_of(mention: Mention) -> InvalidMentionError | None:
    """Return why a mention can't be linked with any knowledge base and models, or None if it can.

    Text and surface form may be missing, and candidates may contain nulls, as in rows of a table.
    """
    form, text, start = mention.mention, mention.text, mention.mention_start
    if not form or not without_unseen(form, also_joining=True).strip():
        return InvalidMentionError("the mention is empty: give the surface form")
    if len(form) > _MAX_MENTION_CHARACTERS:
        return InvalidMentionError(
            f"the mention has {len(form)} characters, more than {_MAX_MENTION_CHARACTERS}: give the surface form alone"
        )
    if not text:
        return InvalidMentionError("the text is empty: give the sentence around the mention")
    if start is not None and (start < 0 or text[start : start + len(form)] != form):
        return InvalidMentionError(f"the text has not {form[:50]!r} at mention_start {start}: correct the offset")
    try:
        f"{form}{text}".encode()
    except UnicodeEncodeError as error:
        return InvalidMentionError(
            f"text or mention holds {error.object[error.start]!r}, half of a surrogate pair: decode it as UTF-16"
        )
    if mention.candidate_ids is not None and None in mention.candidate_ids:
        return InvalidMentionError("candidate_ids holds a null: leave it out")
    return None


def are_features(features: Features, width: int) -> bool:
    """Return whether image features have this width and contain only finite numbers up to 1e6."""
    if features.shape != (width,) or not width:
        return False
    # Both comparisons are false if a feature is NaN.
    return bool(features.min() >= -_LARGEST_FEATURE and features.max() <= _LARGEST_FEATURE)


def check_features(features: Features, width: int) -> None:
    """Validate image features for pictures of this width.

    Raises:
        InvalidMentionError: `are_features` is false.
    """
    if not are_features(features, width):
        num_usable = (np.abs(features) <= _LARGEST_FEATURE).sum()
        raise InvalidMentionError(
            f"image_features holds {len(features)} numbers, {num_usable} of them finite and at most "
            f"{_LARGEST_FEATURE:g}: give the {width} of the image encoder that the other pictures come from"
        )


PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("mention_id", pa.string(), nullable=False),
        pa.field("entity_id", pa.string()),
        pa.field("entity_name", pa.string()),
        pa.field("log_prob", pa.float64()),
        pa.field("score", pa.float64()),
        pa.field("decided_by", pa.string()),
        pa.field("probability", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("nil_probability", pa.float64()),
        pa.field("unexplored_mass", pa.float64()),
        pa.field("margin", pa.float64()),
        pa.field("certified", pa.bool_()),
        pa.field("num_certified", pa.int32()),
        pa.field("is_nil", pa.bool_()),
        pa.field(
            "candidates",
            pa.list_(
                pa.struct(
                    [
                        ("entity_id", pa.string()),
                        ("name", pa.string()),
                        ("log_prob", pa.float64()),
                        ("bonus", pa.float64()),
                        ("score", pa.float64()),
                    ]
                )
            ),
        ),
        pa.field("demonstration_ids", pa.list_(pa.string())),
        pa.field("demonstration_entity_ids", pa.list_(pa.string())),
        pa.field("num_demonstrations_dropped", pa.int32()),
        pa.field("num_characters_dropped", pa.int32()),
        pa.field(
            "pool",
            pa.list_(
                pa.struct(
                    [
                        ("entity_id", pa.string()),
                        ("score", pa.float32()),
                        ("reasons", pa.map_(pa.string(), pa.float32())),
                    ]
                )
            ),
        ),
        pa.field("num_rollouts", pa.int32()),
        pa.field("error", pa.string()),
    ]
)

_CANDIDATE = PREDICTION_SCHEMA.field("candidates").type.value_type

PREDICTION_COLUMNS = {field.name: Column.like(field.type) for field in PREDICTION_SCHEMA}


def row_to_prediction(row: Mapping[str, Any]) -> Prediction:
    """Convert a row of `PREDICTION_SCHEMA` to a prediction."""
    candidates = [Candidate(*(item[field.name] for field in _CANDIDATE)) for item in row["candidates"] or ()]
    lists = {name: tuple(row[name] or ()) for name in ("demonstration_ids", "demonstration_entity_ids")}
    pool = [PoolEntity(item["entity_id"], item["score"], dict(item["reasons"])) for item in row["pool"] or ()]
    return Prediction(**{**row, **lists, "candidates": tuple(candidates), "pool": tuple(pool)})


def predictions_to_table(predictions: list[Prediction]) -> pa.Table:
    """Convert predictions to a table with `PREDICTION_SCHEMA`, in the order given."""
    columns: dict[str, list[object]] = {
        name: [getattr(prediction, name) for prediction in predictions]
        for name in PREDICTION_SCHEMA.names
        if name not in ("candidates", "pool")
    }
    columns["candidates"] = [
        [dict(zip(_CANDIDATE.names, astuple(candidate), strict=True)) for candidate in prediction.candidates]
        for prediction in predictions
    ]
    columns["pool"] = [
        [{"entity_id": e.entity_id, "score": e.score, "reasons": list(e.reasons.items())} for e in prediction.pool]
        for prediction in predictions
    ]
    return pa.Table.from_pydict(columns, schema=PREDICTION_SCHEMA)
