"""Count overlaps of a test split with the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

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

    Args:
        train: Table with columns `mention_id`, `text`, `mention` and optionally `image_digest` (of
            the picture's bytes) or `image_uri`.
        test: Table with the same columns.
    """
    required = ("mention_id", "text", "mention")
    seen, asked = checked_frame(train, required, "train"), checked_frame(test, required, "test")
    keys = ["mention", "text"]
    pictures = [column for column in ("image_digest", "image_uri") if column in seen and column in asked]
    shared = [asked[column].notna() & asked[column].isin(seen[column].dropna()) for column in pictures]
    return LeakAudit(
        num_mentions=len(asked),
        mention_ids=int(asked["mention_id"].isin(seen["mention_id"]).sum()),
        texts=int(asked["text"].isin(seen["text"]).sum()),
        mentions_in_texts=int(pd.MultiIndex.from_frame(asked[keys]).isin(pd.MultiIndex.from_frame(seen[keys])).sum()),
        pictures=int(np.logical_or.reduce(shared).sum()) if shared else None,
    )
