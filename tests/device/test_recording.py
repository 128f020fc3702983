import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptai.device.recording import EXIT_UNWRITABLE, EXIT_USAGE, next_deadline, open_out
from promptai.device.telemetry import read_samples

INTERVAL_S = 0.05


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the samples go."""
    return tmp_path / "telemetry.jsonl"


class Child:
    """A sampler process on the command line, told to begin and waited for."""

    def __init__(self, out: Path, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "promptai.device.telemetry", "--out", str(out)]
        self.out = out
        self.process = subprocess.Popen(
            [*command, "--interval", str(INTERVAL_S), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_samples(self, count: int) -> None:
        """Wait until the file holds that many lines."""
        give_up = time.monotonic() + 20
        while not self.out.exists() or self.out.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.005)

    def say(self, line: str) -> None:
        """Write a line to its input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def end(self, line: str = "") -> tuple[int, str, str]:
        """Say the last line, close the input; give exit code, output and errors."""
        stdout, stderr = self.process.communicate(line, timeout=20)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def child(out: Path) -> Iterator[Child]:
    """A sampler that watches this test's process."""
    child = Child(out)
    child.say(f'{{"watch": {os.getpid()}}}\n')
    yield child
    child.process.kill()
    child.process.communicate()


@pytest.mark.real
def test_a_file_that_cannot_be_opened_ends_it_with_3(tmp_path: Path) -> None:
    """One line says why; nothing is on standard output."""
    code, stdout, stderr = Child(tmp_path / "absent" / "telemetry.jsonl").end()

    assert (code, stdout, stderr.count("\n")) == (EXIT_UNWRITABLE, "", 1)
    assert "No such file or directory" in stderr


@pytest.mark.real
def test_a_full_disk_ends_it_with_3_and_the_cost() -> None:
    """/dev/full fails each write as a full disk does."""
    child = Child(Path("/dev/full"))
    child.process.wait(timeout=20)

    code, stdout, stderr = child.end()

    assert (code, json.loads(stdout)["samples"]) == (EXIT_UNWRITABLE, 0)
    assert "No space left on device" in stderr


@pytest.mark.real
def test_an_unknown_command_ends_it_with_2(child: Child) -> None:
    """Whoever says "wach" learns it at once, not from an empty column."""
    child.wait_for_samples(1)

    code, _, stderr = child.end('{"wach": 5}\n')

    assert code == EXIT_USAGE
    assert "wach" in stderr


@pytest.mark.real
@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "often"])
def test_an_interval_that_makes_no_sense_is_refused(out: Path, interval: str) -> None:
    """Before anything is written."""
    code, _, stderr = Child(out, f"--interval={interval}").end()

    assert code == EXIT_USAGE
    assert "--interval" in stderr
    assert not out.exists()


@pytest.mark.real
def test_the_end_of_its_input_ends_it(child: Child) -> None:
    """A parent killed with SIGKILL says nothing, but its pipes close."""
    child.wait_for_samples(2)

    code, stdout, _ = child.end()

    assert code == 0
    assert json.loads(stdout)["samples"] == len(read_samples(child.out)) >= 2


@pytest.mark.real
def test_sigint_is_ignored_and_sigterm_ends_it_properly(child: Child) -> None:
    """Ctrl-C goes to the whole terminal; the parent decides what it means."""
    child.wait_for_samples(1)
    child.process.send_signal(signal.SIGINT)
    child.wait_for_samples(len(read_samples(child.out)) + 2)

    child.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = child.end()

    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["samples"] == len(read_samples(child.out))


@pytest.mark.real
def test_samples_are_never_too_many_and_know_their_cost(child: Child) -> None:
    """At most one for each interval, in a time that this process shares."""
    child.wait_for_samples(8)
    _, stdout, _ = child.end('{"stop": true}\n')
    now = time.monotonic()

    samples = read_samples(child.out)
    times = [sample.t for sample in samples]
    cost = json.loads(stdout)

    assert times == sorted(set(times))
    assert now - 20 < times[0] < times[-1] < now
    assert len(times) <= cost["wall_s"] / INTERVAL_S + 1
    assert all(sample.engine_anon_bytes for sample in samples)
    assert cost.keys() == {
        "samples",
        "cpu_s",
        "wall_s",
        "cpu_percent_of_one_core",
        "max_rss_bytes",
        "energy_source",
    }
    assert cost["max_rss_bytes"] <= 30 * 1024 * 1024


def test_deadlines_do_not_drift() -> None:
    """Late by a third of an interval, the next one is two thirds away."""
    assert next_deadline(10.0, 1.0, 10.0) == 11.0
    assert next_deadline(10.0, 1.0, 12.3) == 13.0


def test_missed_deadlines_are_left_out() -> None:
    """After a stall of five intervals there is one sample, not five."""
    assert next_deadline(0.0, 2.0, 11.0) == 12.0


def test_half_a_line_is_cut_off_before_more_are_written(out: Path) -> None:
    """A resumed run must not glue two samples together."""
    out.write_bytes(b'{"t":1.0}\n{"t":2.0,"cpu_p')

    os.close(open_out(out))

    assert out.read_bytes() == b'{"t":1.0}\n'


@pytest.mark.parametrize("count", [1, 300, 8191, 8192, 8193, 100_000])
@pytest.mark.parametrize("half", [b"", b'{"t":2.0,"cpu_p'], ids=["whole-line", "half-a-line"])
def test_nuls_that_a_power_cut_left_are_cut_off(out: Path, half: bytes, count: int) -> None:
    """A journalling file system may keep the size and lose the data, a page or many of them."""
    out.write_bytes(b'{"t":1.0}\n' + half + bytes(count))

    os.close(open_out(out))

    assert out.read_bytes() == b'{"t":1.0}\n'


@pytest.mark.parametrize("count", [0, 10, 20_000])
def test_a_file_of_nothing_but_nuls_begins_anew(out: Path, count: int) -> None:
    """All of it was lost."""
    out.write_bytes(bytes(count))

    os.close(open_out(out))

    assert out.read_bytes() == b""


@pytest.mark.parametrize("content", [b"notes about my dog", b"{" * 9000, b"notes" + bytes(9000)])
def test_a_file_that_is_something_else_is_not_touched(out: Path, content: bytes) -> None:
    """A wrong path must not cost anybody their text."""
    out.write_bytes(content)

    with pytest.raises(OSError, match="another file"):
        open_out(out)

    assert out.read_bytes() == content
