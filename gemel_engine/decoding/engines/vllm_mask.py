"""The prefix trie as a logits processor, for each of vLLM's two model runners.

Both processors turn a row of logits into log-probs under the full softmax, with disallowed tokens
at minus infinity, by the same functions. They differ in how vLLM reports the requests of a batch
and the tokens generated so far. The trie and the terminator come from the engine's
`additional_config`; a request's path, excluded tokens and trie of candidates from its `extra_args`,
which reach another process pickled. So both work in any worker process.

B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstInterface
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondInterface

from gemel_engine.decoding.engines.base import allowed_next_tokens
from gemel_engine.decoding.engines.mask import TrieTensors, constrain, exclude
from gemel_engine.knowledge_base.trie import PrefixTrie


@dataclass(slots=True)
class TrieCursor:
    """Position of one request in its trie; `advance` follows new tokens in `output_tokens`."""

    trie: PrefixTrie
    node: int
    excluded: Sequence[int]
    output_tokens: list[int]
    num_seen: int = field(default=0)

    def advance(self) -> int:
        """Move to the node after all output tokens so far, and return it."""
        for token in self.output_tokens[self.num_seen :]:
            child = self.trie.child(self.node, token)
            if child is None:
                break  # the terminator: the request is about to leave the batch
            self.node, self.excluded = child, ()
            self.num_seen += 1
        return self.node


class TrieConstraint:
    """Constrains logits to the names of an engine's tries, on the device of the logits."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        additional: Any = vllm_config.additional_config
        self._trie = PrefixTrie.open(Path(additional["prefix_trie"]))
        self._tensors = {self._trie: TrieTensors.of(self._trie, device)}
        self._common_candidates: PrefixTrie | None = None
        if "common_candidates" in additional:
            self._common_candidates = trie = PrefixTrie.open(Path(additional["common_candidates"]))
            self._tensors[trie] = TrieTensors.of(trie, device)
        self._terminator: int = additional["terminator"]
        self._uses_kernel = device.type == "cuda" and find_spec("triton") is not None

    def cursor(self, parameters: SamplingParams, output_tokens: list[int]) -> TrieCursor | None:
        """Return the cursor at a rollout's start; None for other requests (vLLM's warm-up)."""
        arguments = parameters.extra_args or {}
        if "path" not in arguments:
            return None
        trie = self._trie
        if arguments["candidates"] is not None:
            trie = arguments["candidates"]
        elif arguments.get("has_common_candidates"):
            assert self._common_candidates is not None, "the engine was started with them"
            trie = self._common_candidates
        return TrieCursor(trie, trie.walk(arguments["path"]), arguments["excluded"], output_tokens)

    def apply(self, logits: Tensor, cursors: Mapping[int, TrieCursor]) -> Tensor:
        """Constrain the rows of logits (B, V) that have a cursor."""
        if not cursors:
            return logits
        own_tokens: dict[int, list[int]] = {}  # by row, of a mention's own candidates
        nodes: dict[PrefixTrie, dict[int, int]] = {trie: {} for trie in self._tensors}  # by row
        for row, cursor in cursors.items():
            node = cursor.advance()
            if cursor.trie in nodes:
                nodes[cursor.trie][row] = node
            else:
                own_tokens[row] = allowed_next_tokens(cursor.trie, node, self._terminator, frozenset()).tolist()
        excluded = [(row, token) for row, cursor in cursors.items() for token in cursor.excluded]
        of_tries = [
            (_tensor([*node_of_row], logits), _tensor([*node_of_row.values()], logits), self._tensors[trie])
            for trie, node_of_row in nodes.items()
            if node_of_row
        ]
        if self._uses_kernel and not own_tokens:
            return self._by_kernel(logits, of_tries, excluded)
        rows = [_tensor([row for row, tokens in own_tokens.items() for _ in tokens], logits)]
        tokens = [_tensor([token for tokens in own_tokens.values() for token in tokens], logits)]
        for rows_of_trie, nodes_of_trie, tensors in of_tries:
            places, allowed = tensors.allowed(nodes_of_trie, self._terminator)
            rows.append(rows_of_trie[places])
            tokens.append(allowed)
        return constrain(logits, torch.cat(rows), torch.cat(tokens), excluded)

    def _by_kernel(
        self, logits: Tensor, of_tries: list[tuple[Tensor, Tensor, TrieTensors]], excluded: list[tuple[int, int]]
    ) -> Tensor:
        """Constrain the rows of each trie, given with their nodes."""
        from gemel_engine.decoding.engines.mask_kernel import constrain_rows  # Triton is for GPUs alone

        logits = logits.float()
        is_whole = sum(len(rows) for rows, _, _ in of_tries) == len(logits)
        log_probs = torch.empty_like(logits) if is_whole else logits.clone()
        for rows, nodes, tensors in of_tries:
            constrain_rows(logits, log_probs, rows, nodes, tensors, self._terminator)
        return exclude(log_probs, excluded)


