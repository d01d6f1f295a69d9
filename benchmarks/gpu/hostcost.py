"""What a rollout costs the host before the model runs, with pictures and without, before and after.

    python -m benchmarks.gpu.hostcost

A few minutes on two cores. A model of one tiny layer whose embeddings are 4,096 wide, in bfloat16, makes vLLM do with a
prompt of 840 tokens what it does for a large model: take the request, hash its blocks, queue it. 17 pictures, as with
the paper's 16 demonstrations and a question; the four prompts of a round share the pictures of the demonstrations, as
mentions of a surface form do; four rollouts of each prompt, the first of which prepares it. "Before" are a tensor
filled with NaN for each rollout and vLLM's own keys of blocks. All take turns on one engine, in a process with one
torch thread and in one with two. What counts is the thread's own time, which other processes don't lengthen. Figures go
to `benchmarks/results/hostcost.json`.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm import SamplingParams
from vllm.inputs import EmbedsPrompt, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from benchmarks.record import ResultFile, run
from gemel_engine.config.components import EngineSettings
from gemel_engine.decoding.engines.base import RolloutRequest
from gemel_engine.decoding.engines.vllm import VllmEngine
from gemel_engine.decoding.prompt import VISUAL_PLACEHOLDER, Prompt
from gemel_engine.knowledge_base.trie import PrefixTrie

WIDTH, LENGTH, NUM_PICTURES, PREFIX_LENGTH = 4096, 840, 17, 4
VOCABULARY, TERMINATOR, NUM_CHILDREN, NAME_TOKENS = 128, 127, 10, 4
NUM_ROUNDS, PROMPTS_PER_ROUND, ROLLOUTS_PER_PROMPT = 12, 4, 4
CONDITIONS = (
    "milliseconds of the host's thread (passed: of the clock) for a submitted rollout, median of "
    f"{NUM_ROUNDS} rounds of {PROMPTS_PER_ROUND} prompts of {LENGTH} tokens with {ROLLOUTS_PER_PROMPT} rollouts each; "
    f"{NUM_PICTURES} pictures, width {WIDTH}, bfloat16, blocks of 32"
)

Submit = Callable[[VllmEngine, str, Prompt, RolloutRequest], None]
request_ids = map(str, itertools.count())


def main(num_threads: int | None = None) -> None:
    """Measure, in a process for each number of threads, which vLLM fixes when it starts.

    Args:
        num_threads: Measure in this process, which has so many; None: in processes with one and two.
    """
    if num_threads is None:
        for number in (1, 2):
            environment = os.environ | {"OMP_NUM_THREADS": str(number)}
            command = [sys.executable, "-m", "benchmarks.gpu.hostcost", "--num-threads", str(number)]
            subprocess.run(command, check=True, env=environment)
        return
    assert torch.get_num_threads() == num_threads, "give OMP_NUM_THREADS"
    with tempfile.TemporaryDirectory() as directory:
        found = measure(*start(Path(directory)))
    ending = "" if num_threads == 1 else f"_{num_threads}_threads"
    values = {f"{name}{ending}": value for name, value in found.items()}
    ResultFile("hostcost", variables=["OMP_NUM_THREADS"]).note(values, f"{CONDITIONS}, torch threads: {num_threads}")


def measure(engine: VllmEngine, trie: PrefixTrie) -> dict[str, float]:
    """Milliseconds of a rollout by kind, and what pictures cost in comparison with text."""
    core: Any = engine.llm_engine.engine_core
    ours = core.engine_core.request_block_hasher
    theirs = ours.args[0]  # what `with_prompt_keys` wraps
    kinds: dict[str, tuple[Submit, Any, bool]] = {
        f"picture_{LENGTH}x{WIDTH}_ms": (VllmEngine.submit, ours, True),
        f"text_{LENGTH}_ms": (VllmEngine.submit, ours, False),
        f"picture_{LENGTH}x{WIDTH}_before_ms": (submit_before, theirs, True),
        f"text_{LENGTH}_before_ms": (submit_before, theirs, False),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    generator = np.random.default_rng(0)
    for number in range(NUM_ROUNDS + 1):
        for name, (submit, hasher, has_pictures) in kinds.items():
            core.engine_core.request_block_hasher = hasher
            prompts = make_prompts(generator, has_pictures)
            milliseconds = time_round(engine, trie, submit, prompts)
            if number:  # the first round warms up
                times[name].append(milliseconds)
    core.engine_core.request_block_hasher = ours
    thread, passed = (
        {name: round(statistics.median(pair[which] for pair in measured), 3) for name, measured in times.items()}
        for which in (0, 1)
    )
    picture, text, picture_before, text_before = thread.values()
    ratios = {"ratio": round(picture / text, 2), "ratio_before": round(picture_before / text_before, 2)}
    return thread | ratios | {f"{name[:-3]}_passed_ms": value for name, value in passed.items()}


def time_round(engine: VllmEngine, trie: PrefixTrie, submit: Submit, prompts: list[Prompt]) -> tuple[float, float]:
    """Milliseconds of the host's thread, and passed, for a rollout of some prompts, which the model never computes."""
    paths = [tuple(trie.name_tokens(number)[:1]) for number in range(ROLLOUTS_PER_PROMPT)]
    requests = [(next(request_ids), prompt, RolloutRequest(path)) for prompt in prompts for path in paths]
    start, thread_start = time.perf_counter(), time.thread_time()
    for request_id, prompt, request in requests:
        submit(engine, request_id, prompt, request)
    seconds, thread_seconds = time.perf_counter() - start, time.thread_time() - thread_start
    engine.llm_engine.abort_request([request_id for request_id, _, _ in requests])
    return thread_seconds / len(requests) * 1e3, seconds / len(requests) * 1e3


