"""Seconds from the shell until `gemel` has done its work, beside those of an earlier commit.

    python -m benchmarks.runs startup DATA --before WORKTREE [--num-runs 3] [--figures ...]

A quarter of an hour for each run on two cores. WORKTREE is a checkout of the earlier commit with the same `build`. Each
command is a process of its own, of the earlier commit and of this one in turn, over the same files; what is noted is
the median, and that of the CPU time of the process and of all that it starts, which tells more than the seconds where
the machine has other work. Directories for temporary files, in which what passed the checks is remembered, are empty at
the start of `dry_run_first`, `text_100_rows` and `pictures_100_rows`; the other commands come after one that has filled
them. The profile is of this commit: seconds of its one process in each step of linking the 100 rows of text, and of CPU
for importing libraries. Figures go to `benchmarks/results/startup.json`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks.corpora import INDEXES, LANGUAGE_MODEL, MENTION_ENCODER, read_rows, wikidiverse
from benchmarks.record import ResultFile, commit

ROOT = Path(__file__).parents[2]
NUM_ROWS = 100
COMMANDS = ("help", "dry_run_first", "dry_run", "text_100_rows", "rerun", "pictures_100_rows")
FIGURES = (*COMMANDS, "profile", "import_cpu")
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

logger = logging.getLogger("benchmarks")


def main(
    data: tyro.conf.Positional[Path], *, before: Path, num_runs: int = 3, figures: tuple[str, ...] = FIGURES
) -> None:
    """Start of commands: measure those of both commits in turn.

    Args:
        data: Directory of WikiDiverse.
        before: Checkout of the earlier commit.
        num_runs: Runs of each command.
        figures: What is measured; `dry_run` and `rerun` follow the commands that they need.
    """
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as scratch:
        text = write_config(data, Path(scratch))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in figures if name in COMMANDS}
        for _ in range(num_runs):
            for name in found:
                of_pair: dict[str, float] = {}
                for side, tree in (("before", before.resolve()), ("after", ROOT)):
                    seconds, cpu = measured(name, tree, Path(scratch, side), text)
                    of_pair |= {side: seconds, f"{side}_cpu": cpu}
                found[name].append(of_pair)
                logger.info("%s %s", name, of_pair)
        results = ResultFile("startup", {"DATA": data, "WORKTREE": before})
        what = f"seconds, before at {commit(before)[:7]}, median of {num_runs} in turn"
        results.note({f"{name}_s": medians(pairs) for name, pairs in found.items()}, what)
        if "profile" in figures:
            what = f"seconds since the command at each step, {NUM_ROWS} rows of text in one process, nothing remembered"
            results.note({"profile": profile(Path(scratch, "profile"), text)}, what)
        if "import_cpu" in figures:
            seconds_of = {lib: printed_by(CPU_OF_IMPORT.format(lib), Path(scratch, "import")) for lib in LIBRARIES}
            value = {name: round(float(seconds), 2) for name, seconds in seconds_of.items()}
            results.note({"import_cpu_s": value}, "seconds of CPU in a fresh process")


def medians(pairs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return medians of seconds and of CPU time of both commits, and how much faster this one is."""
    middle = {side: round(statistics.median(pair[side] for pair in pairs), 2) for side in pairs[0]}
    ratios = {"ratio": middle["before"] / middle["after"], "cpu_ratio": middle["before_cpu"] / middle["after_cpu"]}
    return middle | {name: round(value, 2) for name, value in ratios.items()}


def write_config(data: Path, scratch: Path) -> Path:
    """Write a configuration that links some rows of dev with the default settings, and its input."""
    wikidiverse(data)  # builds its indexes
    columns = ("mention_id", "text", "mention")
    rows = [{name: row[name] for name in columns} for row in read_rows(data / "dev.parquet", NUM_ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), scratch / "text.parquet")
    path, indexes = scratch / "text.toml", (ROOT / INDEXES).resolve()
    path.write_text(
        f"""input = "{scratch}/text.parquet"
output = "{scratch}/output"
knowledge_base = "{indexes}/knowledge_base"
demonstrations = "{indexes}/demonstrations"
[language_model]
name = "{LANGUAGE_MODEL}"
dtype = "float32"
[retrieval]
mention_encoder = "{MENTION_ENCODER}"
[resources]
retrieval = {{ num_cpus = 0.25, num_threads = 2 }}
generation = {{ num_threads = 2 }}
"""
    )
    return path


def measured(name: str, tree: Path, scratch: Path, text: Path) -> tuple[float, float]:
    """Return seconds and CPU time of one command, with the directory for temporary files that it is to have."""
    if name in ("dry_run_first", "text_100_rows", "pictures_100_rows"):
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    config = "examples/emoji/link.toml" if name == "pictures_100_rows" else str(text)
    output = scratch / ("other" if name.startswith("dry_run") else name.replace("rerun", "text_100_rows"))
    options = ["--dry-run"] if name.startswith("dry_run") else []
    arguments = ["--help"] if name == "help" else ["link", config, "--output", str(output), *options]
    started, cpu_of = time.perf_counter(), dict[int, float]()
    with (scratch / "log.txt").open("w+") as log:
        command = [sys.executable, "-m", "gemel_engine.cli.main", *arguments]
        process = subprocess.Popen(command, cwd=tree, env=environment(tree, scratch), stdout=log, stderr=log)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                seen = psutil.Process(process.pid)
                for one in (seen, *seen.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        times = one.cpu_times()
                        cpu_of[one.pid] = times.user + times.system
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        log.seek(0)
        assert process.returncode == 0, log.read()[-3000:]
    return seconds, sum(cpu_of.values())


def environment(tree: Path, scratch: Path) -> dict[str, str]:
    """Return variables for the code of a checkout; bytecode is kept, as with an installed package."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {"PYTHONPATH": str(tree), "TMPDIR": str(scratch)}


def printed_by(code: str, scratch: Path, *arguments: str) -> str:
    """Run code with the engine of this commit; return the last line that it prints."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment(ROOT, scratch), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()[-1]


def profile(scratch: Path, text: Path) -> dict[str, float]:
    """Return seconds since the command at the end of each step, the first of its name."""
    output = scratch / "output"
    marks: dict[str, float] = {}
    for name, seconds in json.loads(printed_by(PROFILE, scratch, str(time.time()), str(text), "--output", str(output))):
        marks.setdefault(name, round(seconds, 2))
    return marks
