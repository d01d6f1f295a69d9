"""What a test split has in common with training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from gemel_engine.evaluation.judge import checked_frame


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakAudit:
    """What a test split has in common with the training split: mentions of the test split, by what they share.

    Attributes:
        num_mentions: Of the test split.
        mention_ids: With an id of the training split.
        texts: With a text of the training split.
        mentions_in_texts: With surface form and text of a training mention.
        pictures: With a picture (the same bytes, or the same address) of the training split; None if one of the two has
            no pictures.
    """

    num_mentions: int
    mention_ids: int
    texts: int
    mentions_in_texts: int
    pictures: int | None


def audit_leaks(train: pa.Table, test: pa.Table) -> LeakAudit:
    """Count mentions of a test split that share something with the training split.

    Args:
        train: Columns `mention_id`, `text`, `mention` and optionally `image_digest` (of the bytes) or `image_uri`.
        test: The same.
    """
    seen, asked = (
        checked_frame(table, ("mention_id", "text", "mention"), name)
        for table, name in ((train, "train"), (test, "test"))
    )
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
