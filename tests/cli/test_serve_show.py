"""What ``promptai serve`` prints."""

import io
import json
import logging
import shlex

import msgspec
import pytest
from rich.console import Console

from promptai.cli.serve_show import Loading, LogHandler, curl_line, explain, table, troubles
from promptai.fleet.replica import Rates, Replica, Snapshot, State
from promptai.fleet.static import Target

READY = Replica(id="pi-1:80", url="http://pi-1:80", model="m", slots=2, context=4096, rates=Rates(prefill_tps=60.0))
LOADING = Replica(id="local/m", url="", model="m", state=State.LOADING, load_s=40.0)


def plain(thing: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(thing)
    return out.getvalue()


def test_names_from_outside_are_shown_as_they_are() -> None:
    shown = plain(table([Replica(id="[red]x", url="u", model="[bold]m")], [], []))

    assert "[bold]m" in shown
    assert "[red]x" in shown


def test_a_board_that_has_not_answered_yet_is_in_the_table() -> None:
    shown = plain(table([READY], [], [Target("http://pi-1:80"), Target("http://pi-2:80/v1")]))

    assert "2×4096" in shown  # noqa: RUF001
    assert shown.count("pi-1") == 1
    assert "pi-2:80" in shown


def test_who_is_down_is_told_with_the_reason() -> None:
    down = Replica(id="pi-3:80", url="u", model="", state=State.DOWN, reason="does not answer")

    assert troubles([READY, down]) == ["pi-3:80: does not answer"]
    assert "learned" in explain([READY], None)


@pytest.mark.parametrize("model", ["m", "it's", 'a $HOME `id` "b"'])
def test_the_curl_line_survives_a_shell(model: str) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8400", model, "$PROMPTAI_API_KEY"))

    assert words[:2] == ["curl", "http://127.0.0.1:8400/v1/chat/completions"]
    assert "Authorization: Bearer $PROMPTAI_API_KEY" in words
    assert json.loads(words[-1])["model"] == model


def test_without_a_terminal_loading_is_a_line_a_quarter_and_one_at_the_end() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    log = logging.getLogger("promptai.serve")
    handler = LogHandler(console)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with Loading(console) as loading:
            for now in range(11):
                replica = msgspec.structs.replace(LOADING, progress=now / 10 if now else None)
                loading.look(Snapshot(now, (replica,)), float(now))
            loading.look(Snapshot(11, (Replica(id="local/m", url="u", model="m"),)), 11.0)
            loading.look(Snapshot(12, (Replica(id="local/m", url="", model="m", state=State.COLD),)), 12.0)
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


def test_a_log_line_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    LogHandler(Console(file=out, width=200)).emit(
        logging.LogRecord("promptai", logging.INFO, "", 0, "[red]a\x1b[2Jb", None, None)
    )

    assert "[red]a?[2Jb" in out.getvalue()
