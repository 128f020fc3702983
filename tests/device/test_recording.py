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
    """The telemetry file."""
    return tmp_path / "telemetry.jsonl"


class Child:
    """A sampler process, started from the command line."""

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
        """Wait until the file has ``count`` lines."""
        give_up = time.monotonic() + 20
        while not self.out.exists() or self.out.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.005)

    def send(self, line: str) -> None:
        """Write a line to the sampler's input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def end(self, line: str = "") -> tuple[int, str, str]:
        """Write a last line and close the input; returns exit code, output and errors."""
        stdout, stderr = self.process.communicate(line, timeout=20)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def child(out: Path) -> Iterator[Child]:
    """A sampler watching this test's process."""
    child = Child(out)
    child.send(f'{{"watch": {os.getpid()}}}\n')
    yield child
    child.process.kill()
    child.process.communicate()


@pytest.mark.real
def test_an_unwritable_file_exits_with_3(tmp_path: Path) -> None:
    """One line on standard error, nothing on standard output."""
    code, stdout, stderr = Child(tmp_path / "absent" / "telemetry.jsonl").end()

    assert (code, stdout, stderr.count("\n")) == (EXIT_UNWRITABLE, "", 1)
    assert "No such file or directory" in stderr


@pytest.mark.real
def test_a_full_disk_exits_with_3_and_reports_the_cost() -> None:
    """Writes to /dev/full fail as on a full disk."""
    child = Child(Path("/dev/full"))
    child.process.wait(timeout=20)

    code, stdout, stderr = child.end()

    assert (code, json.loads(stdout)["samples"]) == (EXIT_UNWRITABLE, 0)
    assert "No space left on device" in stderr


@pytest.mark.real
def test_an_unknown_command_exits_with_2(child: Child) -> None:
    """A misspelt "wach" fails at once instead of leaving a column empty."""
    child.wait_for_samples(1)

    code, _, stderr = child.end('{"wach": 5}\n')

    assert code == EXIT_USAGE
    assert "wach" in stderr


@pytest.mark.real
@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "often"])
def test_rejects_an_invalid_interval(out: Path, interval: str) -> None:
    """Before anything is written."""
    code, _, stderr = Child(out, f"--interval={interval}").end()

    assert code == EXIT_USAGE
    assert "--interval" in stderr
    assert not out.exists()


@pytest.mark.real
def test_stops_at_end_of_input(child: Child) -> None:
    """A parent killed with SIGKILL sends no command, but its pipes close."""
    child.wait_for_samples(2)

    code, stdout, _ = child.end()

    assert code == 0
    assert json.loads(stdout)["samples"] == len(read_samples(child.out)) >= 2


@pytest.mark.real
def test_ignores_sigint_and_stops_on_sigterm(child: Child) -> None:
    """Ctrl-C reaches all processes of the terminal; the parent decides what to do."""
    child.wait_for_samples(1)
    child.process.send_signal(signal.SIGINT)
    child.wait_for_samples(len(read_samples(child.out)) + 2)

    child.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = child.end()

    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["samples"] == len(read_samples(child.out))


@pytest.mark.real
def test_takes_at_most_one_sample_per_interval_and_reports_its_cost(child: Child) -> None:
    """The samples' times are on the clock of this process."""
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
    """After a delay of a third of an interval, the next sample is due in two thirds."""
    assert next_deadline(10.0, 1.0, 10.0) == 11.0
    assert next_deadline(10.0, 1.0, 12.3) == 13.0


def test_missed_deadlines_are_left_out() -> None:
    """After a stall of five intervals there is one sample, not five."""
    assert next_deadline(0.0, 2.0, 11.0) == 12.0


def test_a_truncated_last_line_is_removed_before_appending(out: Path) -> None:
    """A resumed run must not join two samples."""
    out.write_bytes(b'{"t":1.0}\n{"t":2.0,"cpu_p')

    os.close(open_out(out))

    assert out.read_bytes() == b'{"t":1.0}\n'


@pytest.mark.parametrize("count", [1, 300, 8191, 8192, 8193, 100_000])
@pytest.mark.parametrize("half", [b"", b'{"t":2.0,"cpu_p'], ids=["whole-line", "half-a-line"])
def test_nuls_left_by_a_power_cut_are_removed(out: Path, half: bytes, count: int) -> None:
    """A journalling file system may keep the size and lose the data, one page or many."""
    out.write_bytes(b'{"t":1.0}\n' + half + bytes(count))

    os.close(open_out(out))

    assert out.read_bytes() == b'{"t":1.0}\n'


@pytest.mark.parametrize("count", [0, 10, 20_000])
def test_a_file_of_only_nuls_becomes_empty(out: Path, count: int) -> None:
    """All data was lost."""
    out.write_bytes(bytes(count))

    os.close(open_out(out))

    assert out.read_bytes() == b""


@pytest.mark.parametrize("content", [b"notes about my dog", b"{" * 9000, b"notes" + bytes(9000)])
def test_a_file_that_is_not_telemetry_is_left_unchanged(out: Path, content: bytes) -> None:
    """A wrong path must not damage a user's file."""
    out.write_bytes(content)

    with pytest.raises(OSError, match="another file"):
        open_out(out)

    assert out.read_bytes() == content
