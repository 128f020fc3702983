"""Progress of minutes in which little is printed: a bar with the time left, or plain lines in a log.

A build that says nothing for ten minutes is taken for dead and ended. In a terminal
there is a bar; elsewhere (a log, a service) one plain line every quarter of a minute,
so that the log of a night has tens of lines and not thousands.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from promptai.cli.progress import duration

SAY_EVERY_S = 15.0
#: The first moments of a step that goes on with an old one are not typical: they only look at what is there.
_SETTLED_S = 2.0


class StepProgress:
    """
    Shows one step after the other; a context manager.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, detail="", left="")
        self._text, self._detail = "", ""
        self._share = 0.0
        self._began = self._said = clock()
        self._from: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()

    def step(self, text: str) -> None:
        """Another step begins."""
        self._text, self._detail, self._share, self._from = text, "", 0.0, None
        self._began = self._clock()
        self._say(text)
        self._draw()
        self._progress.refresh()

    def share(self, share: float, detail: str) -> None:
        """0 to 1 of the step is done."""
        self._share, self._detail = share, detail
        now = self._clock()
        if self._from is None and now - self._began >= _SETTLED_S:
            self._from = (now, share)
        self.tick()

    def tick(self) -> None:
        """Time passes: draw anew, or say a line when it is time for one."""
        if not self._console.is_terminal and self._clock() - self._said >= SAY_EVERY_S and self._share > 0:
            words = (self._text, f"{self._share:.0%}", self._detail, self._left())
            self._say(", ".join(word for word in words if word))
        self._draw()

    def _left(self) -> str:
        """How long the rest of the step takes at its pace so far."""
        if self._from is None or self._share <= self._from[1]:
            return ""
        elapsed, done = self._clock() - self._from[0], self._share - self._from[1]
        return f"{duration(elapsed * (1 - self._share) / done)} left"

    def _draw(self) -> None:
        self._progress.update(
            self._task, description=escape(self._text), completed=self._share, detail=self._detail, left=self._left()
        )

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._said = self._clock()
