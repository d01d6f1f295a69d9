"""How well an engine is used."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support.scorer import PROMPT, TERMINATOR, RandomScorer

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.engines.base import Rollout
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.decoding.scheduler import Usage, run_searches
from gemel_engine.decoding.search import NameSearch
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.unit


class Engine(RandomScorer):
    """Answers in one step, of a second, all that is queued."""

    def __init__(self) -> None:
        super().__init__(PrefixTrie.from_sequences([[0], [1], [2]])[0], 1, 1.0, 3)
        self.num_queued: list[int] = []

    def step(self) -> list[tuple[str, Rollout]]:
        self.num_queued.append(len(self.queue))
        finished = [(request_id, self.rollout(request)) for request_id, request in self.queue]
        self.queue.clear()
        return finished

    def mentions(self, num_mentions: int) -> Iterator[tuple[int, Prompt, NameSearch]]:
        for number in range(num_mentions):
            yield number, PROMPT, NameSearch(self.trie, TERMINATOR, SearchSettings(num_to_certify=3, num_candidates=3))


@pytest.mark.parametrize("num_mentions", [1, 4, 7, 40])
def test_steps_with_few_rollouts_are_counted(num_mentions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, usage = Engine(), Usage(unfilled_seconds=5)
    clock = SimpleNamespace(monotonic=lambda: float(len(engine.num_queued)))
    monkeypatch.setattr("gemel_engine.decoding.scheduler.time", clock)
    assert len(list(run_searches(engine, engine.mentions(num_mentions), 8, usage))) == num_mentions
    assert usage.unfilled_seconds == 5 + sum(number < 4 for number in engine.num_queued)