class TrieLogitsProcessor(FirstInterface):
    """Logits processor for Model Runner V1.

    It is told which rows leave, join or move, and shares each request's list of output tokens.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._constraint = TrieConstraint(vllm_config, device)
        self._cursors: dict[int, TrieCursor] = {}  # by row

    def is_argmax_invariant(self) -> bool:
        """False: constraining changes the best token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that left, joined or moved within the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._cursors.pop(row, None)
        for row, parameters, _, output_tokens in batch_update.added:
            _put(self._cursors, row, self._constraint.cursor(parameters, output_tokens))
        for first, second, direction in batch_update.moved:
            moved, replaced = self._cursors.pop(first, None), self._cursors.pop(second, None)
            _put(self._cursors, second, moved)
            if direction == MoveDirectionality.SWAP:
                _put(self._cursors, first, replaced)

    def apply(self, logits: Tensor) -> Tensor:
        """Constrain the batch's logits (B, V)."""
        return self._constraint.apply(logits, self._cursors)


class TrieLogitsProcessorV2(SecondInterface):
    """Logits processor for Model Runner V2.

    A request keeps one slot for its lifetime, and its tokens stay on the device. Slots are reused
    without notice: a cursor whose slot is not in the batch is of a waiting or finished request.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._constraint = TrieConstraint(vllm_config, req_states.device)
        self._states = req_states
        self._cursors: dict[int, TrieCursor] = {}  # by slot

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Start a request in a slot; a preempted request starts again from its prompt."""
        _put(self._cursors, req_idx, self._constraint.cursor(sampling_params, []))
        return req_idx in self._cursors

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Constrain the batch's logits (B, V): a row for each request, as nothing is speculated."""
        rows = [row for row, slot in enumerate(ctx.idx_mapping_np.tolist()) if slot in self._cursors]
        slots = ctx.idx_mapping_np[rows]
        cursors = [self._cursors[slot] for slot in slots.tolist()]
        self._read_tokens(cursors, slots, ctx.seq_lens_upper_bound_np[rows])
        return self._constraint.apply(logits, dict(zip(rows, cursors, strict=True)))

    def _read_tokens(self, cursors: Sequence[TrieCursor], slots: np.ndarray, lengths: np.ndarray) -> None:
        """Append newly generated tokens to each cursor, with one copy from the device for all."""
        starts = self._states.prompt_len.np[slots] + [len(cursor.output_tokens) for cursor in cursors]
        counts = np.maximum(lengths - starts, 0)  # negative during a chunked prefill
        if not counts.any():
            return
        all_tokens = self._states.all_token_ids.gpu
        places = (starts[:, None] + np.arange(counts.max())).clip(max=all_tokens.shape[1] - 1)
        device = all_tokens.device
        tokens = all_tokens[torch.from_numpy(slots[:, None]).long().to(device), torch.from_numpy(places).to(device)]
        for cursor, new, count in zip(cursors, tokens.tolist(), counts.tolist(), strict=True):
            cursor.output_tokens.extend(new[:count])


def _tensor(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long).to(like.device)


def _put(cursors: dict[int, TrieCursor], key: int, cursor: TrieCursor | None) -> None:
    """Set an entry, or remove it."""
    cursors.pop(key, None)
    if cursor is not None:
        cursors[key] = cursor
