"""Show the progress of downloads and copies on standard error: rate and time left.

On a terminal, one line that is redrawn; elsewhere (logs, cron, CI) a plain line every ten
seconds, to distinguish a long download from a hanging one.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from promptai.models.library import readable_size

LINE_EVERY_S = 10.0


class RateColumn(ProgressColumn):
    """Transfer rate in binary units; rich's own column is decimal only."""

    def render(self, task: Task) -> Text:
        """Format the rate; ``?`` while it is unknown."""
        rate = task.finished_speed or task.speed
        return Text(f"{readable_size(rate)}/s" if rate else "?", style="progress.data.speed")


class Transfer:
    """A ``ProgressReporter`` for a console, as a context manager."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            RateColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._total: int | None = None
        self._done = self._began = 0
        self._begun_at = self._reported_at = 0.0

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop drawing and restore the terminal."""
        self._progress.stop()

    def begin(self, what: str, total: int | None, done: int = 0) -> None:
        """Start a task; replaces the previous one."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(escape(what), total=total, completed=done)
        self._what, self._total, self._done, self._began = what, total, done, done
        self._begun_at = self._reported_at = self._clock()

    def advance(self, size: int) -> None:
        """Count ``size`` more bytes as done."""
        self._done += size
        if self._console.is_terminal:
            if self._task is not None:
                self._progress.advance(self._task, size)
        elif self._clock() - self._reported_at >= LINE_EVERY_S:
            self._reported_at = self._clock()
            self._console.print(escape(self._line()), soft_wrap=True)

    def notify(self, line: str) -> None:
        """Print a message above the progress."""
        self._console.print(escape(" ".join(line.split())), soft_wrap=True)

    def _line(self) -> str:
        from promptai.cli.progress import duration  # noqa: PLC0415  imports the whole bench

        rate = (self._done - self._began) / max(self._clock() - self._begun_at, 1e-9)
        if self._total is None:
            return f"{self._what}: {readable_size(self._done)}, {readable_size(rate)}/s"
        left = f", {duration((self._total - self._done) / rate)} left" if rate > 0 else ""
        share = self._done / self._total if self._total else 1.0
        return f"{self._what}: {100 * share:.0f} % of {readable_size(self._total)}, {readable_size(rate)}/s{left}"
