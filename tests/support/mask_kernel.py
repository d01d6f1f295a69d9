"""The mask's kernel against torch on random tries, in Triton's interpreter or on a GPU.

`test_mask.py` runs it in a process of its own, since the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig

from gemel_engine.decoding.engines import mask_kernel
from gemel_engine.decoding.engines.mask import TrieTensors, constrain
from gemel_engine.decoding.engines.vllm_mask import TrieConstraint
from gemel_engine.knowledge_base.trie import PrefixTrie

NUM_TRIES = 10
NAMES = [[1], [1, 2], [1, 2, 3], [2, 9], [8, 1]]
COMMON = [[8, 2], [8, 3, 1], [20]]


def main(device: str) -> None:
    """Compare on tries with few and many children, tokens of 16 and 32 bits, and rows in any order."""
    generator = np.random.default_rng(0)
    for number in range(NUM_TRIES):
        if device == "cpu":
            mask_kernel._BLOCK = 16  # several blocks of a small vocabulary
        largest = (70_000, 60_000, *generator.integers(3, 60, 3))[number % 5]
        tokens = generator.choice(largest, min(largest, 40), replace=False)
        names = [generator.choice(tokens, generator.integers(1, 5)).tolist() for _ in range(generator.integers(1, 80))]
        compare(PrefixTrie.from_sequences(names)[0], int(largest) + 1, generator, torch.device(device))
    with tempfile.TemporaryDirectory() as directory:
        compare_processors(Path(directory), torch.device(device))


def compare(trie: PrefixTrie, vocabulary: int, generator: np.random.Generator, device: torch.device) -> None:
    """Constrain some rows of a batch both ways; the last token ends a name."""
    if vocabulary > 1000:
        mask_kernel._BLOCK = 4096
    size = int(generator.integers(1, 6))
    padded = generator.normal(0, 5, (size, vocabulary + 3)).astype(np.float32)
    padded[generator.random(padded.shape) < 0.05] = -np.inf
    logits = torch.from_numpy(padded).to(device)[:, :vocabulary]  # as a padded vocabulary is cut
    rows = torch.from_numpy(generator.permutation(size)[: generator.integers(1, size + 1)]).to(device)
    nodes = torch.from_numpy(generator.integers(0, trie.num_nodes, len(rows))).to(device)
    tensors = TrieTensors.of(trie, device)
    output = logits.clone()
    mask_kernel.constrain_rows(logits, output, rows, nodes, tensors, vocabulary - 1)
    places, tokens = tensors.allowed(nodes, vocabulary - 1)
    expected = constrain(logits.clone(), rows[places], tokens)
    assert torch.equal(output.isneginf(), expected.isneginf()), "other tokens are allowed"
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def compare_processors(directory: Path, device: torch.device) -> None:
    """Constrain a batch of two tries, in which one row has excluded tokens and one is of another request."""
    PrefixTrie.from_sequences(NAMES)[0].save(directory / "trie")
    PrefixTrie.from_sequences(COMMON)[0].save(directory / "common")
    directories = {"prefix_trie": str(directory / "trie"), "common_candidates": str(directory / "common")}
    constraint = TrieConstraint(VllmConfig(additional_config={**directories, "terminator": 30}), device)
    requests: dict[int, dict[str, Any]] = {
        0: {"path": [], "excluded": [2], "candidates": None},
        1: {"path": [8], "excluded": [], "candidates": None, "has_common_candidates": True},
        3: {"path": [1, 2], "excluded": [30], "candidates": None},
    }
    cursors = {row: constraint.cursor(SamplingParams(extra_args=given), []) for row, given in requests.items()}
    logits = torch.randn(4, 31, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for uses_kernel in (True, False):
        constraint._uses_kernel = uses_kernel
        found.append(constraint.apply(logits.clone(), {row: cursor for row, cursor in cursors.items() if cursor}))
    torch.testing.assert_close(*found)
    assert torch.equal(found[0][2], logits[2]), "a row of another request has changed"


if __name__ == "__main__":
    main(sys.argv[1])
