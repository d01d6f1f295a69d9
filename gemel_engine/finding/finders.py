"""Opens the finder that a configuration names."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gemel_engine import storage
from gemel_engine.config.finding import FindConfig
from gemel_engine.evidence.normal_form import without_qualifier
from gemel_engine.evidence.update import open_knowledge_base
from gemel_engine.finding.base import MentionFinder
from gemel_engine.finding.dictionary import FORMAT_VERSION, DictionaryFinder, TrainingText, lower_case_words
from gemel_engine.fingerprints import Contents, check_content, checkpoint_fingerprint, read_manifest_at
from gemel_engine.knowledge_base.store import MANIFEST as KNOWLEDGE_BASE_MANIFEST
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import MANIFEST as INDEX_MANIFEST
from gemel_engine.retrieval.index import DemonstrationIndex

_CHUNK = 1 << 14  # entities that are read at once


def finder_contents(config: FindConfig) -> Contents:
    """Return the fingerprint of the model, or the manifests of what the dictionary is made of.

    Raises:
        ArtifactError: A model or artifact is missing or damaged.
    """
    if config.finder.model is not None:
        return {"finder_model": checkpoint_fingerprint(config.finder.model, "token-classification model")}
    manifests = {
        "knowledge_base": config.knowledge_base and f"{config.knowledge_base}/{KNOWLEDGE_BASE_MANIFEST}",
        "demonstrations": config.demonstrations and f"{config.demonstrations}/{INDEX_MANIFEST}",
    }
    return {name: read_manifest_at(uri) for name, uri in manifests.items() if uri}


def open_finder(config: FindConfig, contents: Contents) -> MentionFinder:
    """Load the model, or open the dictionary, which each node makes once.

    Args:
        config: The search.
        contents: `finder_contents` at the start of the run.

    Raises:
        ArtifactError: A model or artifact is missing, damaged, or not that of the start.
        ConfigurationError: The model lacks a label.
    """
    addresses = {
        "finder_model": config.finder.model,
        "knowledge_base": config.knowledge_base,
        "demonstrations": config.demonstrations,
    }
    for name, found in finder_contents(config).items():
        check_content(contents, name, addresses[name], found)
    settings = config.finder
    if settings.model is not None:
        from gemel_engine.finding.tagger import TaggerFinder  # loads torch

        return TaggerFinder(settings.model, settings.labels, device=settings.device, batch_size=settings.batch_size)
    depends_on = [FORMAT_VERSION, contents, settings.ignore_case, settings.min_prior]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]

    def make(directory: Path) -> None:
        build_dictionary(config, directory)

    directory = storage.made_once(storage.ARTIFACT_CACHE / f"forms-{digest}", make)
    return DictionaryFinder.open(directory, ignores_case=settings.ignore_case)


def build_dictionary(config: FindConfig, directory: Path) -> None:
    """Write the dictionary of a knowledge base and demonstrations, of which one may be missing."""
    knowledge_base = None if config.knowledge_base is None else open_knowledge_base(config.knowledge_base, verify=True)
    training = [] if config.demonstrations is None else _training_texts(config.demonstrations)

    def texts() -> Iterator[str]:
        yield from (item.text for item in training)
        if knowledge_base is not None:
            yield from _strings(knowledge_base, ("name", "aliases", "description"))

    def forms() -> Iterator[str]:
        if knowledge_base is not None:
            for form in _strings(knowledge_base, ("name", "aliases")):
                yield form
                yield without_qualifier(form)

    DictionaryFinder.build(
        directory,
        forms(),
        lower_case_words(texts()),
        training,
        min_prior=config.finder.min_prior,
        ignores_case=config.finder.ignore_case,
    )


def _training_texts(demonstrations: str) -> list[TrainingText]:
    index = DemonstrationIndex.open(storage.download_directory(demonstrations))
    mentions_of = defaultdict(set)
    for text, mention in zip(index.column("text"), index.column("mention"), strict=True):
        mentions_of[text].add(mention)
    return [TrainingText(text, frozenset(mentions)) for text, mentions in mentions_of.items()]


def _strings(knowledge_base: KnowledgeBase, columns: tuple[str, ...]) -> Iterator[str]:
    """Yield the texts in some columns of a knowledge base's entities."""
    table = knowledge_base.table()
    for batch in table.select([name for name in columns if name in table.column_names]).to_batches(_CHUNK):
        for column in batch.columns:
            for value in column.to_pylist():
                yield from (value,) if isinstance(value, str) else value or ()
