"""Runs the searches of many mentions over one engine."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gemel_engine.decoding.engines.base import Rollout, RolloutEngine, RolloutRequest
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.errors import GemelError

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result", covariant=True)

# Ids are never reused: an engine may still have requests of an interrupted call.
_request_ids = map(str, itertools.count())


class Search(Protocol[Result]):
    """The search for one mention: of names, or of entities."""

    def next_requests(self) -> Sequence[RolloutRequest]:
        """Return the next requests, no two of them equal."""

    def observe(self, request: RolloutRequest, rollout: Rollout) -> None:
        """Add the answer to a request."""

    @property
    def is_done(self) -> bool:
        """Whether no further rollout is needed or allowed; without requests in flight it must be."""

    def result(self) -> Result:
        """Return what is found so far."""


@dataclass(slots=True)
class Usage:
    """How well an engine was used.

    Attributes:
        unfilled_seconds: Seconds of its steps with fewer rollouts than half of the searches that
            may be open, since no mention waited.
    """

    unfilled_seconds: float = 0.0


def run_searches(
    engine: RolloutEngine,
    mentions: Iterable[tuple[Key, Prompt, Search[Result]]],
    max_in_flight: int,
    usage: Usage | None = None,
) -> Iterator[tuple[Key, Result]]:
    """Run many searches over one engine, started in order; yields each result as it ends.

    Args:
        engine: Engine that answers the rollouts.
        mentions: Key, prompt and search of each mention.
        max_in_flight: Maximum number of open searches.
        usage: How well the engine was used is added to it.

    Raises:
        GemelError: A log-prob of the language model is NaN.
    """
    waiting = iter(mentions)
    open_searches: dict[Key, tuple[Prompt, Search[Result]]] = {}
    rollouts: dict[str, tuple[Key, RolloutRequest]] = {}

    def submit(key: Key) -> None:
        prompt, search = open_searches[key]
        for request in search.next_requests():
            request_id = next(_request_ids)
            rollouts[request_id] = key, request
            engine.submit(request_id, prompt, request)

    while True:
        for key, prompt, search in itertools.islice(waiting, max_in_flight - len(open_searches)):
            open_searches[key] = prompt, search
            submit(key)
        if not rollouts:
            return
        is_unfilled, started = 2 * len(rollouts) < max_in_flight, time.monotonic()
        finished = engine.step()
        if is_unfilled and usage is not None:
            usage.unfilled_seconds += time.monotonic() - started
        for request_id, rollout in finished:
            asked = rollouts.pop(request_id, None)
            if asked is None or asked[0] not in open_searches:
                continue  # from an interrupted call, or a search that ended without it
            if any(math.isnan(log_prob) for step in rollout.log_probs for log_prob in step):
                raise GemelError("the language model's log-probs are not numbers: use dtype bfloat16 or float32")
            key, request = asked
            search = open_searches[key][1]
            search.observe(request, rollout)
            if search.is_done:
                del open_searches[key]
                yield key, search.result()
            else:
                submit(key)
