"""One factor at a time: demonstrations, their choice and order, decoding, pictures.

python benchmarks/ablations.py WIKIDIVERSE [--corpora wikidiverse emoji] [--rows ...]

WIKIDIVERSE holds `train.parquet`, `dev.parquet` and `entities.parquet`. Needs what `make demo` and
`benchmarks/wikidiverse.py` build. Each row links the same mentions of a corpus' dev split with one thing changed, in a
process of its own. Rows that `benchmarks/results/ablations.json` has are skipped, so that the table can be made over
days; `make docs` writes it to `docs/results.md`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from decode_systems import Beams
from record import record, to_digits
from vllm import RequestOutput, SamplingParams
from wikidiverse import guesses

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.engines.vllm import VllmEngine
from gemel_engine.errors import MentionError
from gemel_engine.evaluation.judge import Measured
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.linker import Linker
from gemel_engine.types import Features, Mention

RESULTS = Path("benchmarks/results/ablations.json")
NUM_MENTIONS = 300
SEED = 0


@dataclass(frozen=True, slots=True)
class Row:
    """What a row changes of `base`: settings of the linking run, or something that no setting does.

    Attributes:
        settings: Overrides of the configuration.
        change: What `answers` does otherwise.
        against: The row that it is compared with.
    """

    settings: tuple[str, ...] = ()
    change: str | None = None
    against: str = "base"


@dataclass(frozen=True, slots=True)
class Answers:
    """What a system answered, and what that took: None where it has no such thing.

    Attributes:
        right: Whether each mention's answer is right.
        certified_share: Share of answers that are proved to be the best.
        rollouts: A mention's, on average.
        prompt_tokens: Tokens of prompts that were computed for a mention, on average.
    """

    right: list[bool]
    certified_share: float | None = None
    rollouts: float | None = None
    prompt_tokens: float | None = None


_DEMONSTRATIONS = {
    "1 demonstration": Row(("--retrieval.num-demonstrations", "1")),
    "4 demonstrations": Row(("--retrieval.num-demonstrations", "4")),
    "16 demonstrations": Row(("--retrieval.num-demonstrations", "16")),
    "most similar first": Row(change="most similar first"),
    "retrieved by surface form and sentence": Row(change="by sentence"),
}
_DECODING = {
    "one rollout": Row(("--search.max-rollouts", "1")),
    "ranked by the mean": Row(("--search.ranking", "mean")),
    "mean of log-probs": Row(("--search.objective", "mean")),
    "end-of-text token ends a name": Row(("--prompt.terminator", "eos")),
    "greedy without the trie": Row(change="free"),
    "beam search, 5 beams, mean": Row(change="beams", against="ranked by the mean"),
}
_BASE = ("--search.ranking", "objective")  # the default when the table was begun, and until it showed a better one
_NO_REPEATED = ("--retrieval.num-similar-pictures", "0")
ROWS: dict[str, dict[str, Row]] = {
    "wikidiverse": {
        "no model": Row(change="no model"),
        "base": Row(),
        "0 demonstrations": Row(("--retrieval.num-demonstrations", "0")),
        "random demonstrations": Row(("--retrieval.policy", "random")),
        **_DEMONSTRATIONS,
        **_DECODING,
        "16 demonstrations, ranked by the mean": Row(
            ("--retrieval.num-demonstrations", "16", "--search.ranking", "mean"), against="ranked by the mean"
        ),
    },
    "emoji": {
        "no model": Row(change="no model"),
        "base": Row(),
        "no pictures": Row(
            ("--vision.feature-mapper", "None", "--vision.image-encoder", "None", *_NO_REPEATED), "no pictures"
        ),
        "pictures shuffled among the mentions": Row(change="shuffled"),
        "demonstrations without their pictures": Row(("--prompt.no-demonstration-pictures",)),
        "none repeated for its picture": Row(_NO_REPEATED),
        "0 demonstrations": Row(("--retrieval.num-demonstrations", "0", *_NO_REPEATED)),
        "random demonstrations": Row(
            ("--retrieval.policy", "random", *_NO_REPEATED), against="none repeated for its picture"
        ),
        **_DEMONSTRATIONS,
        "8 demonstrations": Row(("--retrieval.num-demonstrations", "8")),  # the base of the other corpus
        **_DECODING,
    },
}

logger = logging.getLogger("ablations")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus with the configuration that links it."""

    directory: Path
    config: Path

    def sample(self) -> list[dict[str, Any]]:
        """The same mentions of dev for every row, in the order in which the job links them."""
        rows = pq.read_table(self.directory / "dev.parquet").to_pylist()
        drawn = random.Random(SEED).sample(rows, NUM_MENTIONS)
        return sorted(drawn, key=lambda row: (row["mention"], row["mention_id"]))

    def digest(self) -> str:
        """Of the sample."""
        ids = [[item["mention_id"], item["entity_id"]] for item in self.sample()]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def main(
    wikidiverse: tyro.conf.Positional[Path],
    *,
    corpora: tuple[str, ...] = tuple(ROWS),
    rows: tuple[str, ...] = (),
) -> None:
    """Measure the rows that have no result yet.

    Args:
        wikidiverse: Directory of that corpus.
        corpora: Which corpora.
        rows: Which rows of their tables; all, if none is named.
    """
    corpus_of = {
        "wikidiverse": Corpus(wikidiverse, Path("build/wikidiverse/link.toml")),
        "emoji": Corpus(Path("examples/emoji"), Path("examples/emoji/link.toml")),
    }
    for name in corpora:
        for row in rows or tuple(ROWS[name]):
            results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if row in results.get(name, {}) or row not in ROWS[name]:
                continue
            if (corpora, rows) != ((name,), (row,)):  # in a process of its own: an engine keeps what it has taken
                command = [sys.executable, __file__, str(wikidiverse), "--corpora", name, "--rows", row]
                subprocess.run(command, check=True)
                continue
            found = noted(answers(corpus_of[name], ROWS[name][row]), name, row, corpus_of[name].digest())
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # others may have written meanwhile
            results.setdefault(name, {})[row] = found
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            logger.info("%s, %s: %.3f", name, row, results[name][row]["value"]["accuracy"])


