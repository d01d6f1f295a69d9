"""What a language model adds to evidence, by model, prompt and correction of its log-probs.

python benchmarks/model_share.py DATA MODEL... --mention-encoder MODEL [--settings "num_cards=0 num_own_cards=0" ...]

DATA and the indexes are those of `benchmarks/cards.py`. On the fifth of WikiDiverse dev that evidence is least sure of,
each MODEL gives the log-probs of the best six candidates by evidence, after prompts of these settings of retrieval.
Weights of a conditional logit are fitted to four fifths of the surface forms and judged on the fifth that is left out.
Corrections are the length of the name in tokens and the model's own bias: its log-prob of the name after an empty
question. Log-probs are kept in `build/model_share`; results go to `benchmarks/results/model_share.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from cards import WORK as CARDS
from cards import prepare
from models import prompt
from numpy.typing import NDArray
from record import record
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from gemel_engine.assembly import open_artifacts
from gemel_engine.config.components import EngineSettings, RetrievalSettings, SearchSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.generator import EntityNameGenerator
from gemel_engine.evaluation.fit_score import LabelledPools, conditional_logit
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.evidence.weights import ScoreWeights, bonuses_of, softmax
from gemel_engine.tokenizer import encode_text, load_tokenizer
from gemel_engine.types import Mention

RESULTS = Path("benchmarks/results/model_share.json")
WORK = Path("build/model_share")
NUM_CANDIDATES = 6
COLUMNS = ("evidence", "log_prob", "length", "bias")

logger = logging.getLogger("model_share")


@dataclass(frozen=True, slots=True)
class Asked:
    """A mention with its best candidates by evidence: rows, names and bonuses (N,), and the place of the right one."""

    mention: Mention
    retrieved: Retrieved
    rows: list[int]
    names: list[str]
    bonuses: NDArray[np.float64]
    certainty: float
    gold: int


class NameScorer:
    """Log-probs of names after a prompt, by a model of transformers in float32."""

    def __init__(self, model: Path, generator: EntityNameGenerator) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = loaded.eval()
        self._generator = generator

    @torch.inference_mode()
    def log_probs(self, token_ids: Sequence[int], names: Sequence[str]) -> list[float]:
        """Log-prob of each name, its terminator included, after the tokens of a prompt."""
        ends = self._generator.terminator
        tokens = [[*encode_text(self._generator.artifacts.tokenizer, name), ends] for name in names]
        output = self._model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
        first = output.logits[0, -1].log_softmax(-1)
        output.past_key_values.batch_repeat_interleave(len(names))
        inputs = torch.zeros(len(names), max(map(len, tokens)) - 1, dtype=torch.long)
        for row, of_name in enumerate(tokens):
            inputs[row, : len(of_name) - 1] = torch.tensor(of_name[:-1])
        others = self._model(inputs, past_key_values=output.past_key_values).logits.log_softmax(-1)
        return [
            float(first[of_name[0]] + sum(others[row, place, token] for place, token in enumerate(of_name[1:])))
            for row, of_name in enumerate(tokens)
        ]


def main(
    data: tyro.conf.Positional[Path],
    models: tyro.conf.Positional[tuple[Path, ...]],
    *,
    mention_encoder: str,
    settings: tuple[str, ...] = ("num_cards=3 num_own_cards=0", "num_cards=0 num_own_cards=0"),
) -> None:
    """Measure each model with each of the settings.

    Args:
        data: Directory of the corpus.
        models: Local directories of language models.
        mention_encoder: Local directory, or name on the model hub.
        settings: Settings of retrieval, each as `name=value` pairs with spaces.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    prepare(data, str(models[0]), mention_encoder)
    command = f"python benchmarks/model_share.py DATA {' '.join(map(str, models))} --mention-encoder {mention_encoder}"
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in models:
        for text in settings:
            generator, asked = least_sure(data, model, mention_encoder, text)
            values = judged(asked, *scored(model, text, generator, asked))
            what = (
                f"the {len(asked)} mentions of WikiDiverse dev that evidence is least sure of, text only, {model.name}"
            )
            results[f"{model.name}: {text}"] = record(values, f'{command} --settings "{text}"', what)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            logger.info("%s: %s %s", model.name, text, json.dumps(values, indent=1))


