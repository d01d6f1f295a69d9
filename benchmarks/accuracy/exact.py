"""Certified answers by the score against the score of every entity.

    python -m benchmarks.accuracy exact DATA [--num-mentions 30]

An hour on two cores: transformers reads the 7,642 names behind each prompt. The weights are those of the
package, and the language model is asked for every mention. Figures go to `benchmarks/results/score.json`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.accuracy.ranking import with_weights
from benchmarks.corpora import in_order, mentions_of, read_rows, wikidiverse
from benchmarks.decoding.exact import score_all_names
from benchmarks.record import ResultFile
from gemel_engine.config.components import ScoreSettings
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.weights import ScoreWeights, bonuses_of
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.linker import Linker

logger = logging.getLogger("benchmarks")


def main(data: tyro.conf.Positional[Path], *, num_mentions: int = 30) -> None:
    """Language model and evidence: compare certified answers with brute force.

    Args:
        data: Directory of WikiDiverse.
        num_mentions: Number of mentions, a fixed sample of dev.
    """
    linker = Linker(replace(wikidiverse(data), score=ScoreSettings(kind="language_model")))
    weights, artifacts = ScoreWeights.open(), linker.generator.artifacts
    generator = with_weights(linker, weights)
    mentions = mentions_of(in_order(read_rows(data / "dev.parquet", num_mentions)))
    features = [None] * len(mentions)
    _, retrieved = linker.prepare(mentions, features)
    predictions = generator.generate(mentions, features, retrieved)
    settings, trie = linker.config.language_model, artifacts.knowledge_base.trie
    model = FrozenLanguageModel(settings.name, settings.dtype)
    num_certified, num_equal, largest = 0, 0, 0.0
    for mention, found, prediction in zip(mentions, retrieved, predictions, strict=True):
        if not prediction.certified:
            continue
        prompt = generator.prompt(mention, None, found)[0].token_ids
        log_probs = score_all_names(model, prompt, trie, generator.terminator)
        scores = scores_of_all(log_probs, mention.mention, found, weights, artifacts.knowledge_base)
        best = int(scores.argmax())
        assert prediction.entity_id is not None, "a certified answer has one"
        row = artifacts.knowledge_base.row_of_entity(prediction.entity_id)
        num_certified += 1
        num_equal += row == best
        largest = max(largest, abs(float(scores[best]) - (prediction.score or 0.0)))
        answer = prediction.entity_name, prediction.score
        logger.info("%s: %s %s, brute force %.4f", mention.mention, *answer, scores[best])
    what = f"WikiDiverse dev, {len(mentions)} mentions, all {trie.num_names} names scored by transformers, float32"
    values = {
        "certified_answers_equal_to_brute_force": f"{num_equal} of {num_certified}",
        "largest_difference_of_scores": largest,
    }
    ResultFile("score", {"DATA": data}).note(values, what)


def scores_of_all(
    log_probs: NDArray[np.float64], form: str, found: Retrieved, weights: ScoreWeights, knowledge_base: KnowledgeBase
) -> NDArray[np.float64]:
    """Return the score of every entity, (entities,), from the log-prob of every name."""
    scores = np.empty(knowledge_base.num_entities)
    for name, log_prob in enumerate(log_probs.tolist()):
        scores[list(knowledge_base.entities_of_name(name))] = weights.language_model * log_prob
    rows, reasons = [item.row for item in found.candidates], [item.reasons for item in found.candidates]
    for row, bonus in bonuses_of(form, rows, reasons, weights, knowledge_base).items():
        scores[row] += bonus
    return scores