def answers(corpus: Corpus, row: Row) -> Answers:
    """Link the sample as a row says."""
    sample = corpus.sample()
    gold = [item["entity_id"] for item in sample]
    mentions = [Mention(item["mention_id"], item["text"], item["mention"]) for item in sample]
    if row.change == "no model":
        return Answers(equal(guesses(corpus.directory, [mention.mention for mention in mentions]), gold))
    config = load_config(LinkConfig, corpus.config, (*_BASE, *row.settings))
    linker = Linker(config)
    pictures = [None if row.change == "no pictures" else item.get("image_bytes") for item in sample]
    encoded, retrieved = linker.prepare(mentions, pictures)
    features: list[Features | None] = [item for item in encoded if not isinstance(item, MentionError)]
    if row.change == "shuffled":
        random.Random(SEED).shuffle(features)
        retrieved = linker.retriever.retrieve(mentions, features)
    elif row.change == "most similar first":
        retrieved = [replace(found, shared=found.shared[::-1]) for found in retrieved]
    elif row.change == "by sentence":
        nearest = by_sentence(linker, mentions, config.retrieval.num_demonstrations)
        retrieved = [
            replace(found, shared=tuple(map(PromptItem, rows))) for rows, found in zip(nearest, retrieved, strict=True)
        ]
    if row.change == "free":
        names = free(linker, mentions, features, retrieved)
        name_of = names_of_entities(corpus)
        return Answers(equal(names, [name_of[entity_id] for entity_id in gold]))
    if row.change == "beams":
        inputs = zip(mentions, features, retrieved, strict=True)
        prompts = [linker.generator.prompt(*item)[0] for item in inputs]
        return Answers(equal(Beams(config.language_model, linker.generator).entity_ids(prompts), gold))
    predictions = linker.generator.generate(mentions, features, retrieved)
    statistics = linker.generator.engine.cache_statistics
    return Answers(
        equal([prediction.entity_id for prediction in predictions], gold),
        float(np.mean([prediction.certified for prediction in predictions])),
        float(np.mean([prediction.num_rollouts for prediction in predictions])),
        (statistics.num_prompt_tokens - statistics.num_cached_tokens) / len(mentions),
    )


def names_of_entities(corpus: Corpus) -> dict[str, str]:
    """The name of each entity."""
    entities = pq.read_table(corpus.directory / "entities.parquet", columns=["entity_id", "name"])
    return dict(zip(entities["entity_id"].to_pylist(), entities["name"].to_pylist(), strict=True))


def by_sentence(linker: Linker, mentions: Sequence[Mention], num_demonstrations: int) -> list[list[int]]:
    """The demonstrations whose surface form and text together are most similar, the most similar last."""
    index, retriever = linker.generator.artifacts.index, linker.retriever
    assert index is not None, "both corpora have demonstrations"
    assert retriever.encoder is not None, "they are retrieved"
    shown = [index[row] for row in range(len(index))]
    known = retriever.encoder.encode([f"{item.mention}: {item.text}" for item in shown])  # (N, E)
    asked = retriever.encoder.encode([f"{mention.mention}: {mention.text}" for mention in mentions])  # (B, E)
    nearest = np.argsort(-(asked @ known.T), axis=1, kind="stable")[:, :num_demonstrations][:, ::-1]
    rows: list[list[int]] = nearest.tolist()
    return rows


def free(
    linker: Linker,
    mentions: Sequence[Mention],
    features: Sequence[Features | None],
    retrieved: Sequence[Retrieved],
) -> list[str]:
    """What the language model writes without a trie, token by token the most probable."""
    generator, engine = linker.generator, linker.generator.engine
    assert isinstance(engine, VllmEngine), "the configurations' engine"
    stop = [generator.terminator]
    for number, inputs in enumerate(zip(mentions, features, retrieved, strict=True)):
        prompt, arguments = engine.prompts.input(generator.prompt(*inputs)[0], ())
        parameters = SamplingParams(
            temperature=0.0, max_tokens=40, stop_token_ids=stop, detokenize=False, extra_args=arguments
        )
        engine.llm_engine.add_request(str(number), prompt, parameters)
    names = [""] * len(mentions)
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            if output.finished:
                assert isinstance(output, RequestOutput)
                token_ids = list(output.outputs[0].token_ids)
                (text,) = generator.artifacts.tokenizer.batch_decode([token_ids], skip_special_tokens=True)
                names[int(output.request_id)] = text.strip()
    return names


def equal(found: Sequence[str | None], gold: Sequence[str]) -> list[bool]:
    """Whether each answer is right."""
    return [answer == right for answer, right in zip(found, gold, strict=True)]


def noted(found: Answers, corpus: str, row: str, digest: str) -> dict[str, Any]:
    """A row of the table with what made it; `right` has a digit for each mention, so that rows can be paired."""
    measured = Measured.of(found.right)
    value = {"accuracy": measured.value, "interval": [measured.low, measured.high], **asdict(found), "digest": digest}
    value["right"] = to_digits(found.right)
    command = f'python benchmarks/ablations.py WIKIDIVERSE --corpora {corpus} --rows "{row}"'
    return record(value, command, f"{NUM_MENTIONS} mentions of dev, seed {SEED}, float32")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)
