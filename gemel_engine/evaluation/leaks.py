"""Count overlaps of a test split with the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from gemel_engine.evaluation.judge import checked_frame


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakAudit:
    """Number of test mentions that share something with the training split.

    Attributes:
        num_mentions: Number of mentions of the test split.
        mention_ids: Number of mentions whose `mention_id` is in the training split.
        texts: Number of mentions whose text is in the training split.
        mentions_in_texts: Number of mentions with the surface form and the text of a training
            mention.
        pictures: Number of mentions with a picture (the same bytes, or the same address) of the
            training split; None if one of the two splits has no pictures.
    """

    num_mentions: int
    mention_ids: int
    texts: int
    mentions_in_texts: int
    pictures: int | None


def audit_leaks(train: pa.Table, test: pa.Table) -> LeakAudit:
    """Count mentions of a test split that share something with the training split.

    Arguments and errors are those of `shared_with_training`.
    """
    counts = {name: int(is_shared.sum()) for name, is_shared in shared_with_training(train, test).items()}
    return LeakAudit(
        num_mentions=len(test),
        mention_ids=counts["mention_ids"],
        texts=counts["texts"],
        mentions_in_texts=counts["mentions_in_texts"],
        pictures=counts.get("pictures"),
    )


def shared_with_training(train: pa.Table, test: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Return which mentions of a test split share something with the training split.

    Args:
        train: Table with columns `mention_id`, `text`, `mention` and optionally `image_digest` (of
            the picture's bytes) or `image_uri`.
        test: Table with the same columns.

    Returns:
        Arrays (N,) by the attribute of `LeakAudit` that counts them; `pictures` only if both splits
        have some.

    Raises:
        InputError: A table lacks a column.
    """
    required = ("mention_id", "text", "mention")
    seen, asked = checked_frame(train, required, "train"), checked_frame(test, required, "test")
    keys = ["mention", "text"]
    pictures = [column for column in ("image_digest", "image_uri") if column in seen and column in asked]
    found = {
        "mention_ids": asked["mention_id"].isin(seen["mention_id"]).to_numpy(),
        "texts": asked["text"].isin(seen["text"]).to_numpy(),
        "mentions_in_texts": pd.MultiIndex.from_frame(asked[keys]).isin(pd.MultiIndex.from_frame(seen[keys])),
    }
    shared = [asked[column].notna() & asked[column].isin(seen[column].dropna()) for column in pictures]
    return found | ({"pictures": np.logical_or.reduce(shared)} if shared else {})
