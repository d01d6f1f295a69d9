"""Decoding, side by side: ours, the paper's loop, transformers at its best, and the floor; small and huge name sets.

python benchmarks/decode.py WIKIDIVERSE TITLES [--parts ...]

WIKIDIVERSE holds `train.parquet`, `dev.parquet` and `entities.parquet`; TITLES is a Parquet file with a column `name`.
Needs `build/wikidiverse`, which `benchmarks/wikidiverse.py` makes. Results go to `benchmarks/results/decode.json`; a
part that has its results there is skipped, so that it can be interrupted. Everything in one part runs in one process,
on the same weights (float32) and prompts, and is timed in turn with what it is compared with.
"""

from __future__ import annotations

import json
import logging
import math
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from record import record
from transformers import DynamicCache
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from gemel_engine.artifacts import Artifacts, open_artifacts
from gemel_engine.config import LinkConfig, load_config
from gemel_engine.entity_names import TokenisedNames
from gemel_engine.generation import EntityNameGenerator
from gemel_engine.knowledge_base import KnowledgeBaseSettings, build_knowledge_base
from gemel_engine.linker import DemonstrationRetriever
from gemel_engine.model import FrozenLanguageModel, load_tokenizer
from gemel_engine.prefix_trie import PrefixTrie
from gemel_engine.search import NameSearch, Objective, Rollout, RolloutRequest, run_searches
from gemel_engine.trie_mask import TrieTensors, constrain
from gemel_engine.types import Mention, Prediction

CONFIG = Path("build/wikidiverse/link.toml")
WORK = Path("build/decode")
RESULTS = Path("benchmarks/results/decode.json")
NUM_BEAMS = 5
BUDGETS = (1, 2, 4, 8, 16, 64)
PARTS = ("trie", "trie_speed", "systems", "ours", "zipf", "union", "accuracy", "budgets_sum", "budgets_mean")
NUM_WEIGHTS = 134_515_008 - 49_152 * 576  # of SmolLM2-135M, all but the embeddings, which a prompt's tokens don't meet

