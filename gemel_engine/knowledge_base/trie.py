"""Prefix trie of the token sequences that may be generated, in flat memory-mapped arrays.

Shapes: N nodes, M distinct names, S sequences, T tokens, B nodes in a batch.

Nodes are numbered breadth-first, siblings in ascending order of their tokens. The root is node 0,
the children of node n are the nodes ``first_child[n]`` to ``first_child[n + 1] - 1``, and names are
numbered in the order of their last nodes. The trie contains neither a tokenizer nor the terminator,
which is an additional allowed token at each node where a name ends (`is_terminal`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.knowledge_base.arrays import IntArray, UnsignedArray, layout, open_array, smallest
from gemel_engine.storage.manifest import file_sha256, read_manifest, write_manifest

FORMAT_VERSION = 2
MANIFEST = "trie.json"
_WITHOUT_CHECKSUM = 1
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTrie:
    """A set of token sequences; at most 2**32 - 1 nodes.

    Attributes:
        tokens: Token on the edge to each node, 0 for the root; (N,), uint16 if every token fits,
            else uint32.
        first_child: First child of each node, then N; (N + 1,) uint32, non-decreasing.
        heights: Number of tokens from each node to the end of the longest name below it; (N,), the
            smallest sufficient unsigned type.
        terminals: Nodes where a name ends, ascending; (M,) uint32.
    """

    tokens: UnsignedArray
    first_child: UnsignedArray
    heights: UnsignedArray
    terminals: UnsignedArray

    @classmethod
    def build(cls, token_ids: IntArray, offsets: IntArray) -> tuple[Self, NDArray[np.intp]]:
        """Build the trie of S sequences, one level at a time; duplicates are allowed.

        Args:
            token_ids: Concatenated sequences; (T,), each token in [0, 2**32).
            offsets: Start of each sequence in `token_ids`, then T; (S + 1,).

        Returns:
            The trie, and the number of the name of each sequence; (S,). Equal sequences have equal
            numbers.

        Raises:
            ValueError: There is no sequence, one is empty, the offsets do not span `token_ids`, or
                a token is out of range.
        """
        lengths = np.diff(offsets.astype(np.int64))
        if not len(lengths) or lengths.min() < 1 or offsets[0] != 0 or offsets[-1] != len(token_ids):
            raise ValueError("a prefix trie needs at least one sequence, none empty, and offsets from 0 to the end")
        if token_ids.min() < 0 or token_ids.max() >= 2**32:
            raise ValueError(f"tokens {token_ids.min()} to {token_ids.max()} are not all in [0, 2**32)")
        ends = np.zeros(len(lengths), np.uint64)  # last node of each sequence so far
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
        """Build the trie as `build` does, but faster for few short sequences (candidates)."""
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
        """Build a trie from its nodes; return it and the number of the name of each sequence.

        Args:
            parents: Parent of nodes 1 to N - 1.
            tokens: Token of nodes 1 to N - 1.
            heights: Height of each node.
            ends: Last node of each sequence; (S,).
        """
        terminals, name_of_sequence = np.unique(ends, return_inverse=True)
        num_children = np.bincount(parents.astype(np.intp), minlength=len(heights))
        trie = cls(
            tokens=smallest(np.concatenate([np.zeros(1, tokens.dtype), tokens]), np.uint16),
            first_child=np.concatenate([[1], 1 + np.cumsum(num_children)]).astype(np.uint32),
            heights=smallest(heights, np.uint8),
            terminals=terminals.astype(np.uint32),
        )
        return trie, name_of_sequence

    @property
    def num_nodes(self) -> int:
        """Number of nodes including the root, N."""
        return len(self.tokens)

    @property
    def num_names(self) -> int:
        """Number of distinct names, M."""
        return len(self.terminals)

    def num_children(self, node: int) -> int:
        """Return the number of tokens that may follow `node`, without the terminator."""
        return int(self.first_child[node + 1]) - int(self.first_child[node])

    def children(self, node: int) -> tuple[UnsignedArray, int]:
        """Return the tokens that may follow `node`, ascending, and its first child.

        The i-th token leads to the i-th child. The tokens of a mapped trie are a read-only view.
        """
        start, stop = int(self.first_child[node]), int(self.first_child[node + 1])
        return self.tokens[start:stop], start

    def child(self, node: int, token: int) -> int | None:
        """Return the child of `node` by `token`; None if the token is not allowed."""
        start, stop = int(self.first_child[node]), int(self.first_child[node + 1])
        child = bisect_left(self.tokens, token, start, stop)
        return child if child < stop and self.tokens[child] == token else None

    def walk(self, tokens: Sequence[int]) -> int:
        """Return the node at the end of a path from the root.

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
        """Return the parent of `node`; undefined for the root."""
        return bisect_right(self.first_child, node) - 1

    def is_terminal(self, node: int) -> bool:
        """Return whether a name ends at `node`; longer names may continue from it."""
        name = bisect_left(self.terminals, node)
        return name < self.num_names and bool(self.terminals[name] == node)

    def name_index(self, node: int) -> int:
        """Return the number of the name that ends at `node`.

        Raises:
            ValueError: No name ends there.
        """
        if not self.is_terminal(node):
            raise ValueError(f"no name ends at node {node}")
        return bisect_left(self.terminals, node)

    def name_tokens(self, name_index: int) -> list[int]:
        """Return the tokens of a name, read from its last node up to the root."""
        node = int(self.terminals[name_index])
        tokens = []
        while node:
            tokens.append(int(self.tokens[node]))
            node = self.parent(node)
        return tokens[::-1]

    def sequences(self, names: IntArray) -> tuple[UnsignedArray, NDArray[np.int64]]:
        """Return the tokens of S names at once, as the arguments of `build`.

        Args:
            names: Numbers of the names; (S,).

        Returns:
            The concatenated sequences, and the start of each, then T; (T,) and (S + 1,).
        """
        parents = np.repeat(np.arange(self.num_nodes, dtype=np.uint32), np.diff(self.first_child))  # from node 1
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
        """Return the number of tokens from `node` to the end of the longest name below it.

        The terminator does not count; 0 for a leaf.
        """
        return int(self.heights[node])

    def allowed_tokens(self, nodes: IntArray) -> tuple[UnsignedArray, NDArray[np.int64]]:
        """Return the tokens that may follow each of B nodes, faster than by calling `children`.

        Returns:
            The concatenated tokens of the nodes, ascending for each node, and the start of each
            node's tokens, then their number; (B + 1,).
        """
        starts = self.first_child[nodes].astype(np.int64)
        stops = self.first_child[np.asarray(nodes) + 1].astype(np.int64)
        # Slices, because some nodes have thousands of children: copying a range is much faster than
        # gathering it, and slicing a buffer takes half the time of slicing an array.
        tokens = memoryview(self.tokens)  # type: ignore[arg-type]  # an array is a buffer from Python 3.12 on
        spans = b"".join([tokens[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)])
        row_offsets = np.concatenate([[0], np.cumsum(stops - starts)])
        return np.frombuffer(spans, self.tokens.dtype), row_offsets

    def save(self, directory: Path) -> None:
        """Write or replace a ``.npy`` file for each array, then ``trie.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        files = {}
        for field in fields(self):
            array = getattr(self, field.name)
            path = directory / f"{field.name}.npy"
            np.save(path, array, allow_pickle=False)
            files[path.name] = layout(array) | {"sha256": file_sha256(path)}
        write_manifest(directory / MANIFEST, FORMAT_VERSION, {"files": files})

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> Self:
        """Open a saved trie, memory-mapped; its files must not be written to while it is open.

        Args:
            directory: Directory that `save` wrote.
            verify: Whether to check every byte: checksums, and that the arrays form a trie. Do this
                once for files from elsewhere: without it, a damaged trie can give wrong names and
                false certificates, but all of its paths end and all of its nodes exist.

        Raises:
            ArtifactError: A file is missing, damaged, of another format version, or does not fit
                the others.
        """
        path = directory / MANIFEST
        files = read_manifest(path, FORMAT_VERSION, without_checksum=_WITHOUT_CHECKSUM).get("files")
        if not isinstance(files, dict):
            raise ArtifactError(f"{path} lists no files; build the knowledge base again")
        trie = cls(**{field.name: open_array(directory / f"{field.name}.npy", files, verify) for field in fields(cls)})
        if not trie._has_consistent_shapes() or not trie._is_safe() or (verify and not trie._is_well_formed()):
            raise ArtifactError(f"the arrays in {directory} do not form a prefix trie; build the knowledge base again")
        return trie

    def _has_consistent_shapes(self) -> bool:
        num_nodes = len(self.tokens)
        return len(self.first_child) == num_nodes + 1 == len(self.heights) + 1 and 0 < len(self.terminals) < num_nodes

    def _is_safe(self) -> bool:
        """Return whether all paths end and all node numbers are in range.

        Children must have larger numbers than their parent. The arrays are read in pieces that fit
        into the processor's cache: 20 ms for 6M names.
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
        """Return whether siblings, heights and terminals of a safe trie are correct."""
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
    """A prefix trie and the directory of its files, for processes that map it themselves."""

    trie: PrefixTrie
    directory: Path

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open a trie that `PrefixTrie.save` wrote, see `PrefixTrie.open`."""
        return cls(PrefixTrie.open(directory), directory)
