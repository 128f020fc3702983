"""Progress of long steps: a bar with the time left in a terminal, plain lines in a log.

Users kill a build that prints nothing for ten minutes. A terminal shows a bar; elsewhere (a log, a service) there is
one plain line every 15 s, so the log of a night has tens of lines and not thousands.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from promptai.cli.progress import duration

PRINT_EVERY_S = 15.0
#: The first moments of a resumed step are not typical: it only checks existing files.
_SETTLED_S = 2.0


class StepProgress:
    """
    Shows the steps of a task; a context manager.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, detail="", left="")
        self._text, self._detail = "", ""
        self._share = 0.0
        self._began = self._printed = clock()
        self._from: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        """Remove the bar."""
        self._progress.stop()

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._text, self._detail, self._share, self._from = text, "", 0.0, None
        self._began = self._clock()
        self._print(text)
        self._draw()
        self._progress.refresh()

    def share(self, share: float, detail: str) -> None:
        """Report the finished share of the step, 0 to 1."""
        self._share, self._detail = share, detail
        now = self._clock()
        if self._from is None and now - self._began >= _SETTLED_S:
            self._from = (now, share)
        self.tick()

    def tick(self) -> None:
        """Redraw the bar, or print a line when one is due."""
        if not self._console.is_terminal and self._clock() - self._printed >= PRINT_EVERY_S and self._share > 0:
            words = (self._text, f"{100 * self._share:.0f} %", self._detail, self._left())
            self._print(", ".join(word for word in words if word))
        self._draw()

    def _left(self) -> str:
        """Return the time left at the step's pace so far; empty when unknown."""
        if self._from is None or self._share <= self._from[1]:
            return ""
        elapsed, done = self._clock() - self._from[0], self._share - self._from[1]
        return f"{duration(elapsed * (1 - self._share) / done)} left"

    def _draw(self) -> None:
        self._progress.update(
            self._task, description=escape(self._text), completed=self._share, detail=self._detail, left=self._left()
        )

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._printed = self._clock()
