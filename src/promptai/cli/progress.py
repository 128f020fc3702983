"""Progress displays: the current position of a run, its rate, and the time left.

The line is redrawn twice a second from values that the runner stores, never from within the
measured path. Without a terminal (a log, CI), plain lines appear instead: one for each stage and
for each tenth of the run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from promptai.bench.client import LiveTurn, PlayedTurn, TurnClient
from promptai.bench.plan import Protocol, Stage, WarmUpRates
from promptai.bench.runner import Runner
from promptai.bench.timeleft import TimeLeft
from promptai.bench.trace import TraceKey
from promptai.bench.workload import Conversation

REDRAW_EVERY_S = 0.5


class PrepareProgress:
    """Shows the slow steps before a run; the observer of ``bench.prepare``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, description: str) -> AbstractContextManager[object]:
        """Show ``description`` while the block runs."""
        return self._console.status(description)

    @contextmanager
    def hashing(self) -> Iterator[Callable[[int], None]]:
        """Show the bytes hashed: a large file on an SD card takes minutes."""
        progress = Progress(
            TextColumn("hashing the model"),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        task = progress.add_task("hashing", total=None)
        with progress:
            yield lambda size: progress.advance(task, size)

    def log_kept(self, log: Path) -> None:
        """Print where the log of a failed engine is."""
        print_kept_log(self._console, log)


def print_kept_log(console: Console, log: Path) -> None:
    """Print where the log of a failed engine is."""
    console.print(f"the engine's log is kept: {log}", highlight=False, soft_wrap=True, markup=False)


class RunProgress:
    """Shows a run; the observer of ``bench.runner`` and a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("[cyan]{task.fields[rate]}[/]"),
            TextColumn("{task.fields[left]}"),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._left: TimeLeft | None = None
        self._conversations: dict[str, Conversation] = {}
        self._live = LiveTurn()
        self._client: TurnClient | None = None
        self._stage: Stage | None = None
        self._last_rate = ""
        self._logged_tenths = 0
        self._concurrency = 1

    def begin(self, runner: Runner, conversations: list[Conversation], protocol: Protocol) -> None:
        """Take over the requests left to play."""
        self._conversations = {conversation.id: conversation for conversation in conversations}
        self._left = TimeLeft(runner.pending(), self._conversations, protocol.history)
        self._concurrency = protocol.concurrency

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        self._task = self._progress.add_task("starting the engine", total=1.0, rate="", left="")
        return self

    def __exit__(self, *_exc: object) -> None:
        """Restore the terminal."""
        self._progress.stop()

    def opened(self, target: str, rates: WarmUpRates, client: TurnClient) -> None:
        """Print the rates of a target after its warm-up."""
        self._client, self._live = client, client.live
        if self._left is not None:
            self._left.opened(target, rates)
        self._console.print(
            f"[bold]{escape(target)}[/]: warmed up, prefill {rates.prefill_tps:,.0f} and "
            f"decode {rates.decode_tps:,.1f} tokens/s; {self._remaining()}",
            highlight=False,
        )

    def stage(self, stage: Stage) -> None:
        """Record that a stage begins."""
        self._stage = stage
        if not self._console.is_terminal:
            self._console.print(
                f"{escape(stage.target)}: {stage.cache}, {len(stage.conversations)} conversations", highlight=False
            )

    def played(self, played: PlayedTurn) -> None:
        """Record a finished turn."""
        if self._left is not None:
            finished = self._left.played if played.failure is None else self._left.given_up
            finished(played.trace.key, played.trace.t_end - played.trace.t_sent)
            self._log_tenth(self._left.share())
        rate = played.trace.decode_tps
        if rate is not None:
            self._last_rate = f"{rate:,.1f} tokens/s"

    def _log_tenth(self, share: float) -> None:
        """Without a terminal, print a line per finished tenth: a stage may last for days."""
        if not self._console.is_terminal and int(10 * share) > self._logged_tenths < 9:
            self._logged_tenths = int(10 * share)
            self._console.print(f"{100 * share:.0f} % done, {self._remaining()}", highlight=False)

    def redraw(self) -> None:
        """Redraw the line; called by a timer of the event loop."""
        if self._task is None or self._left is None:
            return
        self._progress.update(
            self._task,
            description=self._where(self._live.key),
            completed=self._left.share(),
            rate=self._rate(),
            left=self._remaining(),
        )
        self._progress.refresh()

    def _where(self, key: TraceKey | None) -> str:
        if key is None or self._stage is None or key.conversation not in self._conversations:
            return "starting the engine"
        place = list(self._conversations).index(key.conversation) + 1
        total, turns = len(self._conversations), self._conversations[key.conversation].user_turns
        return f"{escape(key.target)} {key.cache}: conversation {place}/{total}, turn {key.turn + 1}/{turns}"

    def _rate(self) -> str:
        """Tokens per second of the answer in progress, else of the last one."""
        if self._live.t_first is None or self._client is None or self._live.chunks < 2:
            return self._last_rate
        elapsed = self._client.now() - self._live.t_first
        return f"{(self._live.chunks - 1) / elapsed:,.1f} tokens/s" if elapsed > 0 else self._last_rate

    def _remaining(self) -> str:
        seconds = self._left.seconds() if self._left is not None else None
        return "" if seconds is None else f"about {duration(seconds / self._concurrency)} left"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
