"""Look for gold entities in the candidate pools of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def are_in_pools(
    predictions: pa.Table, mention_ids: Sequence[str], entity_ids: Sequence[str]
) -> NDArray[np.bool_] | None:
    """Return whether the gold entity of each of N mentions is in its candidate pool.

    Args:
        predictions: Output of a run, with or without a column `pool`.
        mention_ids: Mentions, each once.
        entity_ids: Gold entity of each.

    Returns:
        One value per mention (N,), false where its row has an empty pool; None if all rows have.
    """
    if "pool" not in predictions.column_names:
        return None
    pools = predictions["pool"]  # in its chunks: one array can't have more than 2 GiB of text
    proposed = pc.struct_field(pc.list_flatten(pools), "entity_id")
    if not len(proposed):
        return None
    place_of_row = pc.index_in(predictions["mention_id"], pa.array(mention_ids, pa.string())).combine_chunks()
    place = place_of_row.take(pc.list_parent_indices(pools))
    gold = pa.array(entity_ids, pa.string()).take(place)  # null for a mention that is not asked for
    found = np.zeros(len(mention_ids), bool)
    found[place.filter(pc.equal(proposed, gold)).to_numpy()] = True
    return found
