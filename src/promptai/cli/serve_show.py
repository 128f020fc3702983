"""Output of ``promptai serve``: the table of replicas, an example request, and load progress.

The greeting goes to stdout once. Later events go to stderr, one line each; on a terminal, bars show loading models and
the remaining time.
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
from promptai.fleet.static import StaticServer
from promptai.gateway.server import url_host

_log = logging.getLogger("promptai.serve")

_COLOURS = {State.READY: "green", State.DOWN: "red", State.LOADING: "yellow"}
#: Without a terminal: log a load every 25 %, if it takes longer than this.
_LOG_EVERY, _NO_LOG_BEFORE_S = 0.25, 2.0
#: The file is read; the remaining time for the engine to prepare it is unknown.
_ALL_READ = 0.99
_GIB = 1024**3


def table(replicas: Sequence[Replica], models: Sequence[LocalModel], targets: Sequence[StaticServer]) -> Table:
    """Build the table: a row per replica, and per board that has not answered yet."""
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
            *(["–" if model is None else f"{model.needed_bytes / _GIB:.2f}"] if local else []),
            _rate(rates.prefill_tps),
            _rate(rates.decode_tps),
            rates.source if rates.source != "unknown" else "learned",
        )
    answered = {replica.url for replica in replicas}
    for target in targets:
        if target.base_url not in answered:
            shown.add_row(_name(target.model or "?"), _name(target.replica_id), "[dim]not answered yet[/]")
    return shown


def down_reasons(replicas: Sequence[Replica]) -> list[str]:
    """Return a line per replica that is down, with the reason."""
    return [f"{replica.id}: {replica.reason}" for replica in replicas if replica.state is State.DOWN]


def legend(replicas: Sequence[Replica], budget_bytes: int | None) -> str:
    """Explain the units and words of the table."""
    units = "slots: conversations × tokens of context; prefill and decode in tokens/s"  # noqa: RUF001
    lines = [units] if budget_bytes is None else [f"memory in GiB (all engines: {budget_bytes / _GIB:.1f}); {units}"]
    if any(replica.rates.source == "unknown" for replica in replicas):
        advice = "" if budget_bytes is None else "; promptai bench or promptai models calibrate measure it in advance"
        lines.append(f"learned: no speed known yet, taken from the first answers{advice}")
    if any(replica.state is State.COLD for replica in replicas):
        lines.append("cold: loaded on its first request")
    return "\n".join(lines)


def example_model(replicas: Sequence[Replica]) -> str:
    """Return the model for the example request: one that is usable, else ``default``."""
    return next((replica.model for replica in replicas if replica.model and replica.usable), "default")


def why_unavailable(replicas: Sequence[Replica]) -> str:
    """Return why no model is available; empty if one is."""
    if any(replica.usable for replica in replicas):
        return ""
    if not replicas:
        return "no model is available yet: no board has answered"
    first = replicas[0]
    others = f" ({len(replicas) - 1} more replicas are not available)" if len(replicas) > 1 else ""
    return f"no model is available yet: {first.id}: {first.reason or first.state.value}{others}"


def curl_line(url: str, model: str, key: str | None) -> str:
    """Return an example request that works as printed; ``key``: API key or shell variable, ``None``: not required."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is a base station?"}], "max_tokens": 60}
    words = ["curl", f"{url}/v1/chat/completions", "-H", "'Content-Type: application/json'"]
    if key is not None:
        words += ["-H", f'"Authorization: Bearer {key}"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(body))])


def external_url(host: str, port: int) -> str:
    """Return the URL for other machines of a gateway that is not bound to loopback."""
    name = socket.gethostname() if host in {"0.0.0.0", "::"} else url_host(host)  # noqa: S104  compared, not bound
    return f"http://{name}:{port}"


@contextlib.contextmanager
def _ignore_write_errors(console: Console) -> Iterator[None]:
    """Ignore output that cannot be written: the terminal is lost, the disk full or the pipe closed."""
    try:
        yield
    except (Exception, SystemExit):  # noqa: BLE001  rich raises SystemExit on a broken pipe; there is nowhere to report it
        silent, console.quiet = console.quiet, True
        with contextlib.suppress(Exception):
            console.print()  # rich buffers what it could not write, and drops it only while quiet
        console.quiet = silent


class LogHandler(logging.Handler):
    """A log handler that does not break the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; as usual in logging, a failure is ignored."""
        with _ignore_write_errors(self._console):
            shown = "\n".join(map(one_line, self.format(record).split("\n")))
            self._console.print(shown, markup=False, highlight=False, soft_wrap=True, emoji=False)


class LoadingProgress:
    """Shows and logs the state changes of replicas from snapshot to snapshot; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[share]:>5}"),
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
        """Return itself; drawing starts with the first load."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Remove the bars from the terminal."""
        with _ignore_write_errors(self._console):
            self._progress.stop()

    def update(self, snapshot: Snapshot, now: float) -> None:
        """Show the changes since the last snapshot."""
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
        is_new = replica.id not in self._since
        since = self._since.setdefault(replica.id, now)
        share, left = replica.progress or 0.0, _left_s(replica, now - since)
        text = "" if left is None else f"about {duration(left)} left"
        if self._console.is_terminal:
            if replica.id not in self._tasks:
                name = one_line(replica.id)
                self._tasks[replica.id] = self._progress.add_task(f"loading {name}", total=None, share="", left="")
            if replica.progress is not None:  # until then the bar only pulses
                self._progress.update(self._tasks[replica.id], total=1.0, completed=share, share=f"{100 * share:.0f} %")
            self._progress.update(self._tasks[replica.id], left=text)
        elif is_new:
            _log.info("%s: loading%s", one_line(replica.id), f", {text}" if text else "")
        elif now - since >= _NO_LOG_BEFORE_S and share - self._logged.get(replica.id, 0.0) >= _LOG_EVERY:
            self._logged[replica.id] = share
            _log.info("%s: %.0f %% loaded%s", one_line(replica.id), 100 * share, f", {text}" if text else "")

    def _log_change(self, replica: Replica, before: State | None, now: float) -> None:
        since = self._stop_loading(replica.id)
        name, reason = one_line(replica.id), one_line(replica.reason)
        if replica.state is State.READY and since is not None:
            _log.info("%s: ready after %.1f s", name, now - since)
        elif before is not None or replica.state is State.DOWN:
            _log.info("%s: %s%s", name, replica.state.value, f", {reason}" if reason else "")

    def _stop_loading(self, replica_id: str) -> float | None:
        """Remove the bar of a replica; returns when its load began, ``None`` if it did not load."""
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
    """Estimate the remaining load time from its progress, else from its last load; ``None``: unknown."""
    if replica.progress and replica.progress >= _ALL_READ:
        return None
    if replica.progress:
        return elapsed_s * (1 - replica.progress) / replica.progress
    return None if replica.load_s is None else max(0.0, replica.load_s - elapsed_s)


def _name(text: str) -> str:
    """Escape a foreign name for the table."""
    return escape(one_line(text))


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
