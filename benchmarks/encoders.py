"""How fast surface forms are embedded, against batches of 16 by all threads together, side by side in one process.

    python benchmarks/encoders.py WIKIDIVERSE [--num-forms 1000] [--num-rounds 5]

Both embed the same forms with the MiniLM of `examples/demo_models.py`, other forms in each round, and their turns
alternate; the medians are compared. Then the whole set, the distinct surface forms of the mentions and the names of the
entities, is embedded once.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from numpy.typing import NDArray
from record import record
from transformers import AutoModel, AutoTokenizer

from gemel_engine.retrieval.encoder import MentionEncoder

MODEL = "build/models/minilm"
RESULTS = Path("benchmarks/results/encoders.json")
FORMS_PER_BATCH = 16

Encode = Callable[[list[str]], NDArray[np.float32]]


def main(wikidiverse: Path, /, *, num_forms: int = 1000, num_rounds: int = 5) -> None:
    """Measure and write the results.

    Args:
        wikidiverse: Directory with `train.parquet`, `dev.parquet` and `entities.parquet`.
        num_forms: Forms of a round.
        num_rounds: Rounds.
    """
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    command = f"python benchmarks/encoders.py WIKIDIVERSE --num-forms {num_forms} --num-rounds {num_rounds}"
    value = measure_mention_encoder(surface_forms(wikidiverse), num_forms, num_rounds)
    results["mention_encoder"] = record(value, command, f"MiniLM in float32, {torch.get_num_threads()} threads")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    print(json.dumps(value, indent=2))


def surface_forms(wikidiverse: Path) -> list[str]:
    """The distinct surface forms and names, in random order."""
    columns = {"train": "mention", "dev": "mention", "entities": "name"}
    tables = (pq.read_table(wikidiverse / f"{file}.parquet", columns=[name]) for file, name in columns.items())
    forms = sorted({form for table in tables for form in table.column(0).to_pylist()})
    random.Random(0).shuffle(forms)
    return forms


def measure_mention_encoder(forms: list[str], num_forms: int, num_rounds: int) -> dict[str, Any]:
    """Forms per second of both ways, round by round, and of the whole set."""
    ways: dict[str, Encode] = {"before": encoder_in_sixteens(), "now": MentionEncoder(MODEL).encode}
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
    """What `MentionEncoder` did before: batches of 16 forms of equal length, each computed by all threads."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()

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


if __name__ == "__main__":
    tyro.cli(main)
