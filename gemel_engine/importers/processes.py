"""Applies a function to parts of a large file in several processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")

_PARTS_PER_PROCESS = 2  # in work or waiting; more would only take memory


def map_in_processes(function: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """Yield the result for each part, in their order; parts are read as results are taken.

    Uses one process for each CPU that this process may use. A single part is computed here.
    """
    remaining = iter(parts)
    first = list(islice(remaining, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    num_processes = len(os.sched_getaffinity(0))
    pending: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        for part in chain(first, remaining):
            pending.append(pool.submit(function, part))
            if len(pending) >= _PARTS_PER_PROCESS * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
