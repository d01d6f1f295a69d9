"""Further names of entities that may be generated, such as names in other languages.

    other_names.arrow       one record batch: pairs of a name of the trie and the row of its entity,
                            ascending; the file is missing if there are none

Shapes: P pairs.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.knowledge_base.names import TokenisedNames, logger, reasons_to_skip
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "other_names.arrow"
_SCHEMA = pa.schema([pa.field("name_index", pa.uint32()), pa.field("row", pa.uint32())])

Numbers = NDArray[np.uint32]


class OtherNames:
    """Pairs of a name and the row of an entity that has it besides its main name.

    Args:
        name_index: Name of each pair, ascending, shape (P,).
        rows: Row of each pair's entity, ascending for each name, shape (P,).
    """

    def __init__(self, name_index: Numbers, rows: Numbers) -> None:
        self.name_index = name_index
        self.rows = rows

    @classmethod
    def of(cls, name_index: NDArray[np.integer], rows: NDArray[np.integer], main_names: NDArray[np.integer]) -> Self:
        """Return the distinct pairs in order, without those of an entity's main name.

        Args:
            name_index: Name of each pair, shape (P,).
            rows: Row of each pair's entity, shape (P,).
            main_names: Main name of the entity in each row, shape (S,).
        """
        pairs = np.column_stack([name_index, rows])[name_index != main_names[rows]]
        distinct = np.unique(pairs.reshape(-1, 2), axis=0).astype(np.uint32)
        return cls(distinct[:, 0], distinct[:, 1])

    def __len__(self) -> int:
        return len(self.rows)

    def entities_of(self, name_index: int) -> list[int]:
        """Return the rows of the entities that have a name besides their main name."""
        start, stop = _place_of(name_index, self.name_index)
        return [int(row) for row in self.rows[start:stop]]

    def names_of(self, row: int) -> list[int]:
        """Return the names of an entity besides its main name."""
        if not len(self):
            return []
        names, rows = self._by_row
        start, stop = _place_of(row, rows)
        return [int(name) for name in names[start:stop]]

    @cached_property
    def _by_row(self) -> tuple[Numbers, Numbers]:
        order = np.argsort(self.rows, kind="stable")
        return self.name_index[order], self.rows[order]

    def save(self, directory: Path) -> str:
        """Write the file and return its SHA-256."""
        columns = [pa.array(self.name_index, pa.uint32()), pa.array(self.rows, pa.uint32())]
        with pa.ipc.new_file(str(directory / FILE), _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        return file_sha256(directory / FILE)

    @classmethod
    def open(cls, directory: Path, num_names: int, num_entities: int, checksum: object) -> Self:
        """Map the file of a knowledge base.

        Args:
            directory: Directory of the knowledge base.
            num_names: Number of names of its trie.
            num_entities: Number of its entities.
            checksum: SHA-256 in its manifest; None: it has no other names.

        Raises:
            ArtifactError: The file is missing, damaged or of another knowledge base.
        """
        if checksum is None:
            return cls(np.zeros(0, np.uint32), np.zeros(0, np.uint32))
        path = directory / FILE
        try:
            with parquet.open_arrow(path) as reader:
                if reader.schema != _SCHEMA or reader.num_record_batches != 1:
                    raise ArtifactError(f"{path} has other columns than a knowledge base; build it again")
                pairs = reader.get_batch(0)
            name_index, rows = (column.to_numpy(zero_copy_only=True) for column in pairs.columns)
            is_whole = file_sha256(path) == checksum
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}); build the knowledge base again") from error
        if not is_whole or name_index.max() >= num_names or rows.max() >= num_entities:
            raise ArtifactError(f"{path} is damaged or of another knowledge base; build the knowledge base again")
        return cls(name_index, rows)


def _place_of(value: int, ascending: Numbers) -> tuple[int, int]:
    """Return where a value begins and ends; in its own type, or NumPy would convert all others."""
    start, stop = (int(np.searchsorted(ascending, ascending.dtype.type(value), side)) for side in ("left", "right"))
    return start, stop


def tokenise_other_names(
    lists: pa.ChunkedArray, tokenizer: PreTrainedTokenizerFast, max_name_tokens: int
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.intp]]:
    """Tokenise the usable names of lists of names; a warning counts the others by reason.

    Args:
        lists: Normalised names of each entity besides its main name; null: none.
        tokenizer: Tokenizer of the language model.
        max_name_tokens: Maximum number of tokens of a name.

    Returns:
        Concatenated token ids (T,), their offsets (P + 1,), and the row of each name's entity (P,).
    """
    flat = lists.combine_chunks()
    texts, parents = pc.list_flatten(flat), pc.list_parent_indices(flat).to_numpy().astype(np.intp)
    if not len(texts):
        return np.zeros(0, np.uint32), np.zeros(1, np.int64), parents
    names = TokenisedNames.tokenise(pa.chunked_array([texts]), tokenizer)
    reasons = reasons_to_skip(pa.chunked_array([texts]), names, tokenizer, max_name_tokens)
    is_usable = reasons == ""
    if not is_usable.all():
        found = {str(reason): int((reasons == reason).sum()) for reason in sorted(set(reasons[~is_usable]))}
        logger.warning("left out %d of %d other names: %s", (~is_usable).sum(), len(reasons), found)
    return *names.select(is_usable), parents[is_usable]
