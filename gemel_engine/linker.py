"""Links mentions in this process, and explains one by its demonstrations and its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING

from gemel_engine.assembly import load_picture_encoder, open_artifacts, start_generator
from gemel_engine.compatibility import check_encoders
from gemel_engine.config.loading import validated
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.generator import EntityNameGenerator
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.decoding.scope import Scope
from gemel_engine.errors import ConfigurationError, InputError, MentionError
from gemel_engine.evidence.cards import Card
from gemel_engine.evidence.comparison import Argument, arguments
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.knowledge_base.store import Entity, KnowledgeBase
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import Features, Mention, Prediction, fault_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class VisualMark:
    """Marks the place of a picture's embeddings in a prompt, with their number."""

    num_embeddings: int


@dataclass(frozen=True, slots=True)
class UsedDemonstration:
    """A demonstration or a card in a prompt.

    Attributes:
        id: Its id among the prediction's `demonstration_ids`.
        demonstration: The demonstration, or the card of an entity.
        similarity: Cosine similarity of a demonstration's surface form to that of the mention; None
            for a card.
    """

    id: str
    demonstration: Demonstration | Card
    similarity: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One mention, its prediction, and the inputs that led to it.

    Attributes:
        mention: The linked mention.
        prediction: Its prediction.
        demonstrations: Demonstrations and cards in the prompt's order, the last right before the
            question.
        prompt: Input of the language model: text as the tokenizer decodes it, marks of pictures.
            Empty if evidence decided alone.
        entities: Records of the prediction's candidates and of its candidate pool, by id.
        arguments: What speaks for the first candidate and what for the second, if evidence ranks.
        without_picture: Explanation of the same mention without its picture; None if it has none.
    """

    mention: Mention
    prediction: Prediction
    demonstrations: tuple[UsedDemonstration, ...]
    prompt: tuple[str | VisualMark, ...]
    entities: Mapping[str, Entity] = field(default_factory=dict)
    arguments: tuple[Argument, ...] = ()
    without_picture: Explanation | None = None


def explain(linker: Linker, mention: Mention, picture: bytes | None = None) -> Explanation:
    """Link one mention and return the inputs that led to its prediction.

    Args:
        linker: All parts of a run.
        mention: Mention to link.
        picture: Content of an image file; if given, the mention is also linked without it.

    Raises:
        ConfigurationError: There is a picture, but no image encoder is configured.
        InputError: The picture is not given as bytes.
        MentionError: The mention can't be linked.
    """
    with linker.lock:
        return _explain(linker, mention, picture)


def _explain(linker: Linker, mention: Mention, picture: bytes | None) -> Explanation:
    (features,), (retrieved,) = linker.prepare([mention], [picture])
    if isinstance(features, MentionError):
        raise features
    generator = linker.generator
    (prediction,) = generator.generate([mention], [features], [retrieved])
    used: Sequence[PromptItem] = ()
    pieces: Iterator[str | VisualMark] = iter(())
    if prediction.decided_by != "evidence":  # both raise the error that `generate` puts into the prediction
        prompt, used = generator.prompt(mention, features, retrieved)
        Scope.of(generator.artifacts.knowledge_base, mention)
        pieces = _pieces(prompt, generator.artifacts.tokenizer)
    return Explanation(
        mention=mention,
        prediction=prediction,
        demonstrations=tuple(_demonstrations(linker, mention.mention, used)),
        prompt=tuple(pieces),
        entities=dict(_entities(prediction, generator.artifacts.knowledge_base)),
        arguments=tuple(_arguments(mention.mention, prediction, generator)),
        without_picture=None if picture is None else _explain(linker, mention, None),
    )


def _demonstrations(linker: Linker, surface_form: str, items: Sequence[PromptItem]) -> Iterator[UsedDemonstration]:
    rows = [item.row for item in items if not item.is_card]
    similarities: Iterator[float] = iter(())
    if rows and linker.retriever.demonstrations is not None:
        similarities = iter(linker.retriever.demonstrations.similarities(surface_form, rows))
    ids, _ = linker.generator.ids(items)
    for item, example_id in zip(items, ids, strict=True):
        example = linker.generator.example(item, surface_form)
        yield UsedDemonstration(example_id, example, None if item.is_card else next(similarities))


def _entities(prediction: Prediction, knowledge_base: KnowledgeBase) -> Iterator[tuple[str, Entity]]:
    found = [item.entity_id for item in prediction.candidates] + [item.entity_id for item in prediction.pool]
    for entity_id in dict.fromkeys(found):
        row = knowledge_base.row_of_entity(entity_id)
        assert row is not None, "an answer that is not in the knowledge base"
        yield entity_id, knowledge_base.entity(row)


def _arguments(form: str, prediction: Prediction, generator: EntityNameGenerator) -> list[Argument]:
    pair, weights = prediction.candidates[:2], generator.weights
    if weights is None or prediction.decided_by == "language_model" or len(pair) < 2:
        return []
    entities = dict(_entities(prediction, generator.artifacts.knowledge_base))
    pool = {item.entity_id: (entities[item.entity_id].name, item.reasons) for item in prediction.pool}
    return arguments(form, pool, [item.entity_id for item in pair], [item.log_prob for item in pair], weights)


def _pieces(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> Iterator[str | VisualMark]:
    start = 0
    for position, prefix in prompt.visual_prefixes:
        if position > start:
            yield _text(prompt.token_ids[start:position], tokenizer)
        yield VisualMark(len(prefix))
        start = position + len(prefix)
    yield _text(prompt.token_ids[start:], tokenizer)


def _text(token_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Linker:
    """All parts of a linking run in this process.

    Its methods may be called from several threads. Calls run one after the other, since tokenizers,
    demonstrations and engine have state: one call of `link` with many mentions is faster than many.

    Args:
        config: Configuration of the run; its input, output and resources are not used.

    Attributes:
        config: The validated configuration.
        retriever: Retriever of demonstrations, cards and candidates.
        generator: The generator with its running engine.
        lock: Lock that each method holds; hold it to use `retriever` or `generator`
            while other threads call methods.

    Raises:
        ArtifactError: An artifact is missing or damaged, or they don't belong together.
    """

    def __init__(self, config: LinkConfig) -> None:
        self.lock = RLock()
        self.config = config = validated(config)
        artifacts = open_artifacts(config, verify=config.verify_artifacts)
        check_encoders(config, artifacts)
        self._pictures = load_picture_encoder(config.vision) if config.vision.image_encoder is not None else None
        self.retriever = Retriever(config.retrieval, artifacts.knowledge_base, artifacts.index, artifacts.evidence)
        self.generator = start_generator(config, artifacts)

    def link(self, mentions: Sequence[Mention], pictures: Sequence[bytes | None]) -> list[Prediction]:
        """Link B mentions; one that can't be linked becomes a prediction with an `error`.

        Args:
            mentions: Mentions to link.
            pictures: Content of each mention's image file, None without a picture.

        Returns:
            One prediction for each mention, in order.

        Raises:
            ConfigurationError: There is a picture, but no image encoder is configured.
            InputError: A picture is not given as bytes.
        """
        with self.lock:
            encoded, retrieved = self.prepare(mentions, pictures)
            good = {place: item for place, item in enumerate(encoded) if not isinstance(item, MentionError)}
            asked, found = [mentions[place] for place in good], [retrieved[place] for place in good]
            linked = dict(zip(good, self.generator.generate(asked, list(good.values()), found), strict=True))
        return [
            linked[row] if row in linked else Prediction(mention.mention_id, error=str(item))
            for row, (mention, item) in enumerate(zip(mentions, encoded, strict=True))
        ]

    def prepare(
        self, mentions: Sequence[Mention], pictures: Sequence[bytes | None]
    ) -> tuple[list[Features | MentionError | None], list[Retrieved]]:
        """Return the other inputs of generation for B mentions.

        Returns:
            For each mention its image features (C,), None without a picture, or an error if the
            mention or its picture is bad; and what retrieval finds for it.

        Raises:
            ConfigurationError: There is a picture, but no image encoder is configured.
            InputError: A picture is not given as bytes.
        """
        for picture in pictures:
            self.check_picture(picture)
        faults = map(fault_of, mentions)
        files = [fault or picture for fault, picture in zip(faults, pictures, strict=True)]
        with self.lock:
            if self._pictures is not None:
                encoded = self._pictures.encode(files)
            else:
                encoded = [file if isinstance(file, MentionError) else None for file in files]
            good = {place: item for place, item in enumerate(encoded) if not isinstance(item, MentionError)}
            retrieved = [Retrieved()] * len(mentions)
            found = self.retriever.retrieve([mentions[place] for place in good], list(good.values()))
            for place, item in zip(good, found, strict=True):
                retrieved[place] = item
        return encoded, retrieved

    def check_picture(self, picture: bytes | None) -> None:
        """Validate that a picture can be linked with its mention, without reading it.

        Raises:
            ConfigurationError: There is a picture, but no image encoder is configured.
            InputError: It is not given as bytes.
        """
        if not isinstance(picture, bytes | None):
            raise InputError(f"a picture is {picture!r:.50}: give the content of the image file, as bytes")
        if picture is not None and self._pictures is None:
            raise ConfigurationError("a picture needs vision.image_encoder: set it, or leave the picture out")

    def link_one(
        self, text: str, mention: str, picture: bytes | None = None, candidate_ids: Sequence[str] | None = None
    ) -> Prediction:
        """Link one mention; the picture is the content of an image file."""
        candidates = None if candidate_ids is None else tuple(candidate_ids)
        return self.link([Mention("0", text, mention, candidate_ids=candidates)], [picture])[0]
