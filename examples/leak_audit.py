"""Which mentions of a test split share something with training, or with their own entity."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gemel_engine.evaluation.leaks import shared_with_training


def audit(train: pa.Table, test: pa.Table, entities: pa.Table, work: Path) -> dict[str, NDArray[np.bool_]]:
    """Return which test mentions have a text or picture of training, or a picture that is their entity's own.

    Pictures are equal if their bytes are; a picture is an entity's own if Wikimedia Commons has both under one name.
    """
    shared = shared_with_training(*(with_digests(table, work / "pictures") for table in (train, test)))
    own: dict[str, set[str]] = {}
    if "image_uri" in entities.column_names:
        for entity in entities.select(["entity_id", "image_uri"]).to_pylist():
            own[entity["entity_id"]] = {file_name(uri) for uri in entity["image_uri"] or ()}
    pairs = zip(test["entity_id"].to_pylist(), test["image_address"].to_pylist(), strict=True)
    is_own = [uri is not None and file_name(uri) in own.get(entity, ()) for entity, uri in pairs]
    return shared | {"own_pictures": np.array(is_own, bool)}


def with_digests(mentions: pa.Table, pictures: Path) -> pa.Table:
    """Return mentions with the digest of each picture's bytes as `image_digest`."""
    uris = mentions["image_uri"].to_pylist()
    digests = [None if uri is None else hashlib.sha256((pictures / uri).read_bytes()).digest() for uri in uris]
    return mentions.append_column("image_digest", pa.array(digests, pa.binary()))


def file_name(address: str) -> str:
    """Return the name of a picture in Wikimedia Commons, however it is addressed."""
    name = unquote(re.split(r"[?#]", address)[0].rpartition("/")[2])
    return re.sub(r"^\d+px-", "", name).replace(" ", "_")
