"""Rollouts by vLLM: prompts with visual prefixes, continuous batching, prefix cache; the only file that imports vLLM.

The prefix trie acts as a logits processor. It turns a row of logits into log-probs under the full softmax with all
disallowed tokens at minus infinity; vLLM, asked for `processed_logits`, then takes the best and reports the K best of
exactly these. A prompt is sent again with every rollout of its mention: all but its last block is a cache hit.

B rows of a batch, D language-model width, P prefix length, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import VllmConfig
from vllm.inputs import EmbedsPrompt, TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from gemel_engine.config import EngineSettings
from gemel_engine.errors import GemelError
from gemel_engine.model import DTYPES, language_model_width
from gemel_engine.prefix_trie import PrefixTrie
from gemel_engine.prompt import Prompt
from gemel_engine.search import Rollout, RolloutRequest, allowed_next_tokens
from gemel_engine.trie_mask import TrieTensors, constrain


@dataclass(slots=True)
class CacheStatistics:
    """Prompt tokens sent to the engine, and those of them found in the prefix cache."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class VllmEngine:
    """A vLLM engine in this process that answers rollouts.

    Args:
        settings: The language model and how vLLM runs it.
        trie_directory: Names allowed where a request brings no candidates; each worker maps the files itself.
        terminator: Token that ends a name.
        num_children: K, the log-probs reported at each step.
        max_prompt_tokens: Longest prompt.
    """

    def __init__(
        self,
        settings: EngineSettings,
        trie_directory: Path,
        terminator: int,
        num_children: int,
        max_prompt_tokens: int,
    ) -> None:
        self._trie = PrefixTrie.open(trie_directory)
        self._terminator = terminator
        self._num_children = num_children
        self._width = language_model_width(settings.name)
        self._dtype = DTYPES[settings.dtype]
        self._embeddings: tuple[Prompt, Tensor | None] | None = None
        self.cache_statistics = CacheStatistics()
        _set_environment(settings)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            # Compiling the sampler's one small function costs a process more than a small job has to compute.
            torch._dynamo.config.disable = True
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.name,
                skip_tokenizer_init=True,
                enable_prompt_embeds=True,
                dtype=settings.dtype,
                max_model_len=max_prompt_tokens + self._trie.longest(0) + 1,
                block_size=settings.block_size or (32 if on_cpu else None),
                gpu_memory_utilization=settings.gpu_memory_utilization,
                tensor_parallel_size=settings.tensor_parallel_size,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                quantization=settings.quantization,
                enable_prefix_caching=settings.enable_prefix_caching,
                enforce_eager=on_cpu,
                async_scheduling=False,  # the logits processor must see each token before the next step
                max_logprobs=num_children,
                logprobs_mode="processed_logits",
                logits_processors=[TrieLogitsProcessor],
                additional_config={"prefix_trie": str(trie_directory), "terminator": terminator},
                disable_log_stats=True,
                seed=0,
            )
        )

    def submit(self, request_id: str, prompt: Prompt, request: RolloutRequest, candidates: PrefixTrie | None) -> None:
        """Queue a rollout under the engine's trie, or under `candidates` where that is given."""
        trie = candidates or self._trie
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=trie.longest(trie.walk(request.path)) + 1,
            stop_token_ids=[self._terminator],
            ignore_eos=True,
            detokenize=False,
            logprobs=self._num_children,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={
                "path": list(request.path),
                "excluded": list(request.excluded),
                "candidates": candidates and [candidates.name_tokens(name) for name in range(candidates.num_names)],
            },
        )
        self._engine.add_request(request_id, self._vllm_prompt(prompt, request.path), parameters)

    def step(self) -> list[tuple[str, Rollout]]:
        """Run one engine step over all queued rollouts; returns the finished ones with their ids.

        Raises:
            GemelError: The language model's log-probs are not numbers.
        """
        finished = []
        for output in self._engine.step():
            assert isinstance(output, RequestOutput)
            self.cache_statistics.num_prompt_tokens += len(output.prompt_token_ids or ())
            self.cache_statistics.num_cached_tokens += output.num_cached_tokens or 0
            finished.append((output.request_id, _to_rollout(output)))
        return finished

    def _vllm_prompt(self, prompt: Prompt, path: tuple[int, ...]) -> EmbedsPrompt | TokensPrompt:
        """The prompt followed by the tokens already taken; only visual positions carry embeddings.

        The other positions hold NaN: vLLM never reads them, but its cache keys cover them, and NaN keeps a token
        position from ever being taken for a visual one.
        """
        token_ids = [*prompt.token_ids, *path]
        if not prompt.visual_prefixes:
            return TokensPrompt(prompt_token_ids=token_ids)
        embeddings = torch.full((len(token_ids), self._width), math.nan, dtype=self._dtype)  # (T, D)
        is_token = [True] * len(token_ids)
        for start, prefix in prompt.visual_prefixes:
            embeddings[start : start + len(prefix)] = prefix.to(embeddings)
            is_token[start : start + len(prefix)] = [False] * len(prefix)
        return EmbedsPrompt(prompt_embeds=embeddings, prompt_token_ids=token_ids, prompt_is_token_ids=is_token)