logger = logging.getLogger("decode")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a system took for some mentions, and the entity that it found for each."""

    seconds: float
    entity_ids: list[str | None]
    num_computed: int = 0  # tokens of prompts, those found in a cache not counted


def main(
    wikidiverse: tyro.conf.Positional[Path],
    titles: tyro.conf.Positional[Path],
    *,
    parts: tuple[str, ...] = PARTS,
    num_mentions: int = 500,
    num_rounds: int = 3,
) -> None:
    """Measure what has no result yet.

    Args:
        wikidiverse: Directory of the corpus.
        titles: Names for a large knowledge base.
        parts: Which parts.
        num_mentions: Of dev, drawn with a fixed seed.
        num_rounds: Paired runs of each system.
    """
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measures: dict[str, Callable[[], dict[str, tuple[Any, str]]]] = {
        "trie": lambda: trie(wikidiverse, titles),
        "trie_speed": trie_speed,
        "systems": lambda: systems(wikidiverse, num_rounds),
        "ours": lambda: ours(wikidiverse, num_mentions),
        "zipf": lambda: zipf(wikidiverse),
        "union": lambda: union(wikidiverse, num_mentions),
        "accuracy": lambda: accuracy(wikidiverse, 200),
        "budgets_sum": lambda: budgets(wikidiverse, num_mentions, "sum"),
        "budgets_mean": lambda: budgets(wikidiverse, num_mentions, "mean"),
    }
    for part in parts:
        if part in results.get("parts", []):
            continue
        if len(parts) > 1:  # each in a process of its own: an engine keeps what it has taken
            arguments = [str(wikidiverse), str(titles), "--num-mentions", str(num_mentions)]
            arguments += ["--num-rounds", str(num_rounds), "--parts", part]
            subprocess.run([sys.executable, __file__, *arguments], check=True)
            continue
        command = f"python benchmarks/decode.py WIKIDIVERSE TITLES --parts {part}"
        for name, (value, what) in measures[part]().items():
            results[name] = record(value, command, what)
            logger.info("%s: %s", name, value)
        results.setdefault("parts", []).append(part)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


# ---- the trie ----


def trie(wikidiverse: Path, titles: Path) -> dict[str, tuple[Any, str]]:
    """Build the trie of all titles, and then their knowledge base."""
    table = pq.read_table(titles, columns=["name"])
    known = pq.read_table(wikidiverse / "entities.parquet", columns=["entity_id", "name"])
    # A title that is a name of the corpus but for capitals would be a second answer to the same question.
    is_new = pc.invert(pc.is_in(pc.utf8_lower(table["name"]), pc.utf8_lower(known["name"]).combine_chunks()))
    table = table.filter(is_new)
    ids = pa.array([f"T{row}" for row in range(len(table))])
    both = pa.concat_tables([known, pa.table({"entity_id": ids, "name": table["name"]})], promote_options="permissive")
    directory = WORK / "union"
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = load_tokenizer(load_config(LinkConfig, CONFIG).language_model.name)
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
    vocabulary = len(load_tokenizer(load_config(LinkConfig, CONFIG).language_model.name))
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


def timed(function: Callable[[], object], num_runs: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(num_runs):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


# ---- systems ----


class Systems:
    """Everything that links the same mentions with the same prompts."""

    def __init__(self, wikidiverse: Path, knowledge_base: str | None = None, kv_cache_gib: int = 2) -> None:
        config = load_config(LinkConfig, CONFIG)
        config = replace(config, language_model=replace(config.language_model, kv_cache_gib=kv_cache_gib))
        if knowledge_base is not None:
            config = replace(config, knowledge_base=knowledge_base)
        self.config = config
        self.artifacts: Artifacts = open_artifacts(config)
        self.generator = EntityNameGenerator.start(config, self.artifacts)
        self._engine: Any = self.generator.engine
        assert self.artifacts.index is not None, "written by benchmarks/wikidiverse.py"
        self._retriever = DemonstrationRetriever(config.retrieval, self.artifacts.index)
        self.dev = pq.read_table(wikidiverse / "dev.parquet").to_pylist()
        self.gold = {row["mention_id"]: row["entity_id"] for row in self.dev}

    def sample(self, num_mentions: int, seed: int = 0) -> list[Mention]:
        """Mentions of dev in the job's order."""
        rows = random.Random(seed).sample(self.dev, num_mentions)
        mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
        return sorted(mentions, key=lambda mention: (mention.mention, mention.mention_id))

    def prompts(self, mentions: Sequence[Mention]) -> list[tuple[int, ...]]:
        """The tokens that every system reads."""
        retrieved = self._retriever.retrieve(mentions, [None] * len(mentions))
        built = [
            self.generator.prompt(mention, None, rows)[0] for mention, rows in zip(mentions, retrieved, strict=True)
        ]
        return [prompt.token_ids for prompt in built]

    def accuracy(self, mentions: Sequence[Mention], names: Sequence[str | None]) -> float:
        """Share of right entities."""
        return float(np.mean([self.gold[m.mention_id] == name for m, name in zip(mentions, names, strict=True)]))

    def ours(self, mentions: Sequence[Mention]) -> tuple[Cost, list[Prediction]]:
        """Retrieval not counted, as for the others; prompts are."""
        retrieved = self._retriever.retrieve(mentions, [None] * len(mentions))
        self._reset()
        started = time.perf_counter()
        predictions = self.generator.generate(mentions, [None] * len(mentions), retrieved)
        seconds = time.perf_counter() - started
        statistics = self._engine.cache_statistics
        tokens = statistics.num_prompt_tokens - statistics.num_cached_tokens
        return Cost(seconds, [prediction.entity_id for prediction in predictions], tokens), predictions

    def floor(self, prompts: Sequence[tuple[int, ...]]) -> Cost:
        """The same engine reads every prompt once and answers one free token."""
        self._reset()
        engine, tokens = self._engine._engine, 0
        parameters = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(f"floor-{number}", TokensPrompt(prompt_token_ids=list(prompt)), parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        return Cost(time.perf_counter() - started, [], tokens)

    def _reset(self) -> None:
        assert self._engine._engine.reset_prefix_cache(), "the cache of an idle engine can be emptied"
        self._engine.cache_statistics.num_prompt_tokens = self._engine.cache_statistics.num_cached_tokens = 0


class Beams:
    """Beam search by transformers over the same names, each followed by the terminator."""

    def __init__(self, systems: Systems) -> None:
        self._model = FrozenLanguageModel(systems.config.language_model.name, systems.config.language_model.dtype)
        self._terminator = systems.generator._builder.terminator
        self._knowledge_base = systems.artifacts.knowledge_base
        self._root: dict[int, Any] = {}
        self._name_of: dict[tuple[int, ...], int] = {}
        for name in range(self._knowledge_base.trie.num_names):
            tokens = self._knowledge_base.name_tokens(name)
            node = self._root
            for token in (*tokens, self._terminator):
                node = node.setdefault(token, {})
            self._name_of[tuple(tokens)] = name

    def paper_loop(self, prompts: Sequence[tuple[int, ...]]) -> Cost:
        """As the paper's code: one mention after another, a dictionary trie; the prompt is read once for each beam."""
        started, names = time.perf_counter(), []
        for prompt in prompts:
            names += self._generate([prompt], None)
        return Cost(time.perf_counter() - started, names)

    def best(self, prompts: Sequence[tuple[int, ...]], batch_size: int = 8) -> Cost:
        """Batches of similar length; the prompt is read once and its keys and values are copied for the beams."""
        started = time.perf_counter()
        names: list[str | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for row, name in zip(rows, self._batch([prompts[row] for row in rows]), strict=True):
                names[row] = name
        return Cost(time.perf_counter() - started, names)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[tuple[int, ...]]) -> list[str | None]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._terminator] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        self._model.module(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(NUM_BEAMS)
        return self._generate([tuple(row) for row in ids.tolist()], mask, cache)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[tuple[int, ...]], mask: torch.Tensor | None, cache: DynamicCache | None = None
    ) -> list[str | None]:
        ids = torch.tensor(prompts)
        length = ids.shape[1]

        def allowed(_: int, tokens: torch.Tensor) -> list[int]:
            node = self._root
            for token in tokens[length:].tolist():
                if token not in node:
                    return [self._terminator]  # a beam that has ended
                node = node[token]
            return list(node) or [self._terminator]

        found = self._model.module.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            past_key_values=cache,
            num_beams=NUM_BEAMS,
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=self._terminator,
            pad_token_id=self._terminator,
            prefix_allowed_tokens_fn=allowed,
        )
        return [self._entity(row[length:].tolist()) for row in found]

    def _entity(self, tokens: list[int]) -> str | None:
        name = self._name_of.get(tuple(tokens[: tokens.index(self._terminator)]))
        if name is None:
            return None
        return self._knowledge_base.entity(self._knowledge_base.entities_of_name(name)[0]).entity_id


