"""The prefix trie of all titles: how long it takes to build and to use, and how large it is."""

from __future__ import annotations

import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.corpora import LANGUAGE_MODEL, union_with
from benchmarks.decoding.systems import WORK, timed
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.decoding.engines.mask import TrieTensors, constrain
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.names import TokenisedNames
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.tokenizer import load_tokenizer


def trie(data: Path, titles: Path) -> dict[str, tuple[Any, str]]:
    """Build the trie of all titles, and then their knowledge base."""
    both = union_with(data, titles)
    directory = WORK / "union"
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = load_tokenizer(LANGUAGE_MODEL)
    started = time.perf_counter()
    built, _ = PrefixTrie.build(*TokenisedNames.tokenise(both["name"], tokenizer).select(np.ones(len(both), bool)))
    built.save(WORK / "trie")
    trie_seconds = time.perf_counter() - started
    del built
    started = time.perf_counter()
    report = build_knowledge_base(both, tokenizer, directory, KnowledgeBaseSettings(on_bad_name="skip"))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    num_bytes = sum(path.stat().st_size for path in (directory / "trie").iterdir())
    what = f"{report.num_names} titles, one run"
    return {
        "trie_build_seconds": (trie_seconds, f"{what}: tokenising, building, saving"),
        "knowledge_base_build_seconds": (seconds, f"{what}: all that, checks of the names, entity records"),
        "trie_build_peak_gib": (peak, f"{what}, of both"),
        "trie_bytes_per_name": (num_bytes / report.num_names, f"{report.num_names} titles, files of the trie"),
    }


def trie_speed() -> dict[str, tuple[Any, str]]:
    """Time the trie that `trie` built."""
    directory = WORK / "union/trie"
    opened = timed(lambda: PrefixTrie.open(directory), 20)
    built = PrefixTrie.open(directory)
    vocabulary = len(load_tokenizer(LANGUAGE_MODEL))
    rng = np.random.default_rng(0)
    nodes = np.array([random_prefix(built, rng) for _ in range(320)])
    tensors, logits = TrieTensors.of(built, torch.device("cpu")), torch.randn(320, vocabulary)

    def mask() -> None:
        constrain(logits, *tensors.allowed(torch.from_numpy(nodes), 0))

    children = timed(lambda: built.allowed_tokens(nodes), 200)
    what = f"{built.num_names} titles, {built.num_nodes} nodes"
    num_children = len(built.allowed_tokens(nodes)[0])
    return {
        "trie_open_milliseconds": (1e3 * opened, what),
        "trie_children_microseconds_320": (1e6 * children, f"{what}; 320 random prefixes, {num_children} children"),
        "trie_children_torch_microseconds_320": (
            1e6 * timed(lambda: tensors.allowed(torch.from_numpy(nodes), 0), 200),
            f"{what}; the same nodes, without a loop over rows",
        ),
        "trie_mask_milliseconds_320": (
            1e3 * timed(mask, 20),
            f"{what}; (320, {vocabulary}) float32 logits to log-probs, disallowed tokens at minus infinity",
        ),
        "fill_milliseconds_320": (1e3 * timed(lambda: logits.fill_(-math.inf), 20), "the same logits, only filled"),
    }


def random_prefix(trie: PrefixTrie, rng: np.random.Generator) -> int:
    """A node on the way to a random name, not the root."""
    tokens = trie.name_tokens(int(rng.integers(trie.num_names)))
    return trie.walk(tokens[: rng.integers(1, len(tokens) + 1)])
