"""Random models, names and prompts, and the time that functions take on a device.

`DEVICE` (cuda or cpu) and `SHAPE` (tiny, 1b or 8b) come from the environment.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gemel_engine.config.components import EngineSettings, SearchSettings
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.prompt import VISUAL_PLACEHOLDER, Prompt
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch
from gemel_engine.knowledge_base.trie import PrefixTrie

DEVICE = os.environ.get("DEVICE", "cuda")
SHAPE = os.environ.get("SHAPE", "1b")
IS_TINY = SHAPE == "tiny"
SHAPES = {  # width, layers, heads, key heads, feed-forward, vocabulary
    "tiny": (64, 2, 2, 1, 128, 512),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
WIDTH, LAYERS, HEADS, KEY_HEADS, FEED_FORWARD, VOCABULARY = SHAPES[SHAPE]
DTYPE: Any = "float32" if DEVICE == "cpu" else "bfloat16"
TERMINATOR, PREFIX_LENGTH, NUM_CHILDREN, NUM_PICTURES = VOCABULARY - 1, 4, 10, 5


def wait() -> None:
    """Wait for what the device still computes."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_ms(function: Callable[[], object], num_repeats: int = 20, num_warm_up: int = 3) -> float:
    """Milliseconds of a call, results on the device included."""
    times = []
    for number in range(num_warm_up + num_repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if number >= num_warm_up:
            times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 3)


def random_trie(num_names: int, vocabulary: int = VOCABULARY) -> PrefixTrie:
    """Names of 2 to 7 tokens; first tokens are drawn unevenly, as words are."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 8, num_names)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (generator.pareto(0.6, offsets[-1]) * 20).astype(np.int64) % (vocabulary - 2) + 1
    return PrefixTrie.build(tokens.astype(np.uint32), offsets)[0]


def save_model(directory: Path, *, has_weights: bool = True) -> Path:
    """A random Llama of the shape, or its configuration alone."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=4096,
        head_dim=WIDTH // HEADS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=0,
        dtype=DTYPE,
        initializer_range=0.05,
        architectures=["LlamaForCausalLM"],
    )
    if not has_weights:
        config.save_pretrained(directory)
        return directory
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE))  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    return directory


def random_prompts(number: int, length: int, *, has_pictures: bool = True, num_forms: int = 8) -> list[Prompt]:
    """Prompts of some surface forms, which share all but their last 200 tokens, pictures included."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        found: list[int] = torch.randint(1, VOCABULARY - 1, (count,), generator=generator).tolist()
        return found

    def picture() -> torch.Tensor:
        return torch.randn(PREFIX_LENGTH, WIDTH, generator=generator) * 0.05

    num_own = min(200, length // 3)
    shared = [(tokens(length - num_own), [picture() for _ in range(NUM_PICTURES - 1)]) for _ in range(num_forms)]
    made = []
    for n in range(number):
        beginning, pictures = shared[n * num_forms // number]
        token_ids = [*beginning, *tokens(num_own)]
        distance = len(beginning) // (NUM_PICTURES - 1)
        prefixes = [(i * distance, prefix) for i, prefix in enumerate(pictures)] + [(len(beginning), picture())]
        if has_pictures:
            for start, prefix in prefixes:
                token_ids[start : start + len(prefix)] = [VISUAL_PLACEHOLDER] * len(prefix)
        made.append(Prompt(tuple(token_ids), tuple(prefixes) if has_pictures else ()))
    return made


def search(
    engine: RolloutEngine, prompts: list[Prompt], trie: PrefixTrie, max_in_flight: int, max_rollouts: int = 8
) -> tuple[int, float]:
    """Search the names of all prompts; return the number of rollouts and the seconds."""
    settings = SearchSettings(max_rollouts=max_rollouts, num_children=NUM_CHILDREN)
    searches = ((i, prompt, NameSearch(trie, TERMINATOR, settings)) for i, prompt in enumerate(prompts))
    wait()
    start = time.perf_counter()
    num_rollouts = sum(result.num_rollouts for _, result in run_searches(engine, searches, max_in_flight))
    wait()
    return num_rollouts, time.perf_counter() - start


def start_vllm(model: Path, trie_directory: Path, max_prompt_tokens: int, *, has_weights: bool) -> Any:
    """The engine; `EAGER=1` leaves compilation out, `ATTENTION` names a backend, `BARE=1` takes no compiled kernels."""
    from gemel_engine.decoding.engines import vllm as vllm_engine  # takes long, and is not needed for most parts

    changes: dict[str, Any] = {} if has_weights else {"load_format": "dummy"}
    if os.environ.get("ATTENTION"):
        changes["attention_backend"] = os.environ["ATTENTION"]
    if os.environ.get("EAGER") == "1":
        changes["enforce_eager"] = True
    if os.environ.get("BARE") == "1":
        changes["compilation_config"] = {"custom_ops": ["none"]}
        changes["kernel_config"] = {"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}}
    arguments = vars(vllm_engine)["EngineArgs"]
    vars(vllm_engine)["EngineArgs"] = lambda **given: arguments(**given | changes)
    share = 0.15 if IS_TINY else 0.5
    settings = EngineSettings(name=str(model), dtype=DTYPE, gpu_memory_utilization=share, kv_cache_gib=1)
    return vllm_engine.VllmEngine(settings, trie_directory, TERMINATOR, NUM_CHILDREN, max_prompt_tokens)