def systems(wikidiverse: Path, num_rounds: int) -> dict[str, tuple[Any, str]]:
    """All systems in turn; of the 60 mentions the slow ones have a share in each round, and all of them in the end."""
    ours, num_mentions = Systems(wikidiverse), 60
    beams = Beams(ours)
    mentions = ours.sample(num_mentions)
    prompts = ours.prompts(mentions)
    seconds: dict[str, list[float]] = {"ours": [], "floor": [], "paper_loop": [], "best_transformers": []}
    ours.floor(prompts[:2])  # whatever happens only once
    for number in range(num_rounds):
        share = prompts[number::num_rounds]
        seconds["floor"].append(ours.floor(prompts).seconds / num_mentions)
        seconds["ours"].append(ours.ours(mentions)[0].seconds / num_mentions)
        seconds["best_transformers"].append(beams.best(share).seconds / len(share))
        seconds["paper_loop"].append(beams.paper_loop(share).seconds / len(share))
        logger.info("%s", {name: round(values[-1], 2) for name, values in seconds.items()})
    what = (
        f"{num_mentions} mentions of dev, {num_rounds} rounds, 8 demonstrations, float32; beam search ranks by the "
        "mean, as the paper's"
    )

    def speedup(slow: str) -> tuple[float, str]:  # a mean, because each of its rounds had other mentions
        return float(np.mean(seconds[slow])) / median(seconds["ours"]), what

    return {
        "seconds_per_mention_60": (seconds, what),
        "time_over_floor_60": (median(a / b for a, b in zip(seconds["ours"], seconds["floor"], strict=True)), what),
        "speedup_over_paper_loop": speedup("paper_loop"),
        "speedup_over_best_transformers": speedup("best_transformers"),
    }


