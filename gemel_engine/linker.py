"""Linking without Ray, for a notebook or a service: encoders, retrieval and generation in one object.

    linker = Linker(load_config(LinkConfig, Path("link.toml")))
    linker.link_one("A bear plays the drums.", "bear", Path("bear.png").read_bytes())

The distributed job runs the same three parts, each in actors of its own.

B mentions, C vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock

from gemel_engine.artifacts import Artifacts, open_artifacts
from gemel_engine.config import JobConfig, LinkConfig, RetrievalSettings, VisionSettings, validated
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, MentionError
from gemel_engine.generation import EntityNameGenerator
from gemel_engine.mention_encoder import MentionEncoder
from gemel_engine.retrieval import DemonstrationIndex
from gemel_engine.types import Features, Mention, Prediction, are_features, fault_of
from gemel_engine.vision import ImageEncoder, PictureEncoder


class DemonstrationRetriever:
    """Surface forms to rows of the demonstration index."""

    def __init__(self, settings: RetrievalSettings, index: DemonstrationIndex, device: str = "cpu") -> None:
        self._settings = settings
        self._index = index
        assert settings.mention_encoder is not None, "checked by the configuration"
        self.encoder = MentionEncoder(settings.mention_encoder, device)

    def retrieve(self, mentions: Sequence[Mention], features: Sequence[Features | None]) -> list[list[int]]:
        """Row numbers for each of B mentions, the most similar last; those of similar pictures behind all others.

        Args:
            mentions: What to find demonstrations for.
            features: Image features (C,) of each mention, None without a picture.

        Raises:
            InputError: A mention would be its own demonstration though its group is left out.
        """
        settings, index = self._settings, self._index
        excluded = [mention.group or mention.mention_id if settings.exclude_group else None for mention in mentions]
        if settings.policy == "random":
            found = [
                index.sample(mention.mention, settings.num_demonstrations, settings.seed, group)
                for mention, group in zip(mentions, excluded, strict=True)
            ]
        else:
            embeddings = self.encoder.encode([mention.mention for mention in mentions])
            found = index.retrieve(embeddings, settings.num_demonstrations, excluded)
        found = [
            [*rows, *self._similar_pictures(rows, item, group)]
            for rows, item, group in zip(found, features, excluded, strict=True)
        ]
        if settings.exclude_group:
            for mention, rows in zip(mentions, found, strict=True):
                if mention.mention_id in index.mention_ids(rows):
                    raise InputError(
                        f"mention {mention.mention_id!r} of group {mention.group!r} has another group in the index of "
                        "demonstrations: build the index again from the same table"
                    )
        return found

    def similarities(self, surface_form: str, rows: Sequence[int]) -> list[float]:
        """Cosine of a surface form's embedding and those of demonstrations' surface forms."""
        embeddings = self.encoder.encode([surface_form, *(self._index[row].mention for row in rows)])  # (1 + K, E)
        cosines: list[float] = (embeddings[1:] @ embeddings[0]).tolist()
        return cosines

    def _similar_pictures(self, rows: list[int], features: Features | None, excluded: str | None) -> list[int]:
        width = self._index.metadata.vision_width
        if not rows or features is None or width is None or not are_features(features, width):
            return []  # features that don't fit are an error of the mention, which generation reports
        return self._index.similar_pictures(rows[-1], features, self._settings.num_similar_pictures, excluded)


def load_picture_encoder(settings: VisionSettings) -> PictureEncoder:
    """Load the image encoder of a run, for picture files.

    Raises:
        ArtifactError: It can't be loaded.
        ConfigurationError: None is configured, or it is of an unknown kind.
    """
    if settings.image_encoder is None:
        raise ConfigurationError("vision.image_encoder is not set: name an open_clip model or directory")
    encoder = ImageEncoder(settings.image_encoder, settings.pretrained, device=settings.device)
    return PictureEncoder(encoder, settings.max_image_pixels, settings.batch_size)


def check_encoders(config: JobConfig, artifacts: Artifacts) -> ImageEncoder | None:
    """Load the encoders once, to see that they are the ones that the artifacts were made with.

    Returns:
        The image encoder, if one is configured.

    Raises:
        ArtifactError: An encoder can't be loaded, or is another one.
    """
    index, mapper, image_encoder = artifacts.index, artifacts.feature_mapper, None
    if config.vision.image_encoder is not None:
        image_encoder = ImageEncoder(config.vision.image_encoder, config.vision.pretrained)
        ours = image_encoder.width, image_encoder.fingerprint
        remedy = f"made with another image encoder than {config.vision.image_encoder}: use"
        if mapper is not None and not _fits(
            ours, mapper.metadata.vision_width, mapper.metadata.image_encoder_fingerprint
        ):
            raise ArtifactError(
                f"the feature mapper {config.vision.feature_mapper} was {remedy} the one trained for it"
            )
        if index is not None and not _fits(ours, index.metadata.vision_width, index.metadata.image_encoder_fingerprint):
            raise ArtifactError(f"the demonstrations {config.demonstrations} were {remedy} an index built with it")
    if index is not None:
        retriever = DemonstrationRetriever(config.retrieval, index)
        if retriever.encoder.fingerprint != index.metadata.mention_encoder_fingerprint:
            raise ArtifactError(
                f"the demonstrations {config.demonstrations} were encoded by another mention encoder than "
                f"{config.retrieval.mention_encoder}: build the index again with it"
            )
    return image_encoder


def _fits(encoder: tuple[int, str], width: int | None, fingerprint: str | None) -> bool:
    """Whether an artifact with these two, each of which it may lack, goes with an encoder."""
    return width in (None, encoder[0]) and fingerprint in (None, encoder[1])


class Linker:
    """All parts of a linking run in this process.

    Its methods may be called from several threads: calls are served one after the other, since tokenizers,
    demonstrations and engine hold state. A service that collects mentions into one call of `link` is faster.

    Args:
        config: The run; its input, output and resources are not used.

    Attributes:
        retriever: None without demonstrations.
        generator: The engine and what stands around it.
        lock: Held by each method; hold it to use `retriever` or `generator` beside other threads.

    Raises:
        ArtifactError: An artifact is missing or damaged, or they don't belong together.
    """

    def __init__(self, config: LinkConfig) -> None:
        self.lock = RLock()
        config = validated(config)
        artifacts = open_artifacts(config, verify=config.verify_artifacts)
        check_encoders(config, artifacts)
        self._pictures = load_picture_encoder(config.vision) if config.vision.image_encoder is not None else None
        index = artifacts.index
        self.retriever = None if index is None else DemonstrationRetriever(config.retrieval, index)
        self.generator = EntityNameGenerator.start(config, artifacts)

    def link(self, mentions: Sequence[Mention], pictures: Sequence[bytes | None]) -> list[Prediction]:
        """Link B mentions with their picture files; a bad one becomes a prediction with an `error`."""
        with self.lock:
            encoded, rows = self.prepare(mentions, pictures)
            good = {place: item for place, item in enumerate(encoded) if not isinstance(item, MentionError)}
            asked, demonstrations = [mentions[place] for place in good], [rows[place] for place in good]
            linked = dict(zip(good, self.generator.generate(asked, list(good.values()), demonstrations), strict=True))
        return [
            linked[row] if row in linked else Prediction(mention.mention_id, error=str(item))
            for row, (mention, item) in enumerate(zip(mentions, encoded, strict=True))
        ]

    def prepare(
        self, mentions: Sequence[Mention], pictures: Sequence[bytes | None]
    ) -> tuple[list[Features | MentionError | None], list[list[int]]]:
        """What generation takes beside B mentions.

        Returns:
            Image features (C,) of each, None without a picture, an error where the mention or its picture is bad; and
            the rows of its demonstrations, the most similar last.
        """
        faults = map(fault_of, mentions)
        files = [fault or picture for fault, picture in zip(faults, pictures, strict=True)]
        with self.lock:
            if self._pictures is not None:
                encoded = self._pictures.encode(files)
            else:
                encoded = [file if isinstance(file, MentionError) else None for file in files]
            good = {place: item for place, item in enumerate(encoded) if not isinstance(item, MentionError)}
            rows: list[list[int]] = [[] for _ in mentions]
            if self.retriever is not None:
                found = self.retriever.retrieve([mentions[place] for place in good], list(good.values()))
                for place, demonstrations in zip(good, found, strict=True):
                    rows[place] = demonstrations
        return encoded, rows

    def link_one(
        self, text: str, mention: str, picture: bytes | None = None, candidate_ids: Sequence[str] | None = None
    ) -> Prediction:
        """Link one mention; the picture is the content of an image file."""
        candidates = None if candidate_ids is None else tuple(candidate_ids)
        return self.link([Mention("0", text, mention, candidate_ids=candidates)], [picture])[0]
