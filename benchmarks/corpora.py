"""What benchmarks link: WikiDiverse by its text alone, and the emoji corpus of `make demo` with its pictures.

A directory of WikiDiverse holds `train.parquet`, `dev.parquet` and `entities.parquet` (names alone). Its indexes are
built in `build/cards` by what first needs them; those of the emoji corpus, and the models, by `make demo`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gemel_engine.assembly import load_picture_encoder
from gemel_engine.config.components import EngineSettings, KnowledgeBaseSettings, RetrievalSettings, VisionSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.errors import MentionError
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.pipeline.entity_vectors import EntityEncoders
from gemel_engine.pipeline.knowledge_bases import build
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.reading import read_demonstrations, read_names
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import Features, Mention

LANGUAGE_MODEL = "build/models/smollm2-135m"
MENTION_ENCODER = "build/models/minilm"
IMAGE_ENCODER = "build/models/efficientnet-lite2"
INDEXES = Path("build/cards")  # of WikiDiverse
EMOJI = Path("examples/emoji")  # tables and configuration
EMOJI_INDEXES = Path("build/emoji")
GAZETTEER_INDEXES = Path("build/gazetteer")  # and tables
SEED = 0

Row = dict[str, Any]  # of a table; as a rule a labelled mention


def read_rows(table: Path, size: int | None = None) -> list[Row]:
    """Return the rows of a table, or a fixed sample of them."""
    rows: list[Row] = pq.read_table(table).to_pylist()
    return rows if size is None else random.Random(SEED).sample(rows, min(size, len(rows)))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return mentions in the order in which a job links them: by surface form."""
    return sorted(rows, key=lambda row: (row["mention"], row["mention_id"]))


def mentions_of(rows: Iterable[Row]) -> list[Mention]:
    """Return the mentions without their labels."""
    return [Mention(row["mention_id"], row["text"], row["mention"], group=row.get("group")) for row in rows]


def wikidiverse(data: Path, language_model: str = LANGUAGE_MODEL, directory: Path | None = None) -> LinkConfig:
    """Return a configuration that links dev, with indexes that are built where they are missing.

    Args:
        data: Directory of the corpus.
        language_model: Local directory of the language model.
        directory: Directory of the knowledge base in its tokens; None: that of the demo's model.
    """
    knowledge_base = directory or INDEXES / "knowledge_base"
    encoders = EntityEncoders(mention_encoder=MENTION_ENCODER)
    build_knowledge_base(data / "entities.parquet", knowledge_base, language_model, encoders)
    build_demonstrations(data, INDEXES / "demonstrations")
    return LinkConfig(
        input=str(data / "dev.parquet"),
        output="build/benchmarks/linked",  # nothing is written there
        knowledge_base=str(knowledge_base),
        demonstrations=str(INDEXES / "demonstrations"),
        language_model=EngineSettings(name=language_model, dtype="float32"),
        retrieval=RetrievalSettings(mention_encoder=MENTION_ENCODER),
    )


def emoji() -> LinkConfig:
    """Return the configuration of the demo."""
    return load_config(LinkConfig, EMOJI / "link.toml")


def build_knowledge_base(entities: Path, directory: Path, language_model: str, encoders: EntityEncoders) -> None:
    """Build a knowledge base with its evidence index in a language model's tokens, where it is missing."""
    if not (directory / "knowledge_base.json").exists():
        settings = KnowledgeBaseSettings(on_bad_name="skip")
        build(str(entities), str(directory), load_tokenizer(language_model), settings, encoders)


def build_demonstrations(data: Path, directory: Path) -> None:
    """Build the demonstration index of a corpus' training mentions, where it is missing."""
    if not (directory / "index.json").exists():
        names = read_names(str(data / "entities.parquet"))
        demonstrations = read_demonstrations(str(data / "train.parquet"), names)
        DemonstrationIndex.build(directory, demonstrations, MentionEncoder(MENTION_ENCODER))


def union_with(data: Path, titles: Path) -> pa.Table:
    """Return the entities of WikiDiverse, and those of other titles, which have no aliases or descriptions.

    A title that is a name of the corpus but for capitals is left out: it would be a second answer to the same question.

    Args:
        data: Directory of the corpus.
        titles: Names, in a column `name`.
    """
    known = pq.read_table(data / "entities.parquet", columns=["entity_id", "name"])
    others = pq.read_table(titles, columns=["name"])
    is_known = pc.is_in(pc.utf8_lower(others["name"]), pc.utf8_lower(known["name"]).combine_chunks())
    others = others.filter(pc.invert(is_known))
    ids = pa.array([f"T{row}" for row in range(len(others))])
    return pa.concat_tables([known, others.add_column(0, "entity_id", ids)], promote_options="permissive")


def retriever(settings: RetrievalSettings, artifacts: Artifacts) -> Retriever:
    """Return what retrieves from the indexes of a run, by settings of its own."""
    return Retriever(settings, artifacts.knowledge_base, artifacts.index, artifacts.evidence)


def picture_features(rows: Iterable[Row], settings: VisionSettings) -> list[Features | None]:
    """Return the features of the mentions' pictures; None for a mention without one."""
    found = load_picture_encoder(settings).encode([row["image_bytes"] for row in rows])
    return [None if isinstance(item, MentionError) else item for item in found]


def buckets_of(rows: Sequence[Row], data: Path) -> list[str]:
    """Return the bucket of each mention of WikiDiverse, by what training has seen of it."""
    train = pq.read_table(data / "train.parquet", columns=["mention", "entity_id"]).to_pylist()
    forms, entities = {row["mention"] for row in train}, {row["entity_id"] for row in train}
    names = {row["entity_id"]: row["name"] for row in pq.read_table(data / "entities.parquet").to_pylist()}

    def bucket(row: Row) -> str:
        if row["mention"] in forms:
            return "form_seen"
        if row["entity_id"] in entities:
            return "entity_seen_form_unseen"
        is_name = row["mention"].casefold() == names[row["entity_id"]].casefold()
        return "unseen_name_is_form" if is_name else "unseen_other_name"

    return [bucket(row) for row in rows]
