"""How fast surface forms are embedded, against batches of 16 by all threads together, side by side in one process.

    python -m benchmarks.candidates encoder DATA [--num-forms 1000] [--num-rounds 5]

Some minutes on two cores. Both embed the same forms with the MiniLM of `make demo`, other forms in each round, and
their turns alternate; the medians are compared. Then the whole set, the distinct surface forms of the mentions and the
names of the entities, is embedded once. Figures go to `benchmarks/results/encoders.json`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from benchmarks.corpora import MENTION_ENCODER, SEED, read_rows
from benchmarks.record import ResultFile
from gemel_engine.retrieval.encoder import MentionEncoder

FORMS_PER_BATCH = 16

Encode = Callable[[list[str]], NDArray[np.float32]]


def main(data: tyro.conf.Positional[Path], *, num_forms: int = 1000, num_rounds: int = 5) -> None:
    """Speed of the mention encoder.

    Args:
        data: Directory of WikiDiverse.
        num_forms: Forms of a round.
        num_rounds: Rounds.
    """
    value = measure_mention_encoder(surface_forms(data), num_forms, num_rounds)
    what = f"MiniLM in float32, {torch.get_num_threads()} threads"
    ResultFile("encoders", {"DATA": data}).note({"mention_encoder": value}, what)


def surface_forms(data: Path) -> list[str]:
    """Return the distinct surface forms and names, in random order."""
    columns = {"train": "mention", "dev": "mention", "entities": "name"}
    forms = sorted({row[column] for name, column in columns.items() for row in read_rows(data / f"{name}.parquet")})
    random.Random(SEED).shuffle(forms)
    return forms


def measure_mention_encoder(forms: list[str], num_forms: int, num_rounds: int) -> dict[str, Any]:
    """Return forms per second of both ways, round by round, and of the whole set."""
    ways: dict[str, Encode] = {"before": encoder_in_sixteens(), "now": MentionEncoder(MENTION_ENCODER).encode}
    speeds = defaultdict(list)
    largest_difference = 0.0
    for number in range(num_rounds):
        of_round = forms[number * num_forms : (number + 1) * num_forms]
        embeddings = {}
        for name in ways if number % 2 else reversed(ways):
            started = time.perf_counter()
            embeddings[name] = ways[name](of_round)
            speeds[name].append(len(of_round) / (time.perf_counter() - started))
        difference = float(np.abs(embeddings["before"] - embeddings["now"]).max())
        largest_difference = max(largest_difference, difference)
    started = time.perf_counter()
    ways["now"](forms)
    medians = {name: statistics.median(of_way) for name, of_way in speeds.items()}
    return {
        "forms_per_s_before": medians["before"],
        "forms_per_s": medians["now"],
        "ratio": medians["now"] / medians["before"],
        "ratios": [now / before for now, before in zip(speeds["now"], speeds["before"], strict=True)],
        "largest_difference": largest_difference,
        "num_all_forms": len(forms),
        "all_forms_per_s": len(forms) / (time.perf_counter() - started),
    }


@torch.inference_mode()
def _embed(model: Any, token_ids: list[list[int]]) -> NDArray[np.float32]:
    ids = torch.tensor(token_ids)
    hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    embeddings: NDArray[np.float32] = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1).numpy()
    return embeddings


def encoder_in_sixteens() -> Encode:
    """Return what `MentionEncoder` did before: batches of 16 forms of equal length, each computed by all threads."""
    tokenizer = AutoTokenizer.from_pretrained(MENTION_ENCODER)
    model = AutoModel.from_pretrained(MENTION_ENCODER, dtype=torch.float32).eval()

    def encode(forms: list[str]) -> NDArray[np.float32]:
        token_ids = tokenizer(forms, split_special_tokens=True)["input_ids"]
        rows_of_length = defaultdict(list)
        for row, ids in enumerate(token_ids):
            rows_of_length[len(ids)].append(row)
        embeddings = np.zeros((len(forms), model.config.hidden_size), np.float32)
        for rows in rows_of_length.values():
            for start in range(0, len(rows), FORMS_PER_BATCH):
                batch = rows[start : start + FORMS_PER_BATCH]
                filled = [token_ids[row] for row in batch + batch[-1:] * (FORMS_PER_BATCH - len(batch))]
                embeddings[batch] = _embed(model, filled)[: len(batch)]
        return embeddings

    return encode
