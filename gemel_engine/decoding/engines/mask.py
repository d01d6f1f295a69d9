"""What may come next, for all rows of a batch at once, on the device where the logits are: no loop over rows.

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

_LOWEST_LOG_PROB = -1e9  # of an allowed token, to tell it from a disallowed one


@dataclass(frozen=True, slots=True, eq=False)
class TrieTensors:
    """The arrays of a prefix trie that say what may follow a node; on CPU they are the mapped files themselves.

    Attributes:
        tokens: (N,), unsigned integers in signed ones of their width, for which torch has more functions.
        first_child: (N + 1,) int32.
        terminals: (M,) int32.
    """

    tokens: Tensor
    first_child: Tensor
    terminals: Tensor

    @classmethod
    def of(cls, trie: PrefixTrie, device: torch.device) -> Self:
        """A trie's arrays on a device.

        Raises:
            ValueError: The trie has 2**31 nodes or more.
        """
        if trie.num_nodes >= 2**31:
            raise ValueError(f"a trie of {trie.num_nodes} nodes is too large for 32-bit tensors: use fewer names")
        return cls(*(_tensor(array, device) for array in (trie.tokens, trie.first_child, trie.terminals)))

    def allowed(self, nodes: Tensor, terminator: int) -> tuple[Tensor, Tensor]:
        """Tokens that may follow each of B nodes.

        Args:
            nodes: (B,) int64.
            terminator: Allowed where a name ends.

        Returns:
            The row and the token of each allowed token, both (A,) int64; terminators stand behind all others.
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
    """Log-probs under the full softmax, disallowed tokens at minus infinity.

    Args:
        logits: (B, V); float32 is overwritten.
        rows: (A,) row of each allowed token; rows that don't occur stay as they are.
        tokens: (A,) allowed tokens.
        excluded: Rows and tokens that are not allowed after all.

    Returns:
        (B, V), float32.
    """
    logits = logits.float()
    log_probs = logits.log_softmax(dim=-1)[rows, tokens]  # on a CPU many times faster than with logsumexp
    is_constrained = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
    is_constrained[rows] = True
    logits.masked_fill_(is_constrained, -math.inf)
    logits[rows, tokens] = log_probs.clamp_(min=_LOWEST_LOG_PROB)
    if excluded:
        pairs = torch.tensor(excluded).to(logits.device)
        logits[pairs[:, 0], pairs[:, 1]] = -math.inf
    return logits


def _tensor(array: UnsignedArray, device: torch.device) -> Tensor:
    signed = array.view(np.dtype(f"i{array.itemsize}"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nobody writes to it
        return torch.from_numpy(signed).to(device)
