"""What ``promptai serve`` prints: what is served, how to ask, and how loading goes.

What a person reads goes to stdout once, at the start. Everything that happens later goes to
stderr, a line each; on a terminal a bar shows what loads, with the time that is left.
"""

import contextlib
import json
import logging
import shlex
import socket
from collections.abc import Iterator, Sequence
from typing import Self

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from promptai.cli.progress import duration
from promptai.cli.terminal_text import one_line
from promptai.fleet.local import LocalModel
from promptai.fleet.replica import Replica, Snapshot, State
from promptai.fleet.static import Target
from promptai.gateway.server import url_host

_log = logging.getLogger("promptai.serve")

_COLOURS = {State.READY: "green", State.DOWN: "red", State.LOADING: "yellow"}
#: Where nothing is redrawn: a line each quarter, for what takes longer than a moment.
_LOG_EVERY, _NO_LOG_BEFORE_S = 0.25, 2.0
#: The file is read; what the engine makes of it takes as long as it takes.
_ALL_READ = 0.99


def table(replicas: Sequence[Replica], models: Sequence[LocalModel], targets: Sequence[Target]) -> Table:
    """One line a replica, and one a board that has not said anything yet."""
    local = {model.name: model for model in models}
    shown = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("model", "where", "state", "slots", *(["memory"] if local else []), "prefill", "decode", "rates"):
        right = name in {"slots", "memory", "prefill", "decode"}
        shown.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name != "model")
    for replica in replicas:
        model = local.get(replica.model) if replica.id.startswith("local/") else None
        rates, colour = replica.rates, _COLOURS.get(replica.state, "dim")
        shown.add_row(
            _name(replica.model or "?"),
            "here" if model is not None else _name(replica.id),
            f"[{colour}]{replica.state.value}[/]",
            f"{replica.slots}×{'?' if replica.context is None else replica.context}",  # noqa: RUF001
            *(["–" if model is None else f"{model.needed_bytes / 1e9:.2f}"] if local else []),
            _rate(rates.prefill_tps),
            _rate(rates.decode_tps),
            rates.source if rates.source != "unknown" else "learned",
        )
    answered = {replica.url for replica in replicas}
    for target in targets:
        if target.base_url not in answered:
            shown.add_row(_name(target.model or "?"), _name(target.replica_id), "[dim]asked[/]")
    return shown


def down_reasons(replicas: Sequence[Replica]) -> list[str]:
    """Why some do not serve, a line each."""
    return [f"{replica.id}: {replica.reason}" for replica in replicas if replica.state is State.DOWN]


def legend(replicas: Sequence[Replica], budget_bytes: int | None) -> str:
    """The table's units, and what its words mean."""
    units = "slots: conversations × tokens; prefill and decode in tokens/s"  # noqa: RUF001
    lines = [units if budget_bytes is None else f"memory in GB, of {budget_bytes / 1e9:.1f} for all engines; {units}"]
    if any(replica.rates.source == "unknown" for replica in replicas):
        before = "; promptai bench or promptai models calibrate tell before" if budget_bytes is not None else ""
        lines.append(f"learned: from the first answers{before}")
    if any(replica.state is State.COLD for replica in replicas):
        lines.append("cold: loaded when it is asked for")
    return "\n".join(lines)


def example_model(replicas: Sequence[Replica]) -> str:
    """The model of an example: one that answers, if there is one; else whichever will."""
    return next((replica.model for replica in replicas if replica.model and replica.usable), "default")


def why_unavailable(replicas: Sequence[Replica]) -> str:
    """Why nothing can be asked now; empty where something can."""
    if any(replica.usable for replica in replicas):
        return ""
    if not replicas:
        return "nothing can be asked yet: no board has answered so far"
    first = replicas[0]
    others = f" (and {len(replicas) - 1} more cannot serve)" if len(replicas) > 1 else ""
    return f"nothing can be asked now: {first.id}: {first.reason or first.state.value}{others}"


