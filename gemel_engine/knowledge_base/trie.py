"""The token sequences that may be generated, as a prefix trie in flat arrays that processes share by memory-mapping.

Shapes: N nodes, M distinct names, S sequences, T tokens, B nodes in a batch.

Nodes are numbered breadth-first and siblings by token. The root is node 0, the children of node n are the nodes
``first_child[n]`` to ``first_child[n + 1] - 1``, and the names are numbered in the order of the nodes that end them.
The trie knows no tokenizer, and not the terminator: that is one more allowed token wherever `is_terminal`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.storage.local import open_regular
from gemel_engine.storage.manifest import file_sha256, read_manifest, write_manifest

FORMAT_VERSION = 2
MANIFEST = "trie.json"
_WITHOUT_CHECKSUM = 1
_DTYPES = {
    "tokens": (np.dtype(np.uint16), np.dtype(np.uint32)),
    "first_child": (np.dtype(np.uint32),),
    "heights": (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32)),
    "terminals": (np.dtype(np.uint32),),
}
_PIECE = 1 << 16

UnsignedArray = NDArray[np.unsignedinteger[Any]]
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTrie:
    """A set of token sequences; at most 2**32 - 1 nodes.

    Attributes:
        tokens: Token on the edge into each node; (N,), uint16 if every token fits, else uint32. The root's is 0.
        first_child: First child of each node, then N; (N + 1,) uint32. Non-decreasing.
        heights: Tokens from each node to the end of the longest name below it; (N,), uint8 where that fits.
        terminals: Nodes that end a name, ascending; (M,) uint32.
    """

    tokens: UnsignedArray
    first_child: UnsignedArray
    heights: UnsignedArray
    terminals: UnsignedArray

    @classmethod
    def build(cls, token_ids: IntArray, offsets: IntArray) -> tuple[Self, NDArray[np.intp]]:
        """Build the trie of S sequences, one level at a time; duplicates are allowed.

        Args:
            token_ids: The sequences one after another; (T,), each in [0, 2**32).
            offsets: Where each sequence starts in `token_ids`, then T; (S + 1,).

        Returns:
            The trie, and for each sequence the number of its name; (S,). Equal sequences have equal numbers.

        Raises:
            ValueError: There is no sequence, one is empty, the offsets do not span `token_ids`, or a token is out of
                range.
        """
        lengths = np.diff(offsets.astype(np.int64))
        if not len(lengths) or lengths.min() < 1 or offsets[0] != 0 or offsets[-1] != len(token_ids):
            raise ValueError("a prefix trie needs at least one sequence, none empty, and offsets from 0 to the end")
        if token_ids.min() < 0 or token_ids.max() >= 2**32:
            raise ValueError(f"tokens {token_ids.min()} to {token_ids.max()} are not all in [0, 2**32)")
        ends = np.zeros(len(lengths), np.uint64)  # the node that each sequence has reached
        open_rows = np.arange(len(lengths))
        edges_by_level, heights_by_level, num_nodes = [], [lengths.max(keepdims=True)], 1
        for depth in range(lengths.max()):
            open_rows = open_rows[lengths[open_rows] > depth]
            tokens = token_ids[offsets[open_rows] + depth].astype(np.uint64)
            edges, edge_of_row = np.unique(ends[open_rows] << 32 | tokens, return_inverse=True)
            heights = np.zeros(len(edges), lengths.dtype)
            np.maximum.at(heights, edge_of_row, lengths[open_rows] - depth - 1)
            ends[open_rows] = num_nodes + edge_of_row
            num_nodes += len(edges)
            edges_by_level.append(edges)
            heights_by_level.append(heights)
        edges = np.concatenate(edges_by_level)
        parents, tokens = edges >> 32, edges & 0xFFFFFFFF
        return cls._from_nodes(parents, tokens, np.concatenate(heights_by_level), ends)

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> tuple[Self, NDArray[np.intp]]:
        """Same as `build`, quicker for a few short sequences, such as a mention's candidates."""
        names = [tuple(sequence) for sequence in sequences]
        if not names or () in names:
            raise ValueError("a prefix trie needs at least one sequence, and none empty")
        prefixes = {name[:length] for name in names for length in range(len(name) + 1)}
        breadth_first = sorted(sorted(prefixes), key=len)
        node_of = {prefix: node for node, prefix in enumerate(breadth_first)}
        parents = [node_of[prefix[:-1]] for prefix in breadth_first[1:]]
        tokens = [prefix[-1] for prefix in breadth_first[1:]]
        ends = [node_of[name] for name in names]
        heights = [0] * len(node_of)
        for node, parent in zip(range(len(parents), 0, -1), reversed(parents), strict=True):
            heights[parent] = max(heights[parent], heights[node] + 1)
        return cls._from_nodes(np.array(parents), np.array(tokens, np.uint32), np.array(heights), np.array(ends))

    @classmethod
    def _from_nodes(
        cls, parents: IntArray, tokens: IntArray, heights: IntArray, ends: IntArray
    ) -> tuple[Self, NDArray[np.intp]]:
        """Take parents and tokens of nodes 1 to N - 1, heights of all, and the node at the end of each sequence."""
        terminals, name_of_sequence = np.unique(ends, return_inverse=True)
        num_children = np.bincount(parents.astype(np.intp), minlength=len(heights))
        trie = cls(
            tokens=_smallest(np.concatenate([np.zeros(1, tokens.dtype), tokens]), np.uint16),
            first_child=np.concatenate([[1], 1 + np.cumsum(num_children)]).astype(np.uint32),
            heights=_smallest(heights, np.uint8),
            terminals=terminals.astype(np.uint32),
        )
        return trie, name_of_sequence

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return len(self.tokens)

    @property
    def num_names(self) -> int:
        """M, the distinct sequences."""
        return len(self.terminals)

    def num_children(self, node: int) -> int:
        """How many tokens may follow `node`, the terminator not counted."""
        return int(self.first_child[node + 1]) - int(self.first_child[node])

    def children(self, node: int) -> tuple[UnsignedArray, int]:
        """Tokens that may follow `node`, ascending, and the child that the first of them leads to.

        The i-th token leads to the i-th node from there. The tokens are a read-only view where the trie is mapped.
        """
        start, stop = int(self.first_child[node]), int(self.first_child[node + 1])
        return self.tokens[start:stop], start

    def child(self, node: int, token: int) -> int | None:
        """The node that `token` leads to from `node`; None where the trie does not allow it."""
        start, stop = int(self.first_child[node]), int(self.first_child[node + 1])
        child = bisect_left(self.tokens, token, start, stop)
        return child if child < stop and self.tokens[child] == token else None

    def walk(self, tokens: Sequence[int]) -> int:
        """The node at the end of a path from the root.

        Raises:
            ValueError: No name starts with `tokens`.
        """
        node = 0
        for position, token in enumerate(tokens):
            child = self.child(node, token)
            if child is None:
                raise ValueError(f"no name continues {list(tokens[:position])} with token {token}")
            node = child
        return node

    def parent(self, node: int) -> int:
        """The node that `node` is a child of; undefined for the root."""
        return bisect_right(self.first_child, node) - 1

    def is_terminal(self, node: int) -> bool:
        """Whether a name ends at `node`; longer names may go on from there."""
        name = bisect_left(self.terminals, node)
        return name < self.num_names and bool(self.terminals[name] == node)

    def name_index(self, node: int) -> int:
        """Number of the name that ends at `node`.

        Raises:
            ValueError: No name ends there.
        """
        if not self.is_terminal(node):
            raise ValueError(f"no name ends at node {node}")
        return bisect_left(self.terminals, node)

    def name_tokens(self, name_index: int) -> list[int]:
        """Tokens of a name, found by climbing from the node that ends it."""
        node = int(self.terminals[name_index])
        tokens = []
        while node:
            tokens.append(int(self.tokens[node]))
            node = self.parent(node)
        return tokens[::-1]

    def sequences(self, names: IntArray) -> tuple[UnsignedArray, NDArray[np.int64]]:
        """Tokens of S names, found for all of them at once: what `build` takes.

        Args:
            names: Their numbers; (S,).

        Returns:
            The sequences one after another, and where each starts, then their end; (T,) and (S + 1,).
        """
        parents = np.repeat(np.arange(self.num_nodes, dtype=np.uint32), np.diff(self.first_child))  # of node 1 on
        nodes, rows = self.terminals[names], np.arange(len(names))
        lengths, climbed = np.zeros(len(names), np.int64), []
        while len(rows):
            climbed.append((rows, self.tokens[nodes]))
            lengths[rows] += 1
            nodes = parents[nodes - 1]
            rows, nodes = rows[nodes > 0], nodes[nodes > 0]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        token_ids = np.empty(offsets[-1], self.tokens.dtype)
        for height, (of_rows, tokens) in enumerate(climbed, 1):
            token_ids[offsets[of_rows + 1] - height] = tokens
        return token_ids, offsets

    def longest(self, node: int) -> int:
        """Tokens from `node` to the end of the longest name below it, the terminator not counted; 0 for a leaf."""
        return int(self.heights[node])

    def allowed_tokens(self, nodes: IntArray) -> tuple[UnsignedArray, NDArray[np.int64]]:
        """Tokens that may follow each of B nodes, without a loop over them.

        Returns:
            The rows' tokens one after another, ascending in each row, and where each row starts; (B + 1,).
        """
        starts = self.first_child[nodes].astype(np.int64)
        stops = self.first_child[np.asarray(nodes) + 1].astype(np.int64)
        # Slices, because some nodes have thousands of children: copying a range is much faster than gathering it, and
        # slices of a buffer cost half of those of an array.
        tokens = memoryview(self.tokens)  # type: ignore[arg-type]  # an array is a buffer from Python 3.12 on
        spans = b"".join([tokens[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)])
        row_offsets = np.concatenate([[0], np.cumsum(stops - starts)])
        return np.frombuffer(spans, self.tokens.dtype), row_offsets

    def save(self, directory: Path) -> None:
        """Write one ``.npy`` file for each array, then ``trie.json``; replaces what is there."""
        directory.mkdir(parents=True, exist_ok=True)
        files = {}
        for field in fields(self):
            array = getattr(self, field.name)
            path = directory / f"{field.name}.npy"
            np.save(path, array, allow_pickle=False)
            files[path.name] = _layout(array) | {"sha256": file_sha256(path)}
        write_manifest(directory / MANIFEST, FORMAT_VERSION, {"files": files})

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> Self:
        """Map a saved trie into memory, read-only; its files must not be written to while it is open.

        Args:
            directory: What `save` wrote.
            verify: Also read every byte: checksums, and that the arrays form a trie. Do this once for files from
                elsewhere; a damaged trie opened without it can give wrong names and false certificates, but every
                path in it ends and every node is there.

        Raises:
            ArtifactError: A file is missing, damaged, of another format version, or does not fit the others.
        """
        path = directory / MANIFEST
        files = read_manifest(path, FORMAT_VERSION, without_checksum=_WITHOUT_CHECKSUM).get("files")
        if not isinstance(files, dict):
            raise ArtifactError(f"{path} lists no files; build the knowledge base again")
        trie = cls(**{field.name: _map_array(directory / f"{field.name}.npy", files, verify) for field in fields(cls)})
        if not trie._has_consistent_shapes() or not trie._is_safe() or (verify and not trie._is_well_formed()):
            raise ArtifactError(f"the arrays in {directory} do not form a prefix trie; build the knowledge base again")
        return trie

    def _has_consistent_shapes(self) -> bool:
        num_nodes = len(self.tokens)
        return len(self.first_child) == num_nodes + 1 == len(self.heights) + 1 and 0 < len(self.terminals) < num_nodes

    def _is_safe(self) -> bool:
        """Whether each node's children come behind it, so that no path is endless, and no number leads out of an array.

        Reads the numbers of nodes in pieces that stay in the processor's cache: 20 ms for 6M names.
        """
        if self.first_child[0] != 1 or self.first_child[-1] != self.num_nodes:
            return False
        nodes = np.arange(_PIECE, dtype=np.uint32)
        for start in range(0, self.num_nodes, _PIECE):
            piece = self.first_child[start : start + _PIECE + 1]
            if (piece[1:] < piece[:-1]).any() or (piece[:-1] <= nodes[: len(piece) - 1]).any():
                return False
            nodes += _PIECE
        is_ascending = all(
            (piece[1:] > piece[:-1]).all()
            for start in range(0, self.num_names, _PIECE)
            for piece in [self.terminals[start : start + _PIECE + 1]]
        )
        return is_ascending and self.terminals[0] > 0 and bool(self.terminals[-1] < self.num_nodes)

    def _is_well_formed(self) -> bool:
        """Whether siblings, heights and terminals of a safe trie are right."""
        first_child = self.first_child.astype(np.int64)
        num_children = np.diff(first_child)
        inner = np.flatnonzero(num_children)
        parents = np.repeat(np.arange(self.num_nodes), num_children)
        heights = np.zeros(self.num_nodes, np.int64)
        heights[inner] = 1 + np.maximum.reduceat(self.heights, first_child[inner]).astype(np.int64)
        is_unordered = np.diff(self.tokens[1:].astype(np.int64)) <= 0
        return bool(
            (heights == self.heights).all()
            and not (is_unordered & (parents[1:] == parents[:-1])).any()
            and np.isin(np.flatnonzero(num_children == 0), self.terminals).all()
        )