def ours(wikidiverse: Path, num_mentions: int) -> dict[str, tuple[Any, str]]:
    """Ours between two runs of the floor, since the machine's speed drifts."""
    systems = Systems(wikidiverse)
    mentions = systems.sample(num_mentions)
    prompts = systems.prompts(mentions)
    floor = systems.floor(prompts)
    cost, predictions = systems.ours(mentions)
    floor = replace(floor, seconds=(floor.seconds + systems.floor(prompts).seconds) / 2)
    what = f"{num_mentions} mentions of dev, 8 demonstrations, float32, one run between two of the floor"
    rate = matmul_gflops()
    return {
        "time_over_floor": (cost.seconds / floor.seconds, what),
        "seconds_per_mention": ({"ours": cost.seconds / num_mentions, "floor": floor.seconds / num_mentions}, what),
        "prompt_tokens_computed": ({"ours": cost.num_computed, "floor": floor.num_computed}, what),
        "floor_share_of_matmul_rate": (2 * NUM_WEIGHTS * floor.num_computed / floor.seconds / 1e9 / rate, what),
        "matmul_gflops": (rate, "float32, (2048, 576) by (576, 1536)"),
        "certified_share": (float(np.mean([prediction.certified for prediction in predictions])), what),
        "rollouts_per_mention": (float(np.mean([prediction.num_rollouts for prediction in predictions])), what),
        "accuracy": (systems.accuracy(mentions, cost.entity_ids), what),
    }


def matmul_gflops() -> float:
    """What the machine multiplies in the shape of the model's widest layers."""
    left, right = torch.rand(2048, 576), torch.rand(576, 1536)
    return 2 * 2048 * 576 * 1536 / timed(lambda: left @ right, 50) / 1e9


def accuracy(wikidiverse: Path, num_mentions: int) -> dict[str, tuple[Any, str]]:
    """The systems' accuracy on the same mentions."""
    systems = Systems(wikidiverse)
    beams, mentions = Beams(systems), systems.sample(num_mentions)
    prompts = systems.prompts(mentions)
    what = f"{num_mentions} mentions of dev, the same for all"
    found = {
        "accuracy_ours_paired": systems.ours(mentions)[0].entity_ids,
        "accuracy_best_transformers": beams.best(prompts).entity_ids,
        "accuracy_paper_loop": beams.paper_loop(prompts).entity_ids,
    }
    return {name: (systems.accuracy(mentions, names), what) for name, names in found.items()}


def budgets(wikidiverse: Path, num_mentions: int, objective: Objective) -> dict[str, tuple[Any, str]]:
    """What the search would have answered with fewer rollouts, read off one run with the largest budget."""
    ours = Systems(wikidiverse)
    mentions = ours.sample(num_mentions)
    settings = replace(ours.config.search, objective=objective, max_rollouts=max(BUDGETS), width=1)
    knowledge_base = ours.artifacts.knowledge_base
    retrieved = ours._retriever.retrieve(mentions, [None] * len(mentions))
    searches = {}

    class Watched(NameSearch):
        """Notes its result after each rollout."""

        def observe(self, request: RolloutRequest, rollout: Rollout) -> None:
            super().observe(request, rollout)
            result = self.result()
            trajectory.setdefault(id(self), []).append((result.names[0].name_index, result.num_certified > 0))

    trajectory: dict[int, list[tuple[int, bool]]] = {}
    for position, (mention, rows) in enumerate(zip(mentions, retrieved, strict=True)):
        prompt = ours.generator.prompt(mention, None, rows)[0]
        searches[position] = prompt, Watched(knowledge_base.trie, ours.generator._builder.terminator, settings)
    started = time.perf_counter()
    queue = ((position, prompt, search, None) for position, (prompt, search) in searches.items())
    for _ in run_searches(ours.generator.engine, queue, ours.config.language_model.max_num_seqs):
        pass
    logger.info("budgets %s: %.0f s", objective, time.perf_counter() - started)
    table = []
    for budget in BUDGETS:
        found = [trajectory[id(search)][:budget] for _, search in searches.values()]
        ids = [knowledge_base.entity(knowledge_base.entities_of_name(seen[-1][0])[0]).entity_id for seen in found]
        table.append(
            {
                "max_rollouts": budget,
                "accuracy": ours.accuracy(mentions, ids),
                "certified_share": float(np.mean([seen[-1][1] for seen in found])),
                "rollouts_per_mention": float(np.mean([len(seen) for seen in found])),
            }
        )
    what = f"{num_mentions} mentions of dev, 8 demonstrations, one rollout at a time"
    return {f"budgets_{objective}": (table, what)}


# ---- many mentions of few surface forms ----


