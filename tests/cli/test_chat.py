"""``promptai chat`` in a terminal and with piped input."""

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from promptai.cli.chat import AnswerStats, _GatewayStatus, describe_stage
from promptai.cli.terminal_text import one_line, strip_controls
from promptai.wire.openai import ChunkChoice, CompletionChunk, Delta, Usage
from support_cli import PROMPTAI, clean_environment, promptai, simulated
from support_gateway_process import Served, serving

#: Terminal escape sequences: colours and the status line.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


class Terminal:
    """A terminal: types input and collects output."""

    def __init__(self, master: int) -> None:
        self._master = master
        self.shown = ""

    def type(self, text: str) -> None:
        """Type text."""
        self.type_bytes(text.encode())

    def type_bytes(self, data: bytes) -> None:
        """Type bytes in another encoding."""
        os.write(self._master, data)

    def until(self, pattern: str, *, after: int = 0, seconds: float = 30.0) -> str:
        """Wait for a pattern; return the output up to and including it."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown[after:], re.DOTALL)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.shown += _ESCAPES.sub("", os.read(self._master, 65536).decode("utf-8", "replace"))
        return self.shown[after : after + match.end()]


@contextlib.contextmanager
def chatting(*arguments: str, cwd: Path) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    """Run ``promptai chat`` in a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*PROMPTAI, "chat", *arguments],
        cwd=cwd,
        env=clean_environment() | {"TERM": "xterm", "COLUMNS": "200"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_own_terminal,  # noqa: PLW1509  no threads before exec
    )
    os.close(slave)
    try:
        yield Terminal(master), process
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _own_terminal() -> None:
    """Make the terminal the controlling one, so that Ctrl-C sends a signal."""
    import fcntl  # noqa: PLC0415
    import termios  # noqa: PLC0415

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two boards of known speed behind a gateway."""
    folder = tmp_path_factory.mktemp("chat")
    with simulated("--decode-tps", "20", "--prefill-tps", "200", "--answer-tokens", "30", cwd=folder) as board:
        (folder / "promptai.toml").write_text(
            f"[[fleet]]\nurl = '{board}'\nname = 'shelf'\n[aliases.fast]\nmodel = 'simulated'\n"
        )
        with serving(cwd=folder) as served:
            served.ready()
            yield served


@pytest.mark.real
def test_a_conversation_shows_statistics_and_runs_commands(gateway: Served, tmp_path: Path) -> None:
    with chatting("--url", gateway.url, cwd=tmp_path) as (terminal, process):
        terminal.until(r"simulated at http.*\n> ")
        terminal.type("How is the mast?\n")
        first = terminal.until(r"tokens/s, first token after [\d.]+ s, 0 of \d+ prompt tokens from the cache, by shelf")
        begun = len(terminal.shown)
        terminal.type("And now?\n")
        second = terminal.until(r"\d+ of \d+ prompt tokens from the cache, by shelf", after=begun)
        terminal.type("/model fats\n")
        terminal.until(r"the server has no model named fats \(did you mean fast\?\)")
        terminal.type("/model fast\n")
        terminal.until("fast, same conversation")
        terminal.type("/model\n")
        terminal.until(r"  simulated\s+\* fast")
        terminal.type("/new\n")
        terminal.until("new conversation")
        terminal.type("/nonsense\n")
        terminal.until("unknown command /nonsense.*/quit")
        terminal.type("/quit\n")

        assert process.wait(10) == 0

    cached = re.search(r"(\d+) of (\d+) prompt tokens from the cache, by shelf", second)
    assert re.search(r"(1[5-9]|2[0-5])\.\d tokens/s", first)
    assert cached is not None
    assert 0 < int(cached[1]) < int(cached[2])


@pytest.mark.real
def test_ctrl_c_stops_the_answer_and_not_the_program(gateway: Served, tmp_path: Path) -> None:
    with chatting("--url", gateway.url, cwd=tmp_path) as (terminal, process):
        terminal.until(r"\n> ")
        begun = len(terminal.shown)
        time.sleep(0.3)  # input() misses a signal that arrives just as it starts to wait
        terminal.type("\x03")
        terminal.until(r"\n> ", after=begun)
        terminal.type("Tell me everything about the uplink.\n")
        terminal.until(r"uplink\.\r\n.*\w+ \w+ \w+", after=begun)
        terminal.type("\x03")
        terminal.until(r"stopped\r\n\r?\n> ", after=begun)
        terminal.type("\x04")

        assert process.wait(10) == 0


@pytest.mark.real
def test_piped_input_is_one_question_and_prints_only_the_answer(gateway: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROMPTAI, "chat", "--url", f"{gateway.url}/v1", "--system", "Be brief."],
        check=True,
        cwd=tmp_path,
        env=clean_environment(),
        input="How is\nthe mast?\n",
        capture_output=True,
        text=True,
    )

    assert done.stderr == ""
    assert len(done.stdout.split()) > 10
    assert done.stdout.endswith("\n")


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ((), 4, "no server answers at {nowhere} (start a gateway with promptai serve)"),
        (("--budget", "soon"), 2, "invalid duration"),
    ],
)
def test_reports_a_mistake_in_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int, word: str) -> None:
    nowhere = "http://127.0.0.1:9"

    done = promptai("chat", "--url", nowhere, *arguments, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (code, "")
    assert word.format(nowhere=nowhere) in done.stderr


@pytest.mark.real
def test_an_unknown_model_is_reported_with_the_closest_name(gateway: Served, tmp_path: Path) -> None:
    done = promptai("chat", "simulatde", "--url", gateway.url, cwd=tmp_path)

    assert done.returncode == 3
    assert done.stderr == "promptai: error: the server has no model named simulatde (did you mean simulated?)\n"


@pytest.mark.real
def test_a_missing_key_is_reported(tmp_path: Path) -> None:
    with serving("--simulate", "1", "--host", "0.0.0.0", cwd=tmp_path) as served:  # noqa: S104  it demands a key
        key = served.line("API key: ").removeprefix("API key: ")
        refused = promptai("chat", "--url", served.url, cwd=tmp_path)
        answered = subprocess.run(
            [*PROMPTAI, "chat", "--url", served.url],
            check=True,
            env=clean_environment() | {"PROMPTAI_API_KEY": key},
            input="Hello?",
            capture_output=True,
            text=True,
        )

    assert refused.returncode == 4
    assert "requires an API key (set PROMPTAI_API_KEY)" in refused.stderr
    assert answered.stdout.strip()


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "typed", "word"),
    [
        (("simulated", "--budget", "10s"), b"Hello?", "--budget chooses the model and cannot be combined with MODEL"),
        (("--system", os.fsdecode(b"Br\xfcsk")), b"Hello?", "--system is not UTF-8"),
        ((), b"Gr\xfc\xdfe", "standard input is not UTF-8 (byte 2)"),
    ],
)
def test_invalid_input_is_a_one_line_error(
    gateway: Served, tmp_path: Path, arguments: tuple[str, ...], typed: bytes, word: str
) -> None:
    done = subprocess.run(
        [*PROMPTAI, "chat", "--url", gateway.url, *arguments],
        check=False,
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONUTF8": "1"},
        input=typed,
        capture_output=True,
    )

    assert (done.returncode, done.stdout) == (2, b"")
    assert word in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.real
def test_typing_in_another_encoding_does_not_end_the_conversation(gateway: Served, tmp_path: Path) -> None:
    with chatting("--url", gateway.url, "--budget", "10s", cwd=tmp_path) as (terminal, process):
        terminal.until(r"\n> ")
        terminal.type_bytes(b"Gr\xfc\xdfe\n")
        terminal.until(r"the input is not UTF-8.*\n> ")
        terminal.type("/model fast\n")
        terminal.until("fast, same conversation; the budget applies only to auto")
        terminal.type("/quit\n")

        assert process.wait(10) == 0


def test_does_not_count_pieces_as_tokens() -> None:
    chunk = CompletionChunk(choices=[ChunkChoice(delta=Delta(content="a"))])
    stats = AnswerStats(began=0.0)
    stats.add(chunk, 1.0, has_text=True)
    stats.add(chunk, 2.0, has_text=True)
    before = stats.summary("shelf")
    stats.add(CompletionChunk(usage=Usage(prompt_tokens=3, completion_tokens=11)), 2.0, has_text=False)

    assert before == "first token after 1.0 s, by shelf"
    assert stats.summary(None) == "11 tokens, 10.0 tokens/s, first token after 1.0 s"


def test_the_status_of_a_gateway_cannot_control_the_terminal() -> None:
    out = io.StringIO()
    line = Console(file=out, force_terminal=True).status("asking")
    shown = _GatewayStatus()

    shown.update({"stage": "queued", "place": "\x1b[2J[bold]7"}, line)

    assert str(line.status) == "?[2J\\[bold]7 ahead of you"


@pytest.mark.parametrize(
    ("text", "shown", "named"),
    [
        ("a\x1b[2Jb\x07\x9b\x7f", "a[2Jb", "a?[2Jb???"),
        ("one\n\ttwo", "one\n\ttwo", "one??two"),
        ("\u202eevil", "evil", "?evil"),
        ("5\u00a0km", "5\u00a0km", "5?km"),
        ("naïve 基站", "naïve 基站", "naïve 基站"),
    ],
)
def test_removes_or_replaces_control_characters(text: str, shown: str, named: str) -> None:
    assert (strip_controls(text), one_line(text)) == (shown, named)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ({"stage": "queued", "place": 2, "left_s": 41.2}, "2 ahead of you, first token in about 41 s"),
        ({"stage": "queued", "place": 0}, "waiting"),
        ({"stage": "loading", "percent": 40, "left_s": 7.0}, "loading the model 40 %, first token in about 7 s"),
        ({"stage": "prefill", "percent": 12, "left_s": 0.4}, "reading the prompt 12 %"),
        ({"stage": "decode"}, ""),
        ({"x-promptai-replica": "pi-1"}, ""),
        ({"stage": "loading", "percent": "many", "left_s": None}, "loading the model"),
    ],
)
def test_describes_the_stage_of_a_request(status: dict[str, object], text: str) -> None:
    assert text == describe_stage(status)
