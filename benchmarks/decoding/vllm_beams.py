"""vLLM's own beam search, constrained to a choice of names by its structured outputs."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from vllm import LLM
from vllm.inputs import TokensPrompt
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from benchmarks.decoding.systems import NUM_BEAMS, Systems

_NUM_NAMES = (10, 100, 1000, 7642, 100_000)  # titles beyond the corpus's own; with 1M none was done in 7 minutes
_NUM_MENTIONS = 3
_PATIENCE = 60.0  # seconds a mention, beyond which no more names are tried

logger = logging.getLogger("benchmarks")


def vllm_beams(data: Path, titles: Path) -> dict[str, tuple[Any, str]]:
    """Seconds a mention by number of names; the mentions' own names are among them."""
    systems = Systems(data)
    mentions = systems.sample(_NUM_MENTIONS)
    prompts = systems.prompts(mentions)
    ours = systems.ours(mentions)[0].seconds / len(mentions)
    settings = systems.config.language_model
    engine = LLM(
        settings.name,
        dtype=settings.dtype,
        enforce_eager=True,
        block_size=32,
        max_model_len=2048,
        max_logprobs=2 * NUM_BEAMS,
        enable_prefix_caching=True,
        structured_outputs_config={"backend": "guidance"},
        disable_log_stats=True,
    )
    entities = pq.read_table(data / "entities.parquet", columns=["entity_id", "name"]).to_pylist()
    gold = {systems.gold[mention.mention_id] for mention in mentions}
    names = [row["name"] for row in sorted(entities, key=lambda row: row["entity_id"] not in gold)]
    names += pq.read_table(titles, columns=["name"])["name"][: max(_NUM_NAMES) - len(names)].to_pylist()
    table = []
    for num_names in _NUM_NAMES:
        parameters = BeamSearchParams(
            beam_width=NUM_BEAMS,
            max_tokens=40,
            structured_outputs=StructuredOutputsParams(choice=names[:num_names]),
        )
        started = time.perf_counter()
        for prompt in prompts:
            engine.beam_search([TokensPrompt(prompt_token_ids=list(prompt))], parameters)
        seconds = (time.perf_counter() - started) / len(prompts)
        table.append({"names": num_names, "seconds_per_mention": seconds})
        logger.info("vLLM's beam search over %d names: %.1f s a mention", num_names, seconds)
        if seconds > _PATIENCE:
            break
    what = (
        f"{_NUM_MENTIONS} mentions of dev, {NUM_BEAMS} beams, float32; "
        f"ours took {ours:.2f} s a mention over the corpus's own names"
    )
    return {"vllm_beam_search": (table, what)}
