"""Output of ``promptai serve``."""

import errno
import io
import json
import logging
import shlex

import msgspec
import pytest
from rich.console import Console

from promptai.cli.serve_show import (
    LoadingProgress,
    LogHandler,
    curl_line,
    down_reasons,
    example_model,
    external_url,
    legend,
    table,
    why_unavailable,
)
from promptai.fleet.replica import Rates, Replica, Snapshot, State
from promptai.fleet.static import StaticServer

READY = Replica(id="pi-1:80", url="http://pi-1:80", model="m", slots=2, context=4096, rates=Rates(prefill_tps=60.0))
LOADING = Replica(id="local/m", url="", model="m", state=State.LOADING, load_s=40.0)


class Failing(io.StringIO):
    """A stream that can fail like a lost terminal or a full disk."""

    error: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or raise the configured error."""
        if self.error is not None:
            raise self.error
        return super().write(text)


def plain(thing: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(thing)
    return out.getvalue()


def test_shows_foreign_names_unchanged() -> None:
    shown = plain(table([Replica(id="[red]x", url="u", model="[bold]m")], [], []))

    assert "[bold]m" in shown
    assert "[red]x" in shown


def test_foreign_names_cannot_control_the_terminal() -> None:
    shown = plain(
        table(
            [Replica(id="x\x1b[2J", url="u", model="m\x1b]0;title\x07\n")],
            [],
            [StaticServer("http://pi-2:80", model="t\x9b2J")],
        )
    )

    assert "m?]0;title??" in shown
    assert "x?[2J" in shown
    assert "t?2J" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_lists_a_board_that_has_not_answered_yet() -> None:
    shown = plain(table([READY], [], [StaticServer("http://pi-1:80"), StaticServer("http://pi-2:80/v1")]))

    assert "2×4096" in shown  # noqa: RUF001
    assert shown.count("pi-1") == 1
    assert "pi-2:80" in shown


def test_lists_replicas_that_are_down_with_the_reason() -> None:
    down = Replica(id="pi-3:80", url="u", model="", state=State.DOWN, reason="does not answer")

    assert down_reasons([READY, down]) == ["pi-3:80: does not answer"]
    assert "learned" in legend([READY], None)


@pytest.mark.parametrize("model", ["m", "it's", 'a $HOME `id` "b"'])
def test_the_curl_line_survives_a_shell(model: str) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8400", model, "$PROMPTAI_API_KEY"))

    assert words[:2] == ["curl", "http://127.0.0.1:8400/v1/chat/completions"]
    assert "Authorization: Bearer $PROMPTAI_API_KEY" in words
    assert json.loads(words[-1])["model"] == model


def test_without_a_terminal_logs_a_load_every_quarter_and_at_the_end() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    log = logging.getLogger("promptai.serve")
    handler = LogHandler(console)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with LoadingProgress(console) as loading:
            for now in range(11):
                replica = msgspec.structs.replace(LOADING, progress=now / 10 if now else None)
                loading.update(Snapshot(now, (replica,)), float(now))
            loading.update(Snapshot(11, (Replica(id="local/m", url="u", model="m"),)), 11.0)
            loading.update(Snapshot(12, (Replica(id="local/m", url="", model="m", state=State.COLD),)), 12.0)
    finally:
        log.removeHandler(handler)

    lines = [line[20:] for line in out.getvalue().splitlines()]
    assert lines == [
        "local/m: loading, about 40 s left",
        "local/m: 30 % loaded, about 7 s left",
        "local/m: 60 % loaded, about 4 s left",
        "local/m: 90 % loaded, about 1 s left",
        "local/m: ready after 11.0 s",
        "local/m: cold",
    ]


def test_a_log_line_cannot_control_the_terminal() -> None:
    out = io.StringIO()
    LogHandler(Console(file=out, width=200)).emit(
        logging.LogRecord("promptai", logging.INFO, "", 0, "[red]a\x1b[2Jb", None, None)
    )

    assert "[red]a?[2Jb" in out.getvalue()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "lost"), OSError(errno.ENOSPC, "full")])
def test_ignores_a_log_line_that_cannot_be_written(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Failing()
    console = Console(file=out, width=200)
    monkeypatch.setattr("os.dup2", lambda *_: None)  # rich would redirect stdout
    handler = LogHandler(console)
    out.error = error

    for number in range(3):
        handler.emit(logging.LogRecord("promptai", logging.INFO, "", 0, f"lost {number}", None, None))
    handler.emit(logging.LogRecord("promptai", logging.INFO, "", 0, "%d", ("no number",), None))
    out.error = None
    handler.emit(logging.LogRecord("promptai", logging.INFO, "", 0, "found", None, None))

    assert "lost" not in out.getvalue()
    assert out.getvalue().count("found") == (not isinstance(error, BrokenPipeError))


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "lost")])
def test_a_lost_terminal_does_not_end_the_gateway(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Failing()
    monkeypatch.setattr("os.dup2", lambda *_: None)
    with LoadingProgress(Console(file=out, width=200, force_terminal=True)) as loading:
        loading.update(Snapshot(0, (LOADING,)), 0.0)
        out.error = error
        loading.update(Snapshot(1, (msgspec.structs.replace(LOADING, progress=0.5),)), 1.0)


def test_a_bar_disappears_with_its_replica_and_shows_only_a_known_share() -> None:
    out = io.StringIO()
    with LoadingProgress(Console(file=out, width=200, force_terminal=True)) as loading:
        loading.update(Snapshot(0, (LOADING,)), 0.0)
        unknown = out.getvalue()
        loading.update(Snapshot(1, (msgspec.structs.replace(LOADING, progress=0.4),)), 1.0)
        known = out.getvalue()
        loading.update(Snapshot(2, ()), 2.0)
        left = len(out.getvalue())
        loading.update(Snapshot(3, ()), 3.0)

    assert "loading local/m" in unknown
    assert "%" not in unknown
    assert "40 %" in known
    assert "loading" not in out.getvalue()[left:]


def test_the_example_uses_a_model_that_is_available() -> None:
    down = Replica(id="a", url="u", model="gone", state=State.DOWN)
    cold = Replica(id="b", url="", model="cold", state=State.COLD)

    assert example_model([down, Replica(id="c", url="u", model=""), cold, READY]) == "cold"
    assert example_model([down, Replica(id="c", url="u", model="", state=State.LOADING)]) == "default"
    assert example_model([]) == "default"


def test_reports_in_one_line_why_no_model_is_available() -> None:
    down = Replica(id="local/m", url="", model="m", state=State.DOWN, reason="needs 9.0 GiB of memory")

    assert why_unavailable([down, READY]) == ""
    assert why_unavailable([down]) == "no model is available yet: local/m: needs 9.0 GiB of memory"
    assert why_unavailable([down, down, down]).endswith("needs 9.0 GiB of memory (2 more replicas are not available)")
    assert why_unavailable([]) == "no model is available yet: no board has answered"


@pytest.mark.parametrize(
    ("host", "url"), [("2001:db8::5", "http://[2001:db8::5]:8400"), ("192.0.2.5", "http://192.0.2.5:8400")]
)
def test_the_url_for_other_machines_is_valid(host: str, url: str) -> None:
    assert external_url(host, 8400) == url
