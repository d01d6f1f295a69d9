"""Seconds from the shell until `gemel` has done its work, beside those of an earlier commit.

python benchmarks/startup.py DATA --before WORKTREE [--num-runs N] [--figures ...]

DATA is the corpus of `benchmarks/cards.py`, whose indexes must be there, as must be what `make demo` builds. WORKTREE
is a checkout of the earlier commit with the same `build`. Each command is a process of its own, of the earlier commit
and of this one in turn, over the same files; what is noted is the median. Directories for temporary files, in which
what passed the checks is remembered, are empty at the start of `dry_run_first`, `text_100_rows` and
`pictures_100_rows`; the other commands come after one that has filled them. The profile is of this commit: seconds of
its one process in each step of linking the 100 rows of text, and of CPU for importing libraries. Results go to
`benchmarks/results/startup.json`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from cards import WORK as INDEXES
from record import record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/startup.json"
NUM_ROWS, SEED = 100, 0
FIGURES = ("help", "dry_run_first", "dry_run", "text_100_rows", "rerun", "pictures_100_rows")
LIBRARIES = (
    "gemel_engine.linking.job",
    "torch",
    "transformers.models.auto.modeling_auto",
    "vllm",
    "open_clip",
    "ray.data",
)
CPU_OF_IMPORT = "import time; import {}; print(time.process_time())"
PROFILE = """
import sys, time
from gemel_engine.linking import live, stages
from gemel_engine.pipeline import chain, stages as common
started, marks = float(sys.argv.pop(1)), []
def mark(name): marks.append((name, time.time() - started))
def marked(kind, name):
    make, call = kind.__init__, kind.__call__
    def init(self, *arguments): make(self, *arguments); mark(f"{name} loaded")
    def run(self, table): result = call(self, table); mark(f"{name} of a shard"); return result
    kind.__init__, kind.__call__ = init, run
marked(common.EncodeImages, "image encoder")
marked(common.Retrieve, "retrieval")
marked(stages.GenerateEntityNames, "engine")
enter = live.LiveView.enter
def entered(self, stage, progress=None): mark(f"begins {stage}"); enter(self, stage, progress)
live.LiveView.enter = entered
from gemel_engine.cli.main import main
mark("command line imported")
main("link")
mark("done")
import json; print(json.dumps(marks))
"""

logger = logging.getLogger("startup")


def main(
    data: tyro.conf.Positional[Path], *, before: Path, num_runs: int = 3, figures: tuple[str, ...] = FIGURES
) -> None:
    """Measure the commands of both commits in turn.

    Args:
        data: Directory of the corpus.
        before: Checkout of the earlier commit.
        num_runs: Runs of each command.
        figures: Names of the commands.
    """
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as scratch:
        text = write_config(data, Path(scratch))
        seconds: dict[str, dict[str, list[float]]] = {name: {"before": [], "after": []} for name in figures}
        for _ in range(num_runs):
            for name in figures:
                for side, tree in (("before", before.resolve()), ("after", ROOT)):
                    seconds[name][side].append(measured(name, tree, Path(scratch, side), text))
                logger.info("%s %s", name, {side: found[-1] for side, found in seconds[name].items()})
        note = partial(record, command="python benchmarks/startup.py DATA --before WORKTREE")
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=before, check=True, capture_output=True, text=True
        ).stdout.strip()
        results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for name, found in seconds.items():
            middle = {side: round(statistics.median(values), 2) for side, values in found.items()}
            value = middle | {"ratio": round(middle["before"] / middle["after"], 2)}
            what = f"seconds, before at {commit}, median of {num_runs} in turn"
            results[f"{name}_s"] = note(value, what=what)
        what = f"seconds since the command at each step, {NUM_ROWS} rows of text in one process, nothing remembered"
        results["profile"] = note(profile(Path(scratch), text), what=what)
        results["import_cpu_s"] = note(
            {name: cpu_of_import(name) for name in LIBRARIES}, what="seconds of CPU in a fresh process"
        )
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def write_config(data: Path, scratch: Path) -> Path:
    """A configuration that links some rows of dev with the default settings, and its input."""
    dev = pq.read_table(data / "dev.parquet", columns=["mention_id", "text", "mention"])
    rows = sorted(random.Random(SEED).sample(range(dev.num_rows), NUM_ROWS))
    pq.write_table(dev.take(pa.array(rows)), scratch / "text.parquet")
    path, indexes = scratch / "text.toml", (ROOT / INDEXES).resolve()
    path.write_text(
        f"""input = "{scratch}/text.parquet"
output = "{scratch}/output"
knowledge_base = "{indexes}/knowledge_base"
demonstrations = "{indexes}/demonstrations"
[language_model]
name = "build/models/smollm2-135m"
dtype = "float32"
[retrieval]
mention_encoder = "build/models/minilm"
[resources]
retrieval = {{ num_cpus = 0.25, num_threads = 2 }}
generation = {{ num_threads = 2 }}
"""
    )
    return path


def measured(name: str, tree: Path, scratch: Path, text: Path) -> float:
    """Seconds of one command, with the directory for temporary files that it is to have."""
    if name in ("dry_run_first", "text_100_rows", "pictures_100_rows"):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    if name == "help":
        return seconds_of(tree, scratch, ["--help"])
    config = "examples/emoji/link.toml" if name == "pictures_100_rows" else str(text)
    output = scratch / ("other" if name.startswith("dry_run") else name.replace("rerun", "text_100_rows"))
    options = ["--dry-run"] if name.startswith("dry_run") else []
    return seconds_of(tree, scratch, ["link", config, "--output", str(output), *options])


def seconds_of(tree: Path, scratch: Path, arguments: Sequence[str]) -> float:
    """Seconds of a command of a checkout."""
    started = time.perf_counter()
    run(tree, scratch, ["-m", "gemel_engine.cli.main", *arguments])
    return time.perf_counter() - started


def run(tree: Path, scratch: Path, arguments: Sequence[str]) -> str:
    """What this Python prints with the code of a checkout; bytecode is kept, as with an installed package."""
    scratch.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment: Mapping[str, str] = inherited | {"PYTHONPATH": str(tree), "TMPDIR": str(scratch)}
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def profile(scratch: Path, text: Path) -> dict[str, float]:
    """Seconds since the command at the end of each step, the first of its name."""
    fresh = scratch / "profiled"
    printed = run(ROOT, fresh, ["-c", PROFILE, str(time.time()), str(text), "--output", str(fresh / "output")])
    marks: dict[str, float] = {}
    for name, seconds in json.loads(printed.splitlines()[-1]):
        marks.setdefault(name, round(seconds, 2))
    return marks


def cpu_of_import(name: str) -> float:
    """Seconds of CPU of a fresh process that imports a module."""
    with tempfile.TemporaryDirectory() as scratch:
        return round(float(run(ROOT, Path(scratch), ["-c", CPU_OF_IMPORT.format(name)]).splitlines()[-1]), 2)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)
