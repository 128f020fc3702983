import io
from typing import NamedTuple

import pytest
from rich.console import Console

from promptai.cli.transfer import Transfer


class Seen(NamedTuple):
    """A transfer, where it writes, and a clock that is set by hand."""

    transfer: Transfer
    output: io.StringIO
    time: list[float]


def shown(*, terminal: bool) -> Seen:
    output, time = io.StringIO(), [0.0]
    console = Console(file=output, force_terminal=terminal, width=100, highlight=False)
    return Seen(Transfer(console, clock=lambda: time[0]), output, time)


def test_without_a_terminal_there_is_a_plain_line_every_ten_seconds() -> None:
    transfer, output, time = shown(terminal=False)
    with transfer:
        transfer.begin("fetching a.gguf", 1_000_000_000, 400_000_000)
        for second in range(1, 26):
            time[0] = float(second)
            transfer.advance(2_000_000)

    assert output.getvalue().splitlines() == [
        "fetching a.gguf: 42% of 1.00 GB, 2.0 MB/s, 5 min left",
        "fetching a.gguf: 44% of 1.00 GB, 2.0 MB/s, 5 min left",
    ]


def test_a_size_that_nobody_knows_has_no_time_left() -> None:
    transfer, output, time = shown(terminal=False)
    with transfer:
        transfer.begin("fetching a.gguf", None)
        time[0] = 10.0
        transfer.advance(5_000_000)

    assert output.getvalue() == "fetching a.gguf: 5.0 MB, 500 kB/s\n"


def test_a_transfer_that_stands_still_promises_nothing() -> None:
    transfer, output, time = shown(terminal=False)
    with transfer:
        transfer.begin("fetching a.gguf", 1000, 500)
        time[0] = 10.0
        transfer.advance(0)

    assert output.getvalue() == "fetching a.gguf: 50% of 1 kB, 0 kB/s\n"


def test_on_a_terminal_rate_and_time_left_are_drawn() -> None:
    transfer, output, _ = shown(terminal=True)
    with transfer:
        transfer.begin("checking", 10)
        transfer.begin("fetching a.gguf", 2_000_000)
        transfer.advance(1_000_000)

    assert "fetching a.gguf" in output.getvalue()
    assert "1.0/2.0 MB" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_said_cannot_inject_markup_or_lines(*, terminal: bool) -> None:
    transfer, output, _ = shown(terminal=terminal)
    with transfer:
        transfer.notify("[bold]a\nb[/bold]")

    assert "[bold]a b[/bold]" in output.getvalue()
