"""Evidence indexes of small tables, from vectors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gemel_engine.evidence.index import EvidenceIndex, complete_evidence, embedded_names
from gemel_engine.evidence.parts import VectorParts, index_parts, make_part
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.types import Features


def build_evidence(
    entities: pa.Table,
    directory: Path,
    *,
    knowledge_base: str = "abc",
    mention_encoder: MentionEncoder | None = None,
    pictures: Mapping[int, Features] | None = None,
) -> EvidenceIndex:
    """Write the evidence index of entities, as the job does, and open it.

    Args:
        entities: Column `name`, and optionally `aliases`, `description` and `popularity`.
        directory: Output directory.
        knowledge_base: Checksum of these entities.
        mention_encoder: Encoder of names, aliases and descriptions; None: without embeddings.
        pictures: Features (N, C) of the N pictures of an entity, by row; None: without pictures.
    """
    ids = pa.array([f"row {row}" for row in range(len(entities))], pa.large_string())
    names = descriptions = [np.zeros((0, 0), np.float32)] * len(ids)
    if mention_encoder is not None:
        rows = entities.to_pylist()
        names = [mention_encoder.encode(embedded_names(row["name"], row.get("aliases"))) for row in rows]
        descriptions = [mention_encoder.encode([text] if (text := row.get("description")) else []) for row in rows]
    found = None if pictures is None else [list(pictures.get(row, ())) for row in range(len(ids))]
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / "part.parquet"
    pq.write_table(make_part(ids, names, descriptions, found), part)
    index_parts(VectorParts([str(part)], ids), directory, len(ids))
    part.unlink()
    return complete_evidence(
        entities,
        directory,
        knowledge_base=knowledge_base,
        mention_encoder_fingerprint=None if mention_encoder is None else mention_encoder.fingerprint,
        image_encoder_fingerprint="an image encoder" if pictures else None,
    )
