"""Generators that rank in other ways than the linker whose parts they take."""

from __future__ import annotations

from dataclasses import replace

from gemel_engine.config.components import SearchSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.generator import Artifacts, EntityNameGenerator
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.linker import Linker


def with_weights(
    linker: Linker, weights: ScoreWeights | None, risk: float = 0.0, search: SearchSettings | None = None
) -> EntityNameGenerator:
    """Return the generator of a linker with other weights; None: the language model ranks alone."""
    config = linker.config
    return EntityNameGenerator(
        linker.generator.artifacts,
        linker.generator.engine,
        config.prompt,
        search or config.search,
        max_in_flight=config.language_model.max_num_seqs,
        weights=weights,
        risk=risk,
    )


def by_evidence(
    config: LinkConfig, artifacts: Artifacts, weights: ScoreWeights, calibration: Calibration | None = None
) -> EntityNameGenerator:
    """Return a generator without an engine: evidence is certain enough at any probability."""
    return EntityNameGenerator(
        artifacts,
        None,  # type: ignore[arg-type]
        config.prompt,
        config.search,
        calibration=calibration,
        weights=replace(weights, risks=((0.0, 0.0),)),
        risk=1.0,
    )


def computed_tokens(engine: RolloutEngine) -> int:
    """Return the number of prompt tokens so far that were in no cache."""
    return engine.cache_statistics.num_prompt_tokens - engine.cache_statistics.num_cached_tokens
