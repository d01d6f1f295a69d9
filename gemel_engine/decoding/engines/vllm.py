"""Rollouts by vLLM: prompts with visual prefixes, continuous batching, prefix cache.

A logits processor (`vllm_mask.py`) applies the prefix trie: it leaves the log-probs of allowed
tokens only. With `processed_logits`, vLLM takes the best of these and reports the K best. The
prompt is sent with every rollout of its mention: all but its last block is then a cache hit.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import torch._dynamo
from vllm import EngineArgs, LLMEngine, SamplingParams, envs
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from gemel_engine.config.components import EngineSettings
from gemel_engine.decoding.engines.base import CacheStatistics, Rollout, RolloutRequest
from gemel_engine.decoding.engines.vllm_mask import TrieLogitsProcessor, TrieLogitsProcessorV2
from gemel_engine.decoding.engines.vllm_prompt import VllmPrompts, with_prompt_keys
from gemel_engine.decoding.language_model import DTYPES, check_language_model, language_model_width, warn_if_slow
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.errors import EngineDiedError
from gemel_engine.knowledge_base.trie import PrefixTrie, SavedTrie
from gemel_engine.verbosity import is_verbose

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class VllmEngine:
    """A vLLM engine in this process that answers rollouts.

    Args:
        settings: Language model and engine settings of vLLM.
        trie_directory: Directory of the trie of names allowed for requests without candidates. Each
            worker maps the files itself.
        terminator: Token that ends a name.
        num_children: K, the number of log-probs reported at each step.
        max_prompt_tokens: Maximum number of tokens of a prompt.
        common_candidates: Candidates that many requests share. They are too many to send with each
            request, so workers map their files too.

    Attributes:
        cache_statistics: Counts of all finished requests.
        llm_engine: vLLM's engine; while no rollout is queued, it takes other requests too.
        prompts: Prompts in the form that vLLM takes.
    """

    def __init__(
        self,
        settings: EngineSettings,
        trie_directory: Path,
        terminator: int,
        num_children: int,
        max_prompt_tokens: int,
        common_candidates: SavedTrie | None = None,
    ) -> None:
        self._common_candidates = None if common_candidates is None else common_candidates.trie
        self._trie = PrefixTrie.open(trie_directory)
        self._terminator = terminator
        self._num_children = num_children
        self.prompts = VllmPrompts(language_model_width(settings.name), DTYPES[settings.dtype], self._trie.longest(0))
        self.cache_statistics = CacheStatistics()
        _set_environment()
        additional = {"prefix_trie": str(trie_directory), "terminator": terminator}
        if common_candidates is not None:
            additional["common_candidates"] = str(common_candidates.directory)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            warn_if_slow(settings.dtype, torch.device("cpu"))
            _keep_freed_memory()
            # Compiling the sampler's one small function takes longer than a small job computes.
            torch._dynamo.config.disable = True
        # vLLM's type annotation allows the first interface only.
        processors: list[Any] = [TrieLogitsProcessorV2 if envs.VLLM_USE_V2_MODEL_RUNNER else TrieLogitsProcessor]
        self.llm_engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.name,
                load_format="hf",  # by default vLLM may prefer files that were not checked
                skip_tokenizer_init=True,
                use_tqdm_on_load=is_verbose(),
                enable_prompt_embeds=True,
                dtype=settings.dtype,
                max_model_len=max_prompt_tokens + self._trie.longest(0) + 1,
                block_size=settings.block_size or (32 if on_cpu else None),
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=settings.kv_cache_gib << 30 if on_cpu else None,
                tensor_parallel_size=settings.tensor_parallel_size,
                distributed_executor_backend="mp" if settings.tensor_parallel_size > 1 else "uni",
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                quantization=settings.quantization,
                enable_prefix_caching=settings.enable_prefix_caching,
                enforce_eager=on_cpu,
                async_scheduling=False,  # the logits processor needs each token before the next
                max_logprobs=num_children,
                logprobs_mode="processed_logits",
                logits_processors=processors,
                additional_config=additional,
                disable_log_stats=True,
                seed=0,
            )
        )
        core: Any = self.llm_engine.engine_core
        core.engine_core.request_block_hasher = with_prompt_keys(core.engine_core.request_block_hasher)
        if not os.path.isdir(settings.name):
            check_language_model(settings.name)  # they may just have been downloaded

    def submit(self, request_id: str, prompt: Prompt, request: RolloutRequest) -> None:
        """Queue a rollout."""
        candidates = request.candidates
        trie = candidates or self._trie
        are_common = candidates is not None and candidates is self._common_candidates
        are_sent = candidates is not None and not are_common
        prompt_input, arguments = self.prompts.input(prompt, request.path)
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
                "candidates": candidates if are_sent else None,
                "has_common_candidates": are_common,
                **arguments,
            },
            skip_clone=True,  # it is this request's own
        )
        self.llm_engine.add_request(request_id, prompt_input, parameters)

    def step(self) -> list[tuple[str, Rollout]]:
        """Run one engine step over all queued rollouts; returns the finished ones with their ids.

        Raises:
            EngineDiedError: A process of the engine has ended, where it has several.
        """
        finished = []
        for output in self._step():
            assert isinstance(output, RequestOutput)
            self.cache_statistics.num_prompt_tokens += len(output.prompt_token_ids or ())
            self.cache_statistics.num_cached_tokens += output.num_cached_tokens or 0
            finished.append((output.request_id, _to_rollout(output)))
        return finished

    def _step(self) -> list[Any]:
        try:
            return self.llm_engine.step()
        except Exception as error:
            # vLLM's error doesn't say whether a worker has ended; its executor does.
            executor = getattr(self.llm_engine, "model_executor", None)
            if isinstance(error, EngineDeadError) or getattr(executor, "is_failed", False):
                raise EngineDiedError("a process of the language model's engine has ended: start it again") from error
            raise


def _to_rollout(output: RequestOutput) -> Rollout:
    """Return the log-probs of allowed tokens, step by step.

    vLLM puts the chosen token before the K best. If several tokens have exactly the highest
    log-prob, the chosen one need not be the first of the K, nor among them.
    """
    flat = output.outputs[0].logprobs
    assert isinstance(flat, FlatLogprobs)
    rollout = Rollout([], [])
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        log_probs = flat.logprobs[start + 1 : end]
        num_allowed = sum(log_prob != -math.inf for log_prob in log_probs)
        tokens, chosen = flat.token_ids[start + 1 : start + 1 + num_allowed], flat.token_ids[start]
        if tokens[0] != chosen:
            tokens[tokens.index(chosen) if chosen in tokens else -1] = tokens[0]
            tokens[0] = chosen
        rollout.tokens.append(tokens)
        rollout.log_probs.append(log_probs[:num_allowed])
    return rollout


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of one step's activations for the next, up to 1 GiB of it.

    By itself glibc may give it back and have it mapped again, page by page, at each step.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 256 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _set_environment() -> None:
    """Set what vLLM reads from environment variables only; the user may set what needn't be as it is."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keys of cached blocks are ours: vllm_prompt.py
    # vLLM's own choice, which has to be known to give it the processor of that runner.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if torch.cuda.is_available() else "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
