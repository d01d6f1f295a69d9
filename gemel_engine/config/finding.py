"""Settings of the search for mentions in documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from gemel_engine.config.bounds import Count, Fraction
from gemel_engine.config.columns import ColumnNames
from gemel_engine.config.components import Address, ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class FinderSettings:
    """How mentions are found: by a dictionary of known forms, or by a model.

    Attributes:
        model: Token-classification model (named entity recognition): local directory, or name on
            the model hub. None: a dictionary of the knowledge base's names and aliases and of the
            surface forms of the demonstrations.
        labels: Labels of the model whose spans are mentions, such as `PER` and `LOC`, without `B-`
            and `I-`; empty: all.
        device: torch device of the model.
        batch_size: Number of texts, or windows of long ones, in one pass of the model.
        ignore_case: Whether the dictionary finds a form in any case.
        min_prior: Minimum probability that an occurrence of a form in the dictionary is a mention,
            by the texts of the demonstrations. Higher finds fewer mentions, of which more are
            right.
        max_text_characters: Maximum number of characters of a mention's text; a longer document is
            cut around each mention.
    """

    model: ModelName | None = None
    labels: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    batch_size: Count = 16
    ignore_case: bool = True
    min_prior: Fraction = 0.5
    max_text_characters: Count = 2000

    def __post_init__(self) -> None:
        if self.device == "cuda" and self.model is None:
            raise ValueError("finder.device is 'cuda', but finder.model is not set: a dictionary uses no GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class FindConfig:
    """Settings of a search for mentions in documents.

    Each shard of `rows_per_shard` documents becomes one output file; a rerun searches only the
    shards whose files are missing.

    Attributes:
        input: Table file or directory of documents, local or s3://bucket/prefix: `document_id`,
            `text`, and optionally `image_bytes`, `image_uri` or `image_features`.
        output: Output directory, local or s3://bucket/prefix, which `gemel link` takes as `input`.
        knowledge_base: Directory written by `gemel build-kb` or `gemel update-kb`, local or
            s3://bucket/prefix.
        demonstrations: Directory written by `gemel build-demonstrations`, local or
            s3://bucket/prefix; None: the dictionary has names and aliases alone.
        finder: How mentions are found.
        columns: Names of the columns of the documents, where they differ from the engine's own.
        gold: Table file or directory of the mentions that should be found, to print precision and
            recall: `group` (the id of the document), `mention`, and `mention_start`, else `text`.
        rows_per_shard: Maximum number of documents that are searched together, as a shard.
        max_failed_fraction: Maximum share of documents with an `error` before the job fails.
    """

    # Also applies to the settings within.
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    input: Address
    output: Address
    knowledge_base: Address | None = None
    demonstrations: Address | None = None
    finder: FinderSettings = field(default_factory=FinderSettings)
    columns: ColumnNames = field(default_factory=ColumnNames)
    gold: Address | None = None
    rows_per_shard: Count = 1024
    max_failed_fraction: Fraction = 0.01

    def __post_init__(self) -> None:
        if self.finder.model is None and self.knowledge_base is None and self.demonstrations is None:
            raise ValueError(
                "finder.model is not set, and neither are knowledge_base nor demonstrations, from which a dictionary "
                "is made: set one of the three"
            )
