"""Both of vLLM's interfaces for logits processors, driven as its two model runners drive them: the same log-probs."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcRequestState,
    build_custom_logits_processors_params_validator,
)

from gemel_engine.decoding.engines.base import allowed_next_tokens
from gemel_engine.decoding.engines.vllm_mask import TrieLogitsProcessor, TrieLogitsProcessorV2
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.gpu
VOCABULARY, TERMINATOR, SLOTS, LONGEST = 40, 39, 8, 32
NAMES = [[1], [1, 2], [1, 2, 3], [1, 4, 5, 6], [1, 4, 5, 7], [2, 2], [2, 9, 9, 9], [8, 1], [8, 2], [30, 31, 32, 33]]
COMMON = [[8, 2], [8, 3, 1], [20], [21, 2]]


@dataclass
class Request:
    """A rollout, or with no path another request, as a scheduler knows it."""

    name: str
    slot: int
    path: list[int] | None = field(default_factory=list)
    excluded: list[int] = field(default_factory=list)
    candidates: PrefixTrie | None = None
    has_common_candidates: bool = False
    prompt: list[int] = field(default_factory=lambda: [11, 12, 13])
    output: list[int] = field(default_factory=list)

    @property
    def parameters(self) -> SamplingParams:
        if self.path is None:
            return SamplingParams()
        names = ("path", "excluded", "candidates", "has_common_candidates")
        return SamplingParams(extra_args={name: getattr(self, name) for name in names})


class TwoRunners:
    """The parts of both model runners that deal with a logits processor."""

    def __init__(self, trie: PrefixTrie, directory: Path, device: str) -> None:
        trie.save(directory / "trie")
        PrefixTrie.from_sequences(COMMON)[0].save(directory / "common")
        directories = {"prefix_trie": str(directory / "trie"), "common_candidates": str(directory / "common")}
        config = VllmConfig(additional_config={**directories, "terminator": TERMINATOR})
        self.device = torch.device(device)
        self.tokens = torch.zeros(SLOTS, LONGEST, dtype=torch.int32, device=device)
        self.prompt_len = np.zeros(SLOTS, dtype=np.int32)
        buffers: dict[str, Any] = {  # vLLM's own need a GPU's pinned memory
            "all_token_ids": SimpleNamespace(gpu=self.tokens),
            "prompt_len": SimpleNamespace(np=self.prompt_len),
            "prefill_len": None,
            "total_len": None,
        }
        states = LogitsProcRequestState(device=self.device, max_num_reqs=SLOTS, vocab_size=VOCABULARY, **buffers)
        self.first = TrieLogitsProcessor(config, self.device, False)
        self.second = TrieLogitsProcessorV2(config, states)

    def add_to_second(self, request: Request) -> bool:
        sequence = [*request.prompt, *request.output]
        self.tokens[request.slot] = -1
        self.tokens[request.slot, : len(sequence)] = torch.tensor(sequence, dtype=torch.int32)
        self.prompt_len[request.slot] = len(request.prompt)
        parameters = pickle.loads(pickle.dumps(request.parameters))  # as to the workers of several GPUs
        return self.second.add_request(request.slot, parameters)

    def update_first(self, size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        rows = [(row, request.parameters, request.prompt, request.output) for row, request in added]
        self.first.update_state(BatchUpdate(size, removed, rows, moved))

    def step(self, rows: list[Request], batch: list[Request], seed: int) -> dict[str, torch.Tensor]:
        """Constrain random logits through both, whose batches have different orders; then generate the best tokens."""
        generator = torch.Generator().manual_seed(seed)
        logits = {request.name: torch.randn(VOCABULARY, generator=generator).to(self.device) for request in rows}
        first = self.first.apply(torch.stack([logits[request.name] for request in rows]))
        slots = np.array([request.slot for request in batch], dtype=np.int32)
        lengths = np.array([len(request.prompt) + len(request.output) for request in batch], dtype=np.int32)
        second = self.second.apply(torch.stack([logits[request.name] for request in batch]), context(slots, lengths))
        found = {request.name: row for request, row in zip(rows, first, strict=True)}
        for request, row in zip(batch, second, strict=True):
            assert torch.equal(row, found[request.name]), request.name
            if request.path is None:
                assert torch.equal(row, logits[request.name])
            request.output.append(int(row.argmax()))
            length = len(request.prompt) + len(request.output)
            self.tokens[request.slot, length - 1] = request.output[-1]
        return found


def context(slots: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> LogitsContext:
    mapping = torch.from_numpy(slots)
    return LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=slots,
        expanded_local_pos=torch.zeros_like(mapping),
        input_ids=torch.zeros_like(mapping),
        pos=torch.from_numpy(lengths) - 1,
        seq_lens_upper_bound_np=lengths,
    )


@pytest.fixture
def trie() -> PrefixTrie:
    return PrefixTrie.from_sequences(NAMES)[0]


def assert_allowed(row: torch.Tensor, trie: PrefixTrie, path: list[int], excluded: list[int] | None = None) -> None:
    allowed = allowed_next_tokens(trie, trie.walk(path), TERMINATOR, frozenset(excluded or []))
    assert (row > -math.inf).nonzero()[:, 0].tolist() == sorted(allowed.tolist())


def test_both_interfaces_give_the_same_log_probs(device: str, trie: PrefixTrie, tmp_path: Path) -> None:
    runners = TwoRunners(trie, tmp_path, device)
    few = PrefixTrie.from_sequences([[2, 2], [8, 1], [8, 2]])[0]
    a, b, c, d, f = (
        Request("a", slot=5),
        Request("b", slot=2, path=[1], excluded=[4, TERMINATOR]),
        Request("c", slot=0, candidates=few),
        Request("d", slot=3, path=None),
        Request("f", slot=7, path=[8], has_common_candidates=True),
    )
    assert [runners.add_to_second(request) for request in (a, b, c, d, f)] == [True, True, True, False, True]
    runners.update_first(5, added=list(enumerate([a, b, c, d, f])))
    found = runners.step([a, b, c, d, f], [c, f, a, d, b], seed=0)
    assert_allowed(found["a"], trie, [])
    assert_allowed(found["b"], trie, [1], b.excluded)
    assert_allowed(found["c"], few, [])
    assert_allowed(found["f"], PrefixTrie.from_sequences(COMMON)[0], [8])
    assert 0 < found["a"].exp().sum() < 1, "log-probs under the full softmax"

    runners.update_first(4, removed=[4])
    found = runners.step([a, b, c, d], [b, d, a, c], seed=1)  # a node deeper, where nothing is excluded
    assert_allowed(found["b"], trie, [1, b.output[0]])

    # d leaves and e takes its slot; b and c change places; a waits in Model Runner V2 alone, and joins again.
    e = Request("e", slot=3, path=[8], prompt=[14])
    runners.update_first(4, removed=[3], added=[(3, e)], moved=[(1, 2, MoveDirectionality.SWAP)])
    runners.add_to_second(e)
    runners.add_to_second(a)
    found = runners.step([a, c, b, e], [e, c, b, a], seed=2)
    assert_allowed(found["a"], trie, a.output[:2])
    assert_allowed(found["e"], trie, [8])

    # The last row moves to the place of the first, which has left.
    runners.update_first(3, removed=[0], moved=[(3, 0, MoveDirectionality.UNIDIRECTIONAL)])
    found = runners.step([e, c, b], [c, e, b], seed=3)
    assert_allowed(found["e"], trie, [8, e.output[0]])


def test_a_prompt_that_is_read_in_pieces_stays_at_its_beginning(device: str, trie: PrefixTrie, tmp_path: Path) -> None:
    runners = TwoRunners(trie, tmp_path, device)
    request = Request("a", slot=1, path=[1])
    runners.add_to_second(request)
    for length in (1, 2, 3):
        slots, lengths = np.array([1], dtype=np.int32), np.array([length], dtype=np.int32)
        row = runners.second.apply(torch.zeros(1, VOCABULARY, device=device), context(slots, lengths))[0]
        assert_allowed(row, trie, [1])


def test_vllm_takes_the_second_as_one_of_its_own() -> None:
    build_custom_logits_processors_params_validator([TrieLogitsProcessorV2])(SamplingParams())
    with pytest.raises(ValueError, match="not a subclass"):
        build_custom_logits_processors_params_validator([TrieLogitsProcessor])