def curl_line(url: str, model: str, key: str | None) -> str:
    """A request that works as it is printed; ``key``: as it stands in the header, ``None`` where none is needed."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is a base station?"}], "max_tokens": 60}
    words = ["curl", f"{url}/v1/chat/completions", "-H", "'Content-Type: application/json'"]
    if key is not None:
        words += ["-H", f'"Authorization: Bearer {key}"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(body))])


def external_url(host: str, port: int) -> str:
    """Where other machines reach a gateway that is not bound to loopback."""
    name = socket.gethostname() if host in {"0.0.0.0", "::"} else url_host(host)  # noqa: S104  compared, not bound
    return f"http://{name}:{port}"


@contextlib.contextmanager
def _ignore_write_errors(console: Console) -> Iterator[None]:
    """Drop what cannot be written: the terminal is lost, the disk full, or who read it has gone."""
    try:
        yield
    except (Exception, SystemExit):  # noqa: BLE001  rich makes SystemExit of a broken pipe; nobody could be told
        silent, console.quiet = console.quiet, True
        with contextlib.suppress(Exception):
            console.print()  # rich keeps what it could not write, and forgets it only in silence
        console.quiet = silent


class LogHandler(logging.Handler):
    """Log lines that do not tear the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one; as everywhere in logging, one that cannot be printed ends nothing."""
        with _ignore_write_errors(self._console):
            shown = "\n".join(map(one_line, self.format(record).split("\n")))
            self._console.print(shown, markup=False, highlight=False, soft_wrap=True, emoji=False)


class LoadingProgress:
    """Tells what becomes of engines, from one snapshot to the next; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[share]:>4}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            auto_refresh=False,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._before: dict[str, State] = {}
        self._since: dict[str, float] = {}
        self._logged: dict[str, float] = {}

    def __enter__(self) -> Self:
        """Begin to draw."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Leave the terminal as it was."""
        with _ignore_write_errors(self._console):
            self._progress.stop()

    def update(self, snapshot: Snapshot, now: float) -> None:
        """Say what is new since the last look."""
        for gone in self._before.keys() - {replica.id for replica in snapshot.replicas}:
            del self._before[gone]
            self._stop_loading(gone)
        for replica in snapshot.replicas:
            before = self._before.get(replica.id)
            self._before[replica.id] = replica.state
            if replica.state is State.LOADING:
                self._load(replica, now)
            elif before is not replica.state:
                self._log_change(replica, before, now)
        with _ignore_write_errors(self._console):
            self._draw()

    def _load(self, replica: Replica, now: float) -> None:
        known = replica.id in self._since
        since = self._since.setdefault(replica.id, now)
        share, left = replica.progress or 0.0, _left_s(replica, now - since)
        words = "" if left is None else f"about {duration(left)} left"
        if self._console.is_terminal:
            if replica.id not in self._tasks:
                name = one_line(replica.id)
                self._tasks[replica.id] = self._progress.add_task(f"loading {name}", total=None, share="", left="")
            if replica.progress is not None:  # until then the bar only says that something goes on
                self._progress.update(self._tasks[replica.id], total=1.0, completed=share, share=f"{share:.0%}")
            self._progress.update(self._tasks[replica.id], left=words)
        elif not known:
            _log.info("%s: loading%s", one_line(replica.id), f", {words}" if words else "")
        elif now - since >= _NO_LOG_BEFORE_S and share - self._logged.get(replica.id, 0.0) >= _LOG_EVERY:
            self._logged[replica.id] = share
            _log.info("%s: %.0f %% loaded%s", one_line(replica.id), 100 * share, f", {words}" if words else "")

    def _log_change(self, replica: Replica, before: State | None, now: float) -> None:
        since = self._stop_loading(replica.id)
        name, reason = one_line(replica.id), one_line(replica.reason)
        if replica.state is State.READY and since is not None:
            _log.info("%s: ready after %.1f s", name, now - since)
        elif before is not None or replica.state is State.DOWN:
            _log.info("%s: %s%s", name, replica.state.value, f", {reason}" if reason else "")

    def _stop_loading(self, replica_id: str) -> float | None:
        """It loads no longer; gives when it began."""
        task = self._tasks.pop(replica_id, None)
        if task is not None:
            self._progress.remove_task(task)
        self._logged.pop(replica_id, None)
        return self._since.pop(replica_id, None)

    def _draw(self) -> None:
        if self._tasks and not self._progress.live.is_started:
            self._progress.start()
        elif not self._tasks and self._progress.live.is_started:
            self._progress.stop()
        if self._tasks:
            self._progress.refresh()


def _left_s(replica: Replica, elapsed_s: float) -> float | None:
    """Seconds until it is loaded, from an earlier time or from how far it came in this one."""
    if replica.progress and replica.progress >= _ALL_READ:
        return None
    if replica.progress:
        return elapsed_s * (1 - replica.progress) / replica.progress
    return None if replica.load_s is None else max(0.0, replica.load_s - elapsed_s)


def _name(text: str) -> str:
    """A name from outside, as a table takes it."""
    return escape(one_line(text))


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
