"""Incremental runs: which predictions of a previous run stay valid after a knowledge base update.

    OUTPUT/_changes/changes.json            counts; written last
    OUTPUT/_changes/entities.parquet        ids of the entities that were retired, renamed or edited
    OUTPUT/_changes/added_names/            prefix trie of the added names, if there are any

A row is linked in full if one of its candidates was retired or renamed, if the previous search
certified too few names, or if its prompt has other demonstrations or cards than before. Every other
row keeps what was proved about the old names; only the added names are searched for a better one.

A row by the score is ranked again by the weights and the evidence of now, if no name was added. It
is linked in full if the log-probs and the mass that it states do not prove the new order. This
module uses neither Ray nor a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, shown
from gemel_engine.knowledge_base.changes import KnowledgeBaseChanges
from gemel_engine.knowledge_base.store import MANIFEST
from gemel_engine.pipeline.corpus import Shard
from gemel_engine.pipeline.identity import incremental_differences
from gemel_engine.pipeline.output import RunDirectory, has_predictions, load_claim
from gemel_engine.storage import parquet
from gemel_engine.types import CARD_PREFIX, PREDICTION_SCHEMA

_REMEDY = "put it back, or link without previous"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousRun:
    """The finished run that an incremental run starts from.

    Only the knowledge base, its evidence and the calibration may differ.

    Attributes:
        output: Output directory of the previous run.
        changes: Directory in the output of the incremental run for the knowledge base changes.
        num_to_certify: Number of certified names that a row needs; a row with fewer is linked in
            full.
        ranks_by_mean: Whether the language model's names are ranked by the mean; such rows are
            linked in full, since any added name may change their order.
    """

    output: str
    changes: str
    num_to_certify: int
    ranks_by_mean: bool = False

    @classmethod
    def of(cls, config: LinkConfig) -> Self | None:
        """Return the previous run of an incremental run, None for any other run."""
        if config.previous is None:
            return None
        search = config.search
        return cls(
            output=config.previous,
            changes=RunDirectory(config.output).changes,
            num_to_certify=search.num_to_certify,
            ranks_by_mean=(search.ranking, search.objective) == ("mean", "sum"),
        )

    def identity(self) -> str:
        """Return a hash of the previous run's claim; it changes if another run replaces the output.

        Raises:
            InputError: The directory is not the output of a finished run.
        """
        directory = RunDirectory(self.output)
        for uri in (directory.claim, directory.report):
            if not storage.exists(uri):
                name = uri.rpartition("/")[2]
                raise InputError(f"{shown(self.output)} has no {name}: name the output of a run that has finished")
        return hashlib.sha256(storage.read_bytes(directory.claim)).hexdigest()

    def report(self) -> dict[str, Any]:
        """Return the `_report.json` of the previous run."""
        return dict(storage.read_json(RunDirectory(self.output).report, _REMEDY))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise if an incremental run cannot start from the previous run.

        Args:
            identity: `run_identity` of the incremental run.

        Raises:
            ArtifactError: The knowledge base of the previous run is missing or was replaced.
            ConfigurationError: The runs differ in more than may differ.
        """
        before = self._run()
        if found := incremental_differences(before, identity):
            raise ConfigurationError(
                f"{shown(self.output)} is of a run that differs in {', '.join(found)}, and not in its knowledge base "
                "alone: use the settings and the input of that run, or leave previous out"
            )
        address = before["settings"]["knowledge_base"]
        manifest = f"{address}/{MANIFEST}"
        if (
            not storage.exists(manifest)
            or storage.read_json(manifest, _REMEDY) != before["artifacts"]["knowledge_base"]
        ):
            raise ArtifactError(
                f"the knowledge base {shown(address)} of the run {shown(self.output)} is not there any more, so that "
                "nobody knows what has changed: put it back, or leave previous out"
            )

    def note_changes(self, knowledge_base: str) -> None:
        """Compare the previous knowledge base with `knowledge_base` and save the changes, once."""
        from gemel_engine.evidence.index import changed_pictures
        from gemel_engine.evidence.update import open_knowledge_base

        if not storage.exists(f"{self.changes}/changes.json"):
            before = open_knowledge_base(self._run()["settings"]["knowledge_base"], verify=True)
            after = open_knowledge_base(knowledge_base, verify=True)
            changes = KnowledgeBaseChanges.between(before, after)
            edited = pa.concat_arrays([changes.edited_ids, changed_pictures(before, after)])
            replace(changes, edited_ids=edited).save(self.changes)

    def counts(self) -> dict[str, int]:
        """Return `num_changed_entities` and `num_added_names`."""
        return dict(storage.read_json(f"{self.changes}/changes.json", "remove it and run the same command again"))

    def added_names(self) -> Path | None:
        """Return a local directory with the prefix trie of the added names, None without any."""
        if not self.counts()["num_added_names"]:
            return None
        return storage.download_directory(f"{self.changes}/added_names")

    def attach(self, mentions: pa.Table, shard: Shard) -> pa.Table:
        """Add the previous predictions to the rows of a shard.

        Args:
            mentions: All rows of the shard in their order, with `mention_id` and, if the corpus has
                them, `candidate_ids`.
            shard: The shard; both runs have the same shards.

        Returns:
            The rows with two more columns: `previous`, a row of `PREDICTION_SCHEMA`, null if the
            mention must be linked in full; and `keeps_previous`, whether that prediction stays
            valid without a search of the added names.

        Raises:
            InputError: The previous shard is damaged or missing, or contains other rows.
        """
        uri = RunDirectory(self.output).shard(shard.name)
        try:
            stored = parquet.from_bytes(storage.read_bytes(uri), uri)
        except (OSError, InputError) as error:
            raise InputError(f"{shown(uri)} is missing or damaged ({error}): link without previous") from error
        ids = mentions["mention_id"].cast(pa.string())
        if not has_predictions(stored.schema) or not stored["mention_id"].equals(ids):
            raise InputError(f"{shown(uri)} has not the predictions of the rows of {shard.name}: link without previous")
        changes = f"{self.changes}/entities.parquet"
        found = parquet.from_bytes(storage.read_bytes(changes), changes)
        changed = found["entity_id"].filter(pc.invert(found["is_edited"]))
        candidates = pc.struct_field(pc.list_flatten(stored["candidates"]), "entity_id")
        is_touched = _has_any(stored["candidates"], candidates, changed)
        cards = pc.binary_join_element_wise(CARD_PREFIX, found["entity_id"].cast(pa.string()), "")
        is_touched |= _has_any(stored["demonstration_ids"], pc.list_flatten(stored["demonstration_ids"]), cards)
        has_candidates = np.zeros(len(stored), bool)
        if "candidate_ids" in mentions.column_names:
            column = mentions["candidate_ids"]
            has_candidates = column.is_valid().to_numpy()
            is_touched |= _has_any(column, pc.list_flatten(column), changed)
        is_proved = pc.fill_null(pc.greater_equal(stored["num_certified"], self.num_to_certify), False).to_numpy()
        is_by_model, is_by_score = (
            pc.fill_null(pc.equal(stored["decided_by"], kind), False).to_numpy() for kind in ("language_model", "score")
        )
        has_all_names = has_candidates | (self.counts()["num_added_names"] == 0)
        can_use = (is_proved & is_by_model & (not self.ranks_by_mean)) | (is_by_score & has_all_names)
        uses_previous = ~is_touched & can_use
        keeps_previous = uses_previous & has_all_names
        place = pa.array(np.arange(len(stored)), mask=~uses_previous)
        nullable = pa.schema([field.with_nullable(True) for field in PREDICTION_SCHEMA])
        stored = stored.select(PREDICTION_SCHEMA.names)
        mentions = mentions.append_column("previous", stored.cast(nullable).to_struct_array().take(place))
        return mentions.append_column("keeps_previous", pa.array(keeps_previous))

    def _run(self) -> dict[str, Any]:
        run = load_claim(self.output)
        if missing := {"settings", "plan", "artifacts"} - run.keys():
            raise InputError(f"{shown(RunDirectory(self.output).claim)} lacks {', '.join(sorted(missing))}: {_REMEDY}")
        return run


def _has_any(lists: pa.ChunkedArray, values: pa.ChunkedArray, wanted: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Return whether each list contains a wanted value; `values` are the concatenated lists."""
    wanted_values = wanted.combine_chunks().cast(values.type)
    rows = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
    found: NDArray[np.bool_] = np.zeros(len(lists), bool)
    found[rows[pc.is_in(values, wanted_values).to_numpy()]] = True
    return found
