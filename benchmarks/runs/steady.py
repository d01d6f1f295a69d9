"""Where a steady minute of linking goes: samples of the stack of the thread that drives the engine.

    python -m benchmarks.runs steady DATA [--num-mentions 150]

Some five minutes on two cores. Mentions of WikiDiverse dev, text only, are linked by the default settings in one
process, with prompts, demonstrations and candidates as in a run. The stack is looked at a hundred times a second from
another thread, which favours what lets other threads run, as products of matrices do; a sample counts for the first of
`PARTS` that has a function in it. Figures go to `benchmarks/results/startup.json`.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

import tyro

from benchmarks.corpora import Row, in_order, mentions_of, read_rows, wikidiverse
from benchmarks.record import ResultFile
from gemel_engine.linker import Linker

PARTS = (
    ("retrieval: mention encoder", r"/gemel_engine/retrieval/|/transformers/models/"),
    ("retrieval: pool and cards", r"/gemel_engine/evidence/"),
    ("prompts", r"/gemel_engine/decoding/(prompt|window|engines/vllm_prompt)\.py"),
    ("mask of allowed tokens", r"/gemel_engine/decoding/engines/(vllm_mask|mask)\.py"),
    ("sampling", r"/vllm/v1/sample/"),
    ("language model", r"/vllm/model_executor/models/"),
    ("vLLM's scheduler and runner", r"/vllm/"),
    ("search", r"/gemel_engine/decoding/"),
)
WARM_UP = 16
INTERVAL = 0.01


def main(data: tyro.conf.Positional[Path], *, num_mentions: int = 150) -> None:
    """A steady minute: shares of the parts of linking.

    Args:
        data: Directory of WikiDiverse.
        num_mentions: Number of mentions that are linked while it is looked at the stack.
    """
    linker = Linker(wikidiverse(data))
    rows = read_rows(data / "dev.parquet", WARM_UP + num_mentions)
    link(linker, rows[:WARM_UP])
    sampler = Sampler(threading.get_ident())
    sampler.start()
    started = time.perf_counter()
    link(linker, in_order(rows[WARM_UP:]))
    seconds = time.perf_counter() - started
    value = sampler.shares() | {"seconds": round(seconds, 1)}
    what = f"{num_mentions} mentions of WikiDiverse dev, text only, settings of the package, one process"
    ResultFile("startup", {"DATA": data}).note({"steady": value}, what)


def link(linker: Linker, rows: list[Row]) -> None:
    """Link mentions without pictures."""
    linker.link(mentions_of(rows), [None] * len(rows))


class Sampler(threading.Thread):
    """Counts what a thread is at.

    Args:
        thread: Its identifier.
    """

    def __init__(self, thread: int) -> None:
        super().__init__(daemon=True)
        self._thread, self._counts, self._is_over = thread, Counter[str](), threading.Event()

    def run(self) -> None:
        """Look at the stack until the shares are asked for."""
        while not self._is_over.wait(INTERVAL):
            self._counts[part_of(sys._current_frames().get(self._thread))] += 1

    def shares(self) -> dict[str, float]:
        """Stop, and return the share of each part, the largest first."""
        self._is_over.set()
        self.join()
        return {part: round(count / self._counts.total(), 3) for part, count in self._counts.most_common()}


def part_of(frame: FrameType | None) -> str:
    """Return the first part that one of the functions from a frame outwards belongs to."""
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    stack = "\n".join(files)
    return next((part for part, pattern in PARTS if re.search(pattern, stack)), "all else")