class TrieLogitsProcessor(LogitsProcessor):
    """vLLM's view of the prefix trie: one cursor for each request of the batch.

    The trie and the terminator come from the engine's `additional_config`, a request's own path, excluded tokens and
    candidates from its `extra_args`, so that it works in any worker process.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        additional: Any = vllm_config.additional_config
        self._trie = PrefixTrie.open(Path(additional["prefix_trie"]))
        self._tensors = TrieTensors.of(self._trie, device)
        self._terminator: int = additional["terminator"]
        self._cursors: dict[int, TrieCursor] = {}

    def is_argmax_invariant(self) -> bool:
        """False: constraining changes the best token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that left, joined or moved within the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._cursors.pop(index, None)
        for index, parameters, _, output_tokens in batch_update.added:
            self._cursors.pop(index, None)
            if parameters.extra_args and "path" in parameters.extra_args:
                self._cursors[index] = self._cursor(parameters.extra_args, output_tokens)
        for first, second, direction in batch_update.moved:
            moved, replaced = self._cursors.pop(first, None), self._cursors.pop(second, None)
            if moved is not None:
                self._cursors[second] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._cursors[first] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Constrain the batch's logits (B, V)."""
        if not self._cursors:
            return logits
        nodes, own_rows, own_tokens = {}, [], []
        for row, cursor in self._cursors.items():
            node = cursor.advance()
            if cursor.trie is self._trie:
                nodes[row] = node
            else:  # a mention's few candidates
                allowed = allowed_next_tokens(cursor.trie, node, self._terminator, frozenset())
                own_rows += [row] * len(allowed)
                own_tokens += allowed.tolist()
        pairs = torch.tensor([own_rows, own_tokens], dtype=torch.long).to(logits.device)
        places, tokens = self._tensors.allowed(
            torch.tensor(list(nodes.values()), dtype=torch.long).to(logits.device), self._terminator
        )
        rows = torch.tensor(list(nodes), dtype=torch.long).to(logits.device)[places]
        excluded = [(row, token) for row, cursor in self._cursors.items() for token in cursor.excluded]
        return constrain(logits, torch.cat([rows, pairs[0]]), torch.cat([tokens, pairs[1]]), excluded)

    def _cursor(self, extra_args: dict[str, Any], output_tokens: list[int]) -> TrieCursor:
        candidates = extra_args["candidates"]
        trie = self._trie if candidates is None else PrefixTrie.from_sequences(candidates)[0]
        return TrieCursor(trie, trie.walk(extra_args["path"]), extra_args["excluded"], output_tokens)


@dataclass(slots=True)
class TrieCursor:
    """Where one request stands in its trie; moves on as `output_tokens`, a live list, grows."""

    trie: PrefixTrie
    node: int
    excluded: Sequence[int]
    output_tokens: list[int]
    num_seen: int = field(default=0)

    def advance(self) -> int:
        """The node behind all tokens so far."""
        for token in self.output_tokens[self.num_seen :]:
            child = self.trie.child(self.node, token)
            if child is None:
                break  # the terminator of a request that is about to leave the batch
            self.node, self.excluded = child, ()
            self.num_seen += 1
        return self.node


def _to_rollout(output: RequestOutput) -> Rollout:
    """The log-probs of allowed tokens, step by step; vLLM puts the chosen token before the K best."""
    flat = output.outputs[0].logprobs
    assert isinstance(flat, FlatLogprobs)
    rollout = Rollout([], [])
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        log_probs = flat.logprobs[start + 1 : end]
        if any(map(math.isnan, log_probs)):
            raise GemelError("the language model's log-probs are not numbers: use dtype bfloat16 or float32")
        num_allowed = sum(log_prob != -math.inf for log_prob in log_probs)
        rollout.tokens.append(flat.token_ids[start + 1 : start + 1 + num_allowed])
        rollout.log_probs.append(log_probs[:num_allowed])
    return rollout


def _set_environment(settings: EngineSettings) -> None:
    """What vLLM takes from the environment only; what the user has set there stays."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # its logits processors have another interface
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
