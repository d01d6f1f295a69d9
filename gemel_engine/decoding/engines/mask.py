"""Masks logits by a prefix trie, for all rows of a batch at once, on the device of the logits.

On a GPU, `mask_kernel.py` takes its place for rows that follow a trie.

B rows of a batch, V vocabulary, A allowed tokens of all rows, N nodes, M names.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gemel_engine.knowledge_base.arrays import UnsignedArray
from gemel_engine.knowledge_base.trie import PrefixTrie

LOWEST_LOG_PROB = -1e9  # lower bound of an allowed token's log-prob; disallowed ones have -inf


@dataclass(frozen=True, slots=True, eq=False)
class TrieTensors:
    """Arrays of a prefix trie that determine the tokens allowed after a node.

    On CPU they share the memory of the mapped files.

    Attributes:
        tokens: Token of each node (N,): unsigned integers viewed as signed integers of the same
            width, for which torch has more functions.
        first_child: First child of each node (N + 1,), int32.
        terminals: Nodes at which names end (M,), int32, ascending.
    """

    tokens: Tensor
    first_child: Tensor
    terminals: Tensor

    @classmethod
    def of(cls, trie: PrefixTrie, device: torch.device) -> Self:
        """Return a trie's arrays on a device.

        Raises:
            ValueError: The trie has 2**31 nodes or more.
        """
        if trie.num_nodes >= 2**31:
            raise ValueError(f"a trie of {trie.num_nodes} nodes is too large for 32-bit tensors: use fewer names")
        return cls(*(_tensor(array, device) for array in (trie.tokens, trie.first_child, trie.terminals)))

    def allowed(self, nodes: Tensor, terminator: int) -> tuple[Tensor, Tensor]:
        """Return the tokens allowed after each of B nodes.

        Args:
            nodes: Nodes (B,), int64.
            terminator: Token allowed where a name ends.

        Returns:
            The row and the id of each allowed token, both (A,) int64; terminators come last.
        """
        starts = self.first_child[nodes].long()
        counts = self.first_child[nodes + 1].long() - starts
        rows = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        first_position = counts.cumsum(0) - counts
        children = torch.arange(len(rows), device=nodes.device) + (starts - first_position)[rows]
        tokens = self.tokens[children].long() & (2 ** (8 * self.tokens.element_size()) - 1)
        place = torch.searchsorted(self.terminals, nodes.int()).clamp_(max=len(self.terminals) - 1)
        ended = (self.terminals[place] == nodes).nonzero()[:, 0]
        return torch.cat([rows, ended]), torch.cat([tokens, torch.full_like(ended, terminator)])


def constrain(logits: Tensor, rows: Tensor, tokens: Tensor, excluded: Sequence[tuple[int, int]] = ()) -> Tensor:
    """Return log-probs under the full softmax, with disallowed tokens at minus infinity.

    Args:
        logits: Logits (B, V); overwritten if they are float32.
        rows: Row (A,) of each allowed token; rows that don't occur here keep their logits.
        tokens: Allowed tokens (A,).
        excluded: Pairs of row and token that are disallowed although they are in `tokens`.

    Returns:
        Log-probs (B, V), float32.
    """
    logits = logits.float()
    log_probs = logits.log_softmax(dim=-1)[rows, tokens]  # on CPU many times faster than logsumexp
    is_constrained = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
    is_constrained[rows] = True
    logits.masked_fill_(is_constrained, -math.inf)
    logits[rows, tokens] = log_probs.clamp_(min=LOWEST_LOG_PROB)
    return exclude(logits, excluded)


def exclude(log_probs: Tensor, excluded: Sequence[tuple[int, int]]) -> Tensor:
    """Set pairs of row and token of log-probs (B, V) to minus infinity, in place; return the log-probs."""
    if excluded:
        pairs = torch.tensor(excluded).to(log_probs.device)
        log_probs[pairs[:, 0], pairs[:, 1]] = -math.inf
    return log_probs


def _tensor(array: UnsignedArray, device: torch.device) -> Tensor:
    signed = array.view(np.dtype(f"i{array.itemsize}"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # only read
        return torch.from_numpy(signed).to(device)
