"""What a finished run still says of its mentions after its knowledge base has changed.

    OUTPUT/_changes/changes.json            counts; written last
    OUTPUT/_changes/entities.parquet        ids of the entities that were retired or renamed
    OUTPUT/_changes/added_names/            prefix trie of the names that are new, where there are any

A row is linked in full where the changes touch it: one of its candidates was retired or renamed, or the search behind
it proved too little. Every other row keeps what was proved of the names that there were; what remains to be seen is
whether one of the added names is better. Nothing here knows Ray or a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
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
from gemel_engine.pipeline.output import differences, load_claim
from gemel_engine.storage import parquet
from gemel_engine.types import PREDICTION_SCHEMA

_REMEDY = "put it back, or link without previous"
# In these settings and artifacts a run may differ from the one that it carries on.
_MAY_DIFFER = ("knowledge_base", "previous", "calibration")


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRun:
    """A finished run that another one carries on: the same in everything but its knowledge base.

    Attributes:
        output: Its output.
        changes: Where the run that carries it on keeps what has changed.
        num_to_certify: Best names of a row that have to be proved for it not to be linked in full.
    """

    output: str
    changes: str
    num_to_certify: int

    @classmethod
    def of(cls, config: LinkConfig) -> Self | None:
        """The run that a run carries on, if it does."""
        if config.previous is None:
            return None
        num_to_certify = config.search.num_to_certify
        return cls(output=config.previous, changes=f"{config.output}/_changes", num_to_certify=num_to_certify)

    def identity(self) -> str:
        """Differs for another run at the same address.

        Raises:
            InputError: This is not the output of a finished run.
        """
        for name in ("_run.json", "report.json"):
            if not storage.exists(f"{self.output}/{name}"):
                raise InputError(f"{shown(self.output)} has no {name}: name the output of a run that has finished")
        return hashlib.sha256(storage.read_bytes(f"{self.output}/_run.json")).hexdigest()

    def report(self) -> dict[str, Any]:
        """Its `report.json`."""
        return dict(storage.read_json(f"{self.output}/report.json", _REMEDY))

    def check(self, identity: Mapping[str, Any]) -> None:
        """See that a run can carry this one on.

        Args:
            identity: What makes up the run: settings, input files, artifacts.

        Raises:
            ArtifactError: The knowledge base of this run is not there any more.
            ConfigurationError: The run differs from this one in more than its knowledge base.
        """
        before = self._run()
        if found := differences(_comparable(before), _comparable(json.loads(json.dumps(identity)))):
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
        """Compare this run's knowledge base with that of the run which carries it on, unless that was done before."""
        from gemel_engine.knowledge_base.update import open_knowledge_base

        if not storage.exists(f"{self.changes}/changes.json"):
            before = open_knowledge_base(self._run()["settings"]["knowledge_base"], verify=True)
            KnowledgeBaseChanges.between(before, open_knowledge_base(knowledge_base, verify=True)).save(self.changes)

    def counts(self) -> dict[str, int]:
        """`num_changed_entities` and `num_added_names`."""
        return dict(storage.read_json(f"{self.changes}/changes.json", "remove it and run the same command again"))

    def added_names(self) -> Path | None:
        """A local directory of the prefix trie of the added names; None if there are none."""
        if not self.counts()["num_added_names"]:
            return None
        return storage.download_directory(f"{self.changes}/added_names")

    def attach(self, mentions: pa.Table, shard: Shard) -> pa.Table:
        """Add to a shard's rows what this run says of them.

        Args:
            mentions: All rows of the shard in their order, with `mention_id` and, where the corpus has them,
                `candidate_ids`.
            shard: A shard of the run that carries this one on; this one's shards are the same.

        Returns:
            The rows with `previous`, a row of `PREDICTION_SCHEMA` or null where it is to be linked in full, and
            `is_settled`: no added name has to be looked for either.

        Raises:
            InputError: This run's shard is damaged or missing, or is of other rows.
        """
        uri = f"{self.output}/data/{shard.name}.parquet"
        try:
            stored = parquet.from_bytes(storage.read_bytes(uri), uri)
        except (OSError, InputError) as error:
            raise InputError(f"{shown(uri)} is missing or damaged ({error}): link without previous") from error
        ids = mentions["mention_id"].cast(pa.string())
        if stored.schema != PREDICTION_SCHEMA or not stored["mention_id"].equals(ids):
            raise InputError(f"{shown(uri)} has not the predictions of the rows of {shard.name}: link without previous")
        changes = f"{self.changes}/entities.parquet"
        changed = parquet.from_bytes(storage.read_bytes(changes), changes)["entity_id"]
        candidates = pc.struct_field(pc.list_flatten(stored["candidates"]), "entity_id")
        is_touched = _has_any(stored["candidates"], candidates, changed)
        has_candidates = np.zeros(len(stored), bool)
        if "candidate_ids" in mentions.column_names:
            column = mentions["candidate_ids"]
            has_candidates = column.is_valid().to_numpy()
            is_touched |= _has_any(column, pc.list_flatten(column), changed)
        is_proved = pc.fill_null(pc.greater_equal(stored["num_certified"], self.num_to_certify), False).to_numpy()
        carries_on = is_proved & ~is_touched
        is_settled = carries_on & (has_candidates | (self.counts()["num_added_names"] == 0))
        place = pa.array(np.arange(len(stored)), mask=~carries_on)
        nullable = pa.schema([field.with_nullable(True) for field in PREDICTION_SCHEMA])
        mentions = mentions.append_column("previous", stored.cast(nullable).to_struct_array().take(place))
        return mentions.append_column("is_settled", pa.array(is_settled))

    def _run(self) -> dict[str, Any]:
        run = load_claim(self.output)
        if missing := {"settings", "plan", "artifacts"} - run.keys():
            raise InputError(f"{shown(f'{self.output}/_run.json')} lacks {', '.join(sorted(missing))}: {_REMEDY}")
        return run


def _has_any(lists: pa.ChunkedArray, values: pa.ChunkedArray, wanted: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Whether each of the lists holds a wanted value; `values` are those of all lists, one after another."""
    wanted_values = wanted.combine_chunks().cast(values.type)
    rows = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
    found: NDArray[np.bool_] = np.zeros(len(lists), bool)
    found[rows[pc.is_in(values, wanted_values).to_numpy()]] = True
    return found


def _comparable(run: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same in a run and in one that carries it on."""
    parts = {
        part: {key: run[part][key] for key in run[part] if key not in _MAY_DIFFER} for part in ("settings", "artifacts")
    }
    return {**parts, "input files": run["plan"]}
