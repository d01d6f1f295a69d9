"""The rows that flow through the engine, with the Arrow schema of each table beside its type.

Nothing here knows a model, Ray or a file. A stage adds a type; none changes another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel_engine.errors import InvalidMentionError

Features = npt.NDArray[np.float32]  # of one picture (C,), or of a batch (B, C)

MENTION_REQUIRED_COLUMNS = ("mention_id", "text", "mention")
_MAX_MENTION_CHARACTERS = 4096
_LARGEST_FEATURE = 1e6  # of no image encoder by far; the squares of larger ones are soon no numbers


def _is_text(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found))


def _is_text_or_bytes(found: pa.DataType) -> bool:
    """Some tools write texts without saying that they are texts."""
    return _is_text(found) or _is_bytes(found)


def _is_identifier(found: pa.DataType) -> bool:
    return _is_text_or_bytes(found) or bool(pa.types.is_integer(found))


def _is_bytes(found: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(found) for is_kind in kinds)


def _is_picture(found: pa.DataType) -> bool:
    """Bytes, or the struct {bytes, path} of Hugging Face's data sets."""
    if not pa.types.is_struct(found):
        return _is_bytes(found)
    place, path = found.get_field_index("bytes"), found.get_field_index("path")
    return place >= 0 and BYTES.takes(found.field(place).type) and (path < 0 or TEXT.takes(found.field(path).type))


def _is_number(found: pa.DataType) -> bool:
    return any(is_kind(found) for is_kind in (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal))


def is_any_list(found: pa.DataType) -> bool:
    """Whether a type is one of Arrow's five kinds of lists."""
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{kind}")(found) for kind in kinds)


@dataclass(frozen=True, slots=True)
class Column:
    """How a column of a table is read, in whichever type a tool has written it.

    Attributes:
        type: The type that it is read in.
        expected: What a message says that it must be.
        accepts: Whether values of a type, neither null nor a dictionary, can become values of this column.
        item: The items of a list, which decide instead; None for everything else.
    """

    type: pa.DataType
    expected: str
    accepts: Callable[[pa.DataType], bool] = lambda found: True
    item: Column | None = None

    @classmethod
    def list_of(cls, item: Column) -> Column:
        """A column of lists."""
        return cls(pa.list_(item.type), f"list of {item.expected}s", item=item)

    @classmethod
    def like(cls, wanted: pa.DataType) -> Column:
        """A column of a type, or of what differs from it in width alone."""
        if pa.types.is_string(wanted):
            return cls(wanted, "string", _is_text)
        if pa.types.is_list(wanted):
            return cls.list_of(cls.like(wanted.value_type))
        for is_kind in (pa.types.is_integer, pa.types.is_floating):
            if is_kind(wanted):
                return cls(wanted, str(wanted), is_kind)
        if pa.types.is_struct(wanted):
            items = {field.name: cls.like(field.type) for field in wanted}
            return cls(
                wanted,
                str(wanted),
                lambda found: (
                    pa.types.is_struct(found)
                    and all(
                        found.get_field_index(name) >= 0 and item.takes(found.field(name).type)
                        for name, item in items.items()
                    )
                ),
            )
        return cls(wanted, str(wanted), wanted.equals)

    def takes(self, found: pa.DataType) -> bool:
        """Whether the column can be read where it is stored in a type."""
        if pa.types.is_dictionary(found):
            return self.takes(found.value_type)
        if pa.types.is_null(found):
            return True
        if self.item is not None:
            return is_any_list(found) and self.item.takes(found.value_type)
        return self.accepts(found)


TEXT = Column(pa.large_string(), "string", _is_text_or_bytes)
IDENTIFIER = Column(pa.large_string(), "string", _is_identifier)
BYTES = Column(pa.large_binary(), "binary", _is_bytes)
NUMBER = Column(pa.float64(), "number", _is_number)
BOOLEAN = Column(pa.bool_(), "boolean", pa.types.is_boolean)

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
    "image_bytes": Column(pa.large_binary(), "binary", _is_picture),
    "image_features": Column.list_of(Column(pa.float64(), "float", pa.types.is_floating)),
    "entity_id": IDENTIFIER,
    "entity_name": TEXT,
}