@dataclass(frozen=True, slots=True, eq=False)
class SavedTrie:
    """A prefix trie and the directory that it is saved in, for processes that map it themselves."""

    trie: PrefixTrie
    directory: Path

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open what `PrefixTrie.save` wrote, as `PrefixTrie.open` does."""
        return cls(PrefixTrie.open(directory), directory)


def _smallest(values: IntArray, minimum: type[np.unsignedinteger[Any]]) -> UnsignedArray:
    """The values in the smallest unsigned type that holds them all and is no smaller than `minimum`."""
    dtype = np.promote_types(np.min_scalar_type(values.max()), minimum)
    return values.astype(dtype)


def _layout(array: UnsignedArray) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape)}


def _map_array(path: Path, files: Mapping[str, Any], verify: bool) -> UnsignedArray:
    try:
        open_regular(path).close()
        # Unlike np.load this reads no archives; a plain array, because indexing a memmap is slow.
        array = np.asarray(np.lib.format.open_memmap(path, mode="r"))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, OverflowError, SyntaxError, TokenError) as error:  # a header is a literal
        raise ArtifactError(f"{path} is missing or damaged ({error}); build the knowledge base again") from error
    entry = files.get(path.name)
    if not isinstance(entry, dict) or entry != _layout(array) | {"sha256": entry.get("sha256")} or array.ndim != 1:
        raise ArtifactError(f"{path} is not the array that trie.json describes; build the knowledge base again")
    if array.dtype not in _DTYPES[path.stem]:
        expected = " or ".join(map(str, _DTYPES[path.stem]))
        raise ArtifactError(f"{path} holds {array.dtype}, not {expected}; build the knowledge base again")
    if verify and file_sha256(path) != entry["sha256"]:
        raise ArtifactError(f"the checksum of {path} is not that of trie.json; build the knowledge base again")
    return array