def submit_before(engine: VllmEngine, request_id: str, prompt: Prompt, request: RolloutRequest) -> None:
    """Submit as it was before: a tensor of its own for each rollout, NaN where there is no picture."""
    token_ids = [*prompt.token_ids, *request.path]
    made: TokensPrompt | EmbedsPrompt = TokensPrompt(prompt_token_ids=token_ids)
    if prompt.visual_prefixes:
        embeddings = torch.full((len(token_ids), WIDTH), math.nan, dtype=torch.bfloat16)
        is_token = [True] * len(token_ids)
        for start, prefix in prompt.visual_prefixes:
            embeddings[start : start + len(prefix)] = prefix.to(embeddings)
            is_token[start : start + len(prefix)] = [False] * len(prefix)
        made = EmbedsPrompt(prompt_embeds=embeddings, prompt_token_ids=token_ids, prompt_is_token_ids=is_token)
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=NAME_TOKENS - len(request.path) + 1,
        stop_token_ids=[TERMINATOR],
        ignore_eos=True,
        detokenize=False,
        logprobs=NUM_CHILDREN,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={
            "path": list(request.path),
            "excluded": [],
            "candidates": None,
            "has_common_candidates": False,
        },
    )
    engine.llm_engine.add_request(request_id, made, parameters)


def make_prompts(generator: np.random.Generator, has_pictures: bool) -> list[Prompt]:
    """Random prompts, with pictures at equal distances, of which all but the last are the same."""
    starts = range(0, LENGTH - PREFIX_LENGTH, LENGTH // NUM_PICTURES)[:NUM_PICTURES] if has_pictures else ()
    demonstrations = [torch.randn(PREFIX_LENGTH, WIDTH) for _ in starts[:-1]]
    made = []
    for _ in range(PROMPTS_PER_ROUND):
        token_ids = generator.integers(1, VOCABULARY - 1, LENGTH).tolist()
        for start in starts:
            token_ids[start : start + PREFIX_LENGTH] = [VISUAL_PLACEHOLDER] * PREFIX_LENGTH
        pictures = [*demonstrations, torch.randn(PREFIX_LENGTH, WIDTH)]
        made.append(Prompt(tuple(token_ids), tuple(zip(starts, pictures, strict=False))))
    return made


def start(directory: Path) -> tuple[VllmEngine, PrefixTrie]:
    """An engine with a random model that is wide and hardly computes, and its names."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=32,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=1,
        eos_token_id=0,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory / "model")
    names = np.random.default_rng(0).integers(1, VOCABULARY - 1, (500, NAME_TOKENS))
    trie = PrefixTrie.from_sequences(names.tolist())[0]
    trie.save(directory / "trie")
    settings = EngineSettings(name=str(directory / "model"), dtype="bfloat16", kv_cache_gib=1)
    return VllmEngine(settings, directory / "trie", TERMINATOR, NUM_CHILDREN, LENGTH), trie


if __name__ == "__main__":
    run(main)
