"""Shows how far a linking run is: one live view on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gemel_engine.linking.progress import Progress
from gemel_engine.verbosity import SECONDS_BETWEEN_LINES, is_verbose

logger = logging.getLogger(__name__)

_BAR_WIDTH = 40
_LOGGERS = (None, "ray", "ray.data")  # whose handlers write to the terminal; None: the root


class LiveView:
    """What a run is doing; a context manager.

    Args:
        seconds_between_lines: Time between two lines where the output is no terminal.
    """

    def __init__(self, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        self._seconds = seconds_between_lines
        self._stage = "starting"
        self._progress: Progress | None = None
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, daemon=True)
        self._live: Live | None = None
        self._spinner = Spinner("dots")

    def enter(self, stage: str, progress: Progress | None = None) -> None:
        """Show another stage of the run, with the progress of its rows if there is one."""
        self._stage, self._progress = stage, progress

    def line(self) -> str:
        """Return the present state in one line."""
        if (progress := self._progress) is None:
            return self._stage
        rows, num_rows = progress.tally.rows, progress.num_rows
        return f"{self._stage}: {rows} of {num_rows} rows ({100 * rows / num_rows:.1f}%), {progress.line()}"

    def __enter__(self) -> Self:
        if not sys.stderr.isatty():
            self._thread.start()
        elif not is_verbose():  # else the lines of libraries would tear the view
            terminal = sys.stderr
            console = Console(stderr=True)
            self._live = Live(get_renderable=self._view, console=console, refresh_per_second=4, transient=True)
            self._live.start()
            _redirect(terminal, sys.stderr)  # rich has replaced it, so that lines appear above the view
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_ended.set()
        if self._live is not None:
            above_the_view = sys.stderr
            self._live.stop()
            _redirect(above_the_view, sys.stderr)

    def _write_lines(self) -> None:
        while not self._has_ended.wait(self._seconds):
            logger.info("%s", self.line(), extra=self._progress.fields() if self._progress else {})

    def _view(self) -> Table:
        view, progress = Table.grid(padding=(0, 1)), self._progress
        if progress is None:
            view.add_row(self._spinner, Text(self._stage))
            return view
        rows, num_rows = progress.tally.rows, progress.num_rows
        bar = ProgressBar(num_rows, rows, width=_BAR_WIDTH)
        head = Table.grid(padding=(0, 1))
        head.add_row(Text(self._stage), bar, Text(f"{rows:,} of {num_rows:,} rows"))
        view.add_row(self._spinner, head)
        view.add_row("", Text(progress.line(), "dim"))
        return view


def _redirect(old: object, new: object) -> None:
    """Let the handlers of logs that write to one stream write to another."""
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
