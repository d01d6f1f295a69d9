"""Commands that build, update and merge knowledge bases; registered in `main.py`."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from gemel_engine.config.bounds import Count, NumBytes, NumPixels
from gemel_engine.errors import ConfigurationError

if TYPE_CHECKING:
    from gemel_engine.config.components import KnowledgeBaseSettings
    from gemel_engine.pipeline.entity_vectors import EntityEncoders
    from gemel_engine.pipeline.knowledge_bases import BuildReport

Entities = Annotated[Positional[str], arg(metavar="ENTITIES")]
KnowledgeBase = Annotated[Positional[str], arg(metavar="KNOWLEDGE_BASE")]
Changes = Annotated[Positional[str], arg(metavar="CHANGES")]
Output = Annotated[Positional[str], arg(metavar="OUTPUT")]
OutputDir = Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NameOptions:
    """Which entity names are usable, and what happens to rows with unusable names.

    Attributes:
        tokenizer: Language model whose tokenizer splits the names: local directory, or name on the
            model hub.
        max_name_tokens: Maximum number of tokens of a name; a longer name is unusable.
        on_bad_name: What to do with an unusable name: `error` rejects the whole table, `skip`
            leaves the row out.
    """

    tokenizer: str
    max_name_tokens: Count = 32
    on_bad_name: Literal["error", "skip"] = "error"

    def settings(self) -> KnowledgeBaseSettings:
        """Return the settings that a knowledge base is built with."""
        from gemel_engine.config.components import KnowledgeBaseSettings

        return KnowledgeBaseSettings(max_name_tokens=self.max_name_tokens, on_bad_name=self.on_bad_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """Models that compute embeddings and picture features.

    Attributes:
        mention_encoder: Sentence encoder of names, aliases, descriptions and surface forms: local
            directory, or name on the model hub; without one, a knowledge base has no embeddings.
        image_encoder: open_clip architecture, or local directory in open_clip's layout; without
            one, only pictures in `image_features` are used.
        image_encoder_pretrained: Name of open_clip's weights, if the encoder is an architecture.
        device: torch device of both encoders.
        max_image_pixels: Maximum number of pixels of a decoded picture; a larger one is left out.
        allowed_image_prefixes: Allowed prefixes of an `image_uri`: absolute local directories,
            s3://bucket/prefix, https://host/path.
        max_image_bytes: Maximum size of an image file in bytes; a larger one is left out.
    """

    mention_encoder: str | None = None
    image_encoder: str | None = None
    image_encoder_pretrained: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    max_image_pixels: NumPixels = 50_000_000
    allowed_image_prefixes: tuple[str, ...] = ()
    max_image_bytes: NumBytes = 20_000_000

    def encoders(self) -> EntityEncoders:
        """Return the encoders that are named.

        Raises:
            ConfigurationError: Weights of an image encoder are named without the encoder.
        """
        from gemel_engine.config.components import ImagePolicy
        from gemel_engine.pipeline.entity_vectors import EntityEncoders

        if self.image_encoder_pretrained is not None and self.image_encoder is None:
            raise ConfigurationError(
                f"--image-encoder-pretrained is {self.image_encoder_pretrained!r} without --image-encoder: name its "
                "architecture, too, or leave both out"
            )
        return EntityEncoders(
            mention_encoder=self.mention_encoder,
            image_encoder=self.image_encoder,
            image_encoder_pretrained=self.image_encoder_pretrained,
            device=self.device,
            max_image_pixels=self.max_image_pixels,
            images=ImagePolicy(self.allowed_image_prefixes, self.max_image_bytes),
        )


def build_kb(
    entities: Entities,
    output: Output,
    *,
    names: OmitArgPrefixes[NameOptions],
    evidence: bool = True,
    encoders: OmitArgPrefixes[EncoderOptions],
) -> None:
    """Build a knowledge base from a table of entities, with the evidence by which they are found.

    The same command goes on with a build that was killed.

    Args:
        entities: Table file or directory of such files, local or s3://bucket/prefix. Required
            columns: `entity_id` and `name`; optional columns: `aliases`, `other_names` (aliases that
            may be generated, too), `description`, `popularity`, `language`, and pictures, one or a
            list of them: `image_features`, else `image_bytes`, else `image_uri`.
        output: New or empty directory, local or s3://bucket/prefix.
        names: Which names are usable.
        evidence: Whether to write the evidence index: names, aliases and words, and what the
            encoders compute. Without it, no candidates can be retrieved.
        encoders: Models of embeddings and pictures.
    """
    from gemel_engine.pipeline.entity_vectors import check_table
    from gemel_engine.pipeline.knowledge_bases import build
    from gemel_engine.tokenizer import load_tokenizer

    started = time.perf_counter()
    models = encoders.encoders()
    if not evidence and (models.mention_encoder or models.image_encoder):
        raise ConfigurationError(
            "--no-evidence is given together with --mention-encoder or --image-encoder, which compute evidence: leave "
            "out one or the other"
        )
    check_table(entities, models, ("entity_id", "name"))
    tokenizer = load_tokenizer(names.tokenizer)
    built = build(entities, output, tokenizer, names.settings(), models if evidence else None)
    _log_counts(output, built, time.perf_counter() - started)


def _log_counts(output: str, built: BuildReport, seconds: float) -> None:
    report = built.knowledge_base
    logger.info(
        "%s: %d entities, %d names of at most %d tokens, %d entities skipped, %d aliases repeated, %d aliases "
        "that are names of other entities, %d other names, in %.1f s",
        output,
        report.num_entities,
        report.num_names,
        report.longest_name,
        sum(report.num_skipped.values()),
        report.num_repeated_aliases,
        report.num_aliases_like_names,
        report.num_other_names,
        seconds,
    )
    if built.evidence is not None:
        logger.info(
            "%s: evidence of %d names and aliases (%d embedded), %d descriptions, %d pictures, %d unusable pictures",
            output,
            built.evidence.num_names,
            built.evidence.num_embedded_names,
            built.evidence.num_descriptions,
            built.evidence.num_pictures,
            built.num_unusable_pictures,
        )


def update_kb(
    knowledge_base: KnowledgeBase,
    changes: Changes,
    output_dir: OutputDir,
    *,
    names: OmitArgPrefixes[NameOptions],
    encoders: OmitArgPrefixes[EncoderOptions],
) -> None:
    """Add, rename and retire entities of a knowledge base, by writing an update next to it.

    The update can be used wherever a knowledge base can; it refers to its base, which must be kept.
    If the base was built with encoders, the update needs the same ones.

    Args:
        knowledge_base: Directory of the base: a knowledge base or an update, local or
            s3://bucket/prefix. Do not move or delete it afterwards.
        changes: Table file or directory of such files with the columns of `gemel build-kb` and
            `retired`. A row whose `entity_id` exists in the base replaces that entity; columns that
            the table lacks keep their values, and pictures are kept if it has none of their columns.
        output_dir: New or empty local directory.
        names: Which names are usable.
        encoders: Encoders that the base was built with.
    """
    from gemel_engine.pipeline.entity_vectors import check_table
    from gemel_engine.pipeline.knowledge_bases import update
    from gemel_engine.tokenizer import load_tokenizer

    started = time.perf_counter()
    models = encoders.encoders()
    check_table(changes, models, ("entity_id",))
    tokenizer = load_tokenizer(names.tokenizer)
    report = update(knowledge_base, changes, output_dir, tokenizer, names.settings(), models)
    logger.info(
        "%s: %d entities added, %d replaced, %d retired, %d changes skipped, in %.1f s",
        output_dir,
        report.num_added,
        report.num_replaced,
        report.num_retired,
        sum(report.num_skipped.values()),
        time.perf_counter() - started,
    )


def compact_kb(knowledge_base: KnowledgeBase, output_dir: OutputDir) -> None:
    """Merge an update and its base into a knowledge base that depends on neither.

    Args:
        knowledge_base: Directory written by `gemel update-kb`, local or s3://bucket/prefix.
        output_dir: New or empty local directory.
    """
    from gemel_engine.pipeline.knowledge_bases import compact

    started = time.perf_counter()
    report = compact(knowledge_base, output_dir)
    seconds = time.perf_counter() - started
    logger.info("%s: %d entities, %d names, in %.1f s", output_dir, report.num_entities, report.num_names, seconds)