@dataclass(frozen=True, slots=True)
class Mention:
    """A surface form in a text, with or without a picture.

    Attributes:
        mention_id: Unique in its corpus.
        text: The sentence or caption.
        mention: The surface form. It is asked about as it is, whether or not `text` has it in just these letters.
        mention_start: Character offset of the surface form in `text`, where known.
        candidate_ids: Decoding is restricted to these entities; None means the whole knowledge base.
        group: What mentions that must not be each other's demonstrations in training have in common, such as a
            document, or the artist of their pictures; None: the mention is a group of its own.
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
        entity_name: The generated name, which several entities may share.
        log_prob: Sum of the log-probabilities of the name's tokens and its terminator, in nats.
    """

    entity_id: str
    entity_name: str
    log_prob: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What linking says of one mention; every field but `mention_id` is None or empty where `error` is set.

    Attributes:
        log_prob: Log-probability of the best name, in nats (a sum over its tokens and the terminator).
        probability: The best name's share of the probability mass of all names, as a lower bound: what was not
            explored counts against it. Not calibrated.
        confidence: Probability that the entity is the right one; None without a calibration.
        nil_probability: Probability that the knowledge base lacks the mention's entity; None without a calibration, or
            one that was fitted without such mentions.
        unexplored_mass: Upper bound of the probability of all names that the search did not reach.
        margin: Objective of the first name minus that of the second, negative where another ranking put it first; None
            when only one name was found.
        certified: The first name is proved to be the best of all allowed names by the search's ranking.
        num_certified: How many of the leading candidate names are proved to be in their place.
        is_nil: The mention refers to no entity of the knowledge base, says the calibration; None like
            `nil_probability`. The best entity is given all the same.
        candidates: The best first; entities that share a name follow each other.
        demonstration_ids: `mention_id`s of the demonstrations in the prompt, the most similar last.
        demonstration_entity_ids: The entities that they show, in the same order.
        num_demonstrations_dropped: How many were left out because the prompt would have been too long.
        num_rollouts: Rollouts that the search asked the language model for, those of an earlier run included whose
            prediction this one carries on.
    """

    mention_id: str
    entity_id: str | None = None
    entity_name: str | None = None
    log_prob: float | None = None
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
    num_rollouts: int | None = None
    error: str | None = None


def fault_of(mention: Mention) -> InvalidMentionError | None:
    """Why a mention can't be linked, whatever the knowledge base and the models are; None if nothing speaks against it.

    A row of a table may lack its text and its surface form, and its candidates may hold nulls.
    """
    form, text, start = mention.mention, mention.text, mention.mention_start
    if not form or not form.strip():
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
    """Whether image features are of this width, and numbers of a sensible size."""
    if features.shape != (width,) or not width:
        return False
    # Neither holds if one of them is no number.
    return bool(features.min() >= -_LARGEST_FEATURE and features.max() <= _LARGEST_FEATURE)


def check_features(features: Features, width: int) -> None:
    """See that image features are what a feature mapper of this width takes.

    Raises:
        InvalidMentionError: They are not.
    """
    if not are_features(features, width):
        num_usable = (np.abs(features) <= _LARGEST_FEATURE).sum()
        raise InvalidMentionError(
            f"image_features holds {len(features)} numbers, {num_usable} of them finite and at most "
            f"{_LARGEST_FEATURE:g}: give the {width} that the feature mapper takes"
        )


PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("mention_id", pa.string(), nullable=False),
        pa.field("entity_id", pa.string()),
        pa.field("entity_name", pa.string()),
        pa.field("log_prob", pa.float64()),
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
            pa.list_(pa.struct([("entity_id", pa.string()), ("name", pa.string()), ("log_prob", pa.float64())])),
        ),
        pa.field("demonstration_ids", pa.list_(pa.string())),
        pa.field("demonstration_entity_ids", pa.list_(pa.string())),
        pa.field("num_demonstrations_dropped", pa.int32()),
        pa.field("num_rollouts", pa.int32()),
        pa.field("error", pa.string()),
    ]
)

PREDICTION_COLUMNS = {field.name: Column.like(field.type) for field in PREDICTION_SCHEMA}


def row_to_prediction(row: Mapping[str, Any]) -> Prediction:
    """A row of `PREDICTION_SCHEMA` as a prediction."""
    candidates = [Candidate(item["entity_id"], item["name"], item["log_prob"]) for item in row["candidates"] or ()]
    lists = {name: tuple(row[name] or ()) for name in ("demonstration_ids", "demonstration_entity_ids")}
    return Prediction(**{**row, **lists, "candidates": tuple(candidates)})


def predictions_to_table(predictions: list[Prediction]) -> pa.Table:
    """Rows of `PREDICTION_SCHEMA`, one for each prediction, in the order given."""
    columns: dict[str, list[object]] = {
        name: [getattr(prediction, name) for prediction in predictions]
        for name in PREDICTION_SCHEMA.names
        if name != "candidates"
    }
    columns["candidates"] = [
        [{"entity_id": c.entity_id, "name": c.entity_name, "log_prob": c.log_prob} for c in prediction.candidates]
        for prediction in predictions
    ]
    return pa.Table.from_pydict(columns, schema=PREDICTION_SCHEMA)