def least_sure(data: Path, model: Path, mention_encoder: str, text: str) -> tuple[EntityNameGenerator, list[Asked]]:
    """The fifth of dev whose best candidate is least probable by evidence, and what makes the prompts of a model."""
    config = LinkConfig(
        input=str(data / "dev.parquet"),
        output=str(WORK / "linked"),
        knowledge_base=str(CARDS / "knowledge_base"),
        demonstrations=str(CARDS / "demonstrations"),
        language_model=EngineSettings(name="build/models/smollm2-135m"),
        retrieval=RetrievalSettings(mention_encoder=mention_encoder),
    )
    artifacts = open_artifacts(config)
    changes = {name: int(value) for name, value in (pair.split("=") for pair in text.split())}
    retrieval = RetrievalSettings(**{**asdict(config.retrieval), **changes})
    rows = pq.read_table(data / "dev.parquet").to_pylist()
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
    retriever = Retriever(retrieval, artifacts.knowledge_base, artifacts.index, artifacts.evidence)
    retrieved = retriever.retrieve(mentions, [None] * len(mentions))
    weights, knowledge_base = ScoreWeights.open(), artifacts.knowledge_base
    asked = []
    for row, mention, found in zip(rows, mentions, retrieved, strict=True):
        pool, reasons = [item.row for item in found.candidates], [item.reasons for item in found.candidates]
        bonuses = bonuses_of(mention.mention, pool, reasons, weights, knowledge_base)
        best = list(bonuses)[:NUM_CANDIDATES]
        ids = [knowledge_base.entity_id(number) for number in best]
        asked.append(
            Asked(
                mention,
                found,
                best,
                [knowledge_base.entity(number).name for number in best],
                np.array([bonuses[number] for number in best]),
                float(softmax(np.array(list(bonuses.values()))).max()) if bonuses else 0.0,
                ids.index(row["entity_id"]) if row["entity_id"] in ids else -1,
            )
        )
    asked = [item for item in sorted(asked, key=lambda item: item.certainty)[: len(rows) // 5] if item.rows]
    own = replace(artifacts, tokenizer=load_tokenizer(str(model)))
    return EntityNameGenerator(own, None, prompt(model), SearchSettings()), asked  # type: ignore[arg-type]


def scored(
    model: Path, text: str, generator: EntityNameGenerator, asked: Sequence[Asked]
) -> tuple[list[list[float]], dict[str, float]]:
    """Log-probs of the candidates of each mention, and those of all names after an empty question."""
    path, own = WORK / f"{model.name} {text}.json", WORK / f"{model.name} bias.json"
    known: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    bias: dict[str, float] = json.loads(own.read_text()) if own.exists() else {}
    missing = [item for item in asked if item.mention.mention_id not in known]
    unasked = sorted({name for item in asked for name in item.names} - bias.keys())
    if missing or unasked:
        scorer = NameScorer(model, generator)
        for number, item in enumerate(tqdm(missing, desc=f"{model.name}: {text}")):
            tokens = generator.prompt(item.mention, None, item.retrieved)[0].token_ids
            known[item.mention.mention_id] = scorer.log_probs(tokens, item.names)
            if number % 20 == 0 or number == len(missing) - 1:
                path.write_text(json.dumps(known))
        question = generator.prompt(Mention("", "", ""), None, Retrieved())[0].token_ids
        for start in range(0, len(unasked), 16):
            names = unasked[start : start + 16]
            bias |= dict(zip(names, scorer.log_probs(question, names), strict=True))
        own.write_text(json.dumps(bias))
    return [known[item.mention.mention_id] for item in asked], bias


def judged(asked: Sequence[Asked], log_probs: Sequence[list[float]], bias: dict[str, float]) -> dict[str, Any]:
    """Accuracy, likelihood and weights with each combination of evidence, log-prob and corrections."""
    starts = np.concatenate([[0], np.cumsum([len(item.rows) for item in asked])])
    pools = LabelledPools(
        np.column_stack(
            [
                joined(item.bonuses for item in asked),
                joined(log_probs),
                joined([len(name) for name in item.names] for item in asked),
                -joined([bias[name] for name in item.names] for item in asked),
            ]
        ),
        joined(log_probs),
        starts,
        np.array([-1 if item.gold < 0 else start + item.gold for item, start in zip(asked, starts, strict=False)]),
        np.unique([item.mention.mention for item in asked], return_inverse=True)[1],
    )
    combinations = (("evidence",), COLUMNS[:2], COLUMNS[:3], (*COLUMNS[:2], "bias"))
    values: dict[str, Any] = {"mentions": len(asked), "model alone": right(pools.log_probs, pools)}
    for chosen in combinations:
        of_chosen = replace(pools, features=pools.features[:, [COLUMNS.index(name) for name in chosen]])
        weights = fit(of_chosen).round(4).tolist()
        values[", ".join(chosen)] = {**left_out(of_chosen), "weights": dict(zip(chosen, weights, strict=True))}
    return values


def joined(parts: Iterable[Sequence[float] | NDArray[np.float64]]) -> NDArray[np.float64]:
    """The values of all candidates, (N,)."""
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def fit(pools: LabelledPools) -> NDArray[np.float64]:
    """Weights of a conditional logit without a penalty."""
    return conditional_logit(pools.features, pools.starts, pools.gold, penalty=0.0)


def left_out(pools: LabelledPools) -> dict[str, float]:
    """Accuracy, and the mean log-likelihood of right candidates, by weights fitted without the surface form."""
    scores, spans = np.empty(len(pools.features)), [slice(*span) for span in pairwise(pools.starts)]
    for fold in np.unique(pools.folds):
        weights = fit(pools.select(np.flatnonzero(pools.folds != fold)))
        for number in np.flatnonzero(pools.folds == fold):
            scores[spans[number]] = pools.features[spans[number]] @ weights
    likelihoods = [
        scores[place] - np.logaddexp.reduce(scores[span])
        for span, place in zip(spans, pools.gold, strict=True)
        if place >= 0
    ]
    return {"accuracy": right(scores, pools), "log_likelihood": round(float(np.mean(likelihoods)), 4)}


def right(scores: NDArray[np.float64], pools: LabelledPools) -> float:
    """Share of mentions whose best candidate is the right one."""
    best = [start + scores[start:end].argmax() for start, end in pairwise(pools.starts)]
    return round(float(np.mean(np.array(best) == pools.gold)), 4)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)
