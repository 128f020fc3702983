import io
from typing import NamedTuple

import pytest
from rich.console import Console

from promptai.cli.transfer import Transfer


class Seen(NamedTuple):
    """A transfer, its output, and a clock set by the test."""

    transfer: Transfer
    output: io.StringIO
    time: list[float]


def shown(*, terminal: bool) -> Seen:
    output, time = io.StringIO(), [0.0]
    console = Console(file=output, force_terminal=terminal, width=100, highlight=False)
    return Seen(Transfer(console, clock=lambda: time[0]), output, time)


def test_prints_a_plain_line_every_ten_seconds_without_a_terminal() -> None:
    transfer, output, time = shown(terminal=False)
    with transfer:
        transfer.begin("downloading a.gguf", 1_000_000_000, 400_000_000)
        for second in range(1, 26):
            time[0] = float(second)
            transfer.advance(2_000_000)

    assert output.getvalue().splitlines() == [
        "downloading a.gguf: 42 % of 954 MiB, 1.9 MiB/s, 5 min left",
        "downloading a.gguf: 44 % of 954 MiB, 1.9 MiB/s, 5 min left",
    ]


def test_an_unknown_size_has_no_time_left() -> None:
    transfer, output, time = shown(terminal=False)
    with transfer:
        transfer.begin("downloading a.gguf", None)
        time[0] = 10.0
        transfer.advance(5_000_000)

    assert output.getvalue() == "downloading a.gguf: 4.8 MiB, 488 KiB/s\n"


def test_a_stalled_transfer_has_no_time_left() -> None:
    transfer, output, time = shown(terminal=False)
    with transfer:
        transfer.begin("downloading a.gguf", 1000, 500)
        time[0] = 10.0
        transfer.advance(0)

    assert output.getvalue() == "downloading a.gguf: 50 % of 1 KiB, 0 KiB/s\n"


def test_draws_rate_and_time_left_on_a_terminal() -> None:
    transfer, output, _ = shown(terminal=True)
    with transfer:
        transfer.begin("checking", 10)
        transfer.begin("downloading a.gguf", 2_000_000)
        transfer.advance(1_000_000)

    assert "downloading a.gguf" in output.getvalue()
    assert "1.0/1.9 MiB" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_messages_cannot_inject_markup_or_lines(*, terminal: bool) -> None:
    transfer, output, _ = shown(terminal=terminal)
    with transfer:
        transfer.notify("[bold]a\nb[/bold]")

    assert "[bold]a b[/bold]" in output.getvalue()