def zipf(wikidiverse: Path, num_mentions: int = 1000) -> dict[str, tuple[Any, str]]:
    """A corpus in which a few surface forms are very common, ordered by surface form against random order."""
    systems = Systems(wikidiverse, kv_cache_gib=1)
    corpus = zipf_corpus(systems.dev, num_mentions)
    ordered = sorted(corpus, key=lambda mention: (mention.mention, mention.mention_id))
    prompts = systems.prompts(corpus)
    in_order, _ = systems.ours(ordered)
    at_random, _ = systems.ours(corpus)
    what = (
        f"{num_mentions} mentions, surface forms drawn with probability 1/rank, "
        f"{len({mention.mention for mention in corpus})} distinct, 1 GiB of cache, float32, one run of each"
    )
    num_tokens = sum(map(len, prompts))
    return {
        "zipf_gain_from_ordering": (at_random.seconds / in_order.seconds, what),
        "zipf_seconds_per_mention": (
            {"ordered": in_order.seconds / num_mentions, "random": at_random.seconds / num_mentions},
            what,
        ),
        "zipf_prompt_tokens": (
            {"ordered": in_order.num_computed, "random": at_random.num_computed, "without_cache": num_tokens},
            f"{what}; computed, of the first rollouts' prompts and of the others'; without a cache: of one prompt each",
        ),
        "zipf_cache_curve": (cache_curve(prompts, [prompts[corpus.index(m)] for m in ordered]), what),
    }


def zipf_corpus(rows: Sequence[dict[str, Any]], num_mentions: int) -> list[Mention]:
    """Mentions whose surface forms are drawn with probability 1/rank, with captions that differ; in random order."""
    rng = random.Random(0)
    of_form: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_form.setdefault(row["mention"], []).append(row)
    forms = sorted(of_form)
    rng.shuffle(forms)
    drawn = rng.choices(forms, [1 / rank for rank in range(1, len(forms) + 1)], k=num_mentions)
    return [
        Mention(f"z{number}", f"{rng.choice(of_form[form])['text']} (photo {number})", form)
        for number, form in enumerate(drawn)
    ]


def cache_curve(at_random: Sequence[tuple[int, ...]], ordered: Sequence[tuple[int, ...]]) -> list[dict[str, float]]:
    """Prompt tokens computed by cache size: least recently used blocks of 32 tokens leave first."""
    bytes_per_token = 30 * 2 * 3 * 64 * 4  # SmolLM2-135M: layers, keys and values, heads, width, float32
    return [
        {
            "gib": gib,
            "random": float(computed_tokens(at_random, int(gib * 2**30 / bytes_per_token / 32))),
            "ordered": float(computed_tokens(ordered, int(gib * 2**30 / bytes_per_token / 32))),
        }
        for gib in (0.25, 0.5, 1, 2, 4, 8)
    ]


def computed_tokens(prompts: Sequence[tuple[int, ...]], num_blocks: int, block_size: int = 32) -> int:
    """Tokens of prompts, read one after another, that a cache of so many blocks does not hold."""
    cache: dict[int, None] = {}
    computed = 0
    for prompt in prompts:
        keys, key = [], 0
        for start in range(0, (len(prompt) - 1) // block_size * block_size, block_size):
            key = hash((key, prompt[start : start + block_size]))
            keys.append(key)
        num_hits = next((number for number, key in enumerate(keys) if key not in cache), len(keys))
        computed += len(prompt) - num_hits * block_size
        for key in reversed(keys):
            cache.pop(key, None)
            cache[key] = None
        while len(cache) > num_blocks:
            del cache[next(iter(cache))]
    return computed


def union(wikidiverse: Path, num_mentions: int) -> dict[str, tuple[Any, str]]:
    """The same mentions against all titles at once."""
    systems = Systems(wikidiverse, str(WORK / "union"))
    mentions = systems.sample(num_mentions)
    floor = systems.floor(systems.prompts(mentions))
    cost, predictions = systems.ours(mentions)
    what = f"{num_mentions} mentions of dev, {systems.artifacts.knowledge_base.trie.num_names} names, float32"
    return {
        "union_time_over_floor": (cost.seconds / floor.seconds, what),
        "union_certified_share": (float(np.mean([prediction.certified for prediction in predictions])), what),
        "union_rollouts_per_mention": (float(np.mean([prediction.num_rollouts for prediction in predictions])), what),
        "union_accuracy": (systems.accuracy(mentions, cost.entity_ids), what),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)
