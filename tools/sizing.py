"""Sizes on paper: what a cluster has to do for a corpus, calculated anew whenever the documents are written.

The lengths of demonstrations and questions are counted on WikiDiverse (`sizing.json`); sizes of models are public, and
rates of GPUs are what their vendor says. Two cases bound what a corpus costs: no surface form comes twice, so that
whole prompts are computed; and all come very often, so that of a prompt only its question is. Where evidence decides
alone, the language model has nothing to do: the share of such mentions is that of WikiDiverse dev, in `score.json`.
What a rollout costs the host, in `hostcost.json`, bounds what one engine takes, whatever the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from figures import Results

PREFIX_LENGTH = 4
NAME_TOKENS = 6  # of a rollout, terminator included
FOLLOW_UP_TOKENS = 16  # half a block of 32, which a follow-up rollout computes again
NUM_FOLLOW_UPS = 3
EFFICIENCY = 0.4  # share of a GPU's rate that is reached; an assumption until it is measured
PICTURE_BYTES, ROW_BYTES = 100_000, 400
DECODING_SECONDS = 0.008  # one picture of that size on one CPU core
NUMBERS_OF_GPUS = (8, 64, 512)


@dataclass(frozen=True, slots=True)
class Model:
    """A language model with its image encoder.

    Attributes:
        weights: Parameters that a token meets.
        kv_bytes: Bytes of keys and values of one token, 16-bit.
        num_demonstrations: Number of demonstrations of a prompt.
        image_weights: Parameters of the image encoder.
        image_tokens: Number of patches that it reads.
    """

    weights: float
    kv_bytes: int
    num_demonstrations: int
    image_weights: float
    image_tokens: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense 16-bit operations a second, and bytes of memory, as the vendor gives them."""

    rate: float
    memory: float


MODELS = {
    "OPT-6.7B": Model(6.7e9, 2 * 2 * 32 * 4096, 16, 304e6, 257),  # with CLIP ViT-L/14
    "8B": Model(8.0e9, 2 * 2 * 32 * 8 * 128, 8, 428e6, 729),  # Llama 3.1 with SigLIP SO400M/14 at 384
}
GPUS = {"A100": Gpu(312e12, 80e9), "H100": Gpu(989e12, 80e9)}


def on_paper(results: Results) -> dict[str, Any]:
    """Return the costs of each model on each GPU by their names, as a file of results has them."""
    blocks, made_by = results.look_up("sizing/block_tokens")
    share, _ = results.look_up("score/wikidiverse.decided_by_evidence")
    milliseconds, _ = results.look_up("hostcost/picture_840x4096_ms")
    searches = 1e3 / milliseconds / (1 + NUM_FOLLOW_UPS)
    rows = {
        f"{model_name}, {gpu_name}": costs(model, gpu, blocks, share) | {"searches_per_second_host": searches}
        for model_name, model in MODELS.items()
        for gpu_name, gpu in GPUS.items()
    }
    conditions = (
        f"block lengths of WikiDiverse ({made_by['conditions']}); the rest is calculated by "
        "`tools/sizing.py`, from `score.json` and `hostcost.json`, too"
    )
    return {"costs": {**made_by, "value": rows, "conditions": conditions}}


def costs(model: Model, gpu: Gpu, blocks: dict[str, float], decided_by_evidence: float) -> dict[str, Any]:
    """Return the costs of one mention with a picture, and what follows for many GPUs."""
    question = blocks["question"] + PREFIX_LENGTH
    prompt = model.num_demonstrations * (blocks["demonstration"] + PREFIX_LENGTH) + question
    decoded = (1 + NUM_FOLLOW_UPS) * NAME_TOKENS + NUM_FOLLOW_UPS * FOLLOW_UP_TOKENS
    image = 2 * model.image_weights * model.image_tokens
    cache = gpu.memory * 0.9 - 2 * (model.weights + model.image_weights)
    found: dict[str, Any] = {"prompt_tokens": prompt, "kv_tokens": cache / model.kv_bytes}
    for case, tokens in (("distinct", prompt + decoded), ("shared", question + decoded)):
        text = 2 * model.weights * tokens
        found |= {
            f"tokens_computed_{case}": tokens,
            f"teraflop_{case}": (text + image) / 1e12,
            f"mentions_per_second_{case}": EFFICIENCY * gpu.rate / (text + image),
            f"mentions_per_second_{case}_cascade": EFFICIENCY * gpu.rate / ((1 - decided_by_evidence) * text + image),
        }
    rates = [number * found["mentions_per_second_shared"] for number in NUMBERS_OF_GPUS]
    found["many"] = [of_many(rate) for rate in rates]
    return found


def of_many(rate: float) -> dict[str, float]:
    """Return what many GPUs ask of the rest at a rate of mentions a second, and their hours for 100M mentions."""
    return {
        "mentions_per_second": rate,
        "gigabytes_read_per_second": rate * (PICTURE_BYTES + ROW_BYTES) / 1e9,
        "cores_for_pictures": rate * DECODING_SECONDS,
        "hours_for_100m_shared": 1e8 / rate / 3600,
    }
