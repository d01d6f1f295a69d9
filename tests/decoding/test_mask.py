"""The batched mask against the trie's own answers, node by node."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemel_engine.decoding.engines.base import allowed_next_tokens
from gemel_engine.decoding.engines.mask import TrieTensors, constrain
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.gpu
TERMINATOR = 70_001
NAMES = st.lists(
    st.lists(st.sampled_from([0, 1, 40_000, 65_535, 70_000]), min_size=1, max_size=5),
    min_size=1,
    max_size=30,
)


@given(NAMES, st.data())
def test_allowed_tokens_are_those_of_each_node(device: str, names: list[list[int]], data: st.DataObject) -> None:
    trie, _ = PrefixTrie.from_sequences(names)
    nodes = data.draw(st.lists(st.integers(0, trie.num_nodes - 1), max_size=10))
    tensors = TrieTensors.of(trie, torch.device(device))
    rows, tokens = tensors.allowed(torch.tensor(nodes, dtype=torch.long, device=device), TERMINATOR)
    assert len(rows) == len(tokens)
    for row, node in enumerate(nodes):
        expected = allowed_next_tokens(trie, node, TERMINATOR, frozenset())
        assert sorted(tokens[rows == row].tolist()) == sorted(expected.tolist())


def test_constrained_logits_are_log_probs_of_allowed_tokens(device: str) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)).to(device)
    expected = logits.log_softmax(dim=-1)
    untouched = logits[1].clone()
    rows, tokens = torch.tensor([[0, 2, 0], [5, 1, 2]], device=device)
    found = constrain(logits.clone(), rows, tokens, [(0, 2)])
    assert torch.equal(found[1], untouched)
    assert torch.allclose(found[0, 5], expected[0, 5])
    assert torch.allclose(found[2, 1], expected[2, 1])
    assert (found[0] == -math.inf).sum() == (found[2] == -math.inf).sum() == 5


def test_an_allowed_token_of_no_probability_is_not_taken_for_a_forbidden_one() -> None:
    logits = torch.tensor([[0.0, -math.inf]])
    assert constrain(logits, torch.tensor([0]), torch.tensor([1]))[0, 1] > -math.inf


def test_the_kernel_gives_what_torch_gives(device: str) -> None:
    """On a CPU in Triton's interpreter, which is chosen when Triton is imported, so in a process of its own."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, Path(support.__path__[0]) / "mask_kernel.py", device],
        env=os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("triton.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

    from gemel_engine.decoding.engines import mask_kernel

    pointers = {"logits": "*fp32", "output": "*fp32", "rows": "*i64", "nodes": "*i64", "tokens": "*i16"}
    pointers |= {"first_child": "*i32", "terminals": "*i32", "lowest": "fp32"}
    constants = {"TOKEN_BITS": 16, "BLOCK": 4096}
    kernel = mask_kernel._constrain_row
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, constants)
    assert compiler.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
