import os
import time
from pathlib import Path

import msgspec
import pytest

from promptai.device.sample import Sample
from promptai.device.telemetry import Telemetry, TelemetryCost, read_samples
from promptai.errors import RunError


def wait_for(path: Path, count: int) -> None:
    """Wait until the file holds that many lines."""
    give_up = time.monotonic() + 20
    while path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.mark.real
def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    """Before an hour of measuring, not after it."""
    with pytest.raises(RunError, match="No such file or directory"), Telemetry() as telemetry:
        telemetry.start(tmp_path / "absent" / "telemetry.jsonl")


@pytest.mark.real
def test_a_full_disk_does_not_end_the_measurement() -> None:
    """It is a value in the end, never an exception in the middle."""
    with Telemetry().start(Path("/dev/full"), interval_s=0.05) as telemetry:
        assert telemetry._process is not None
        telemetry._process.wait(timeout=20)
        telemetry.watch(os.getpid())

    assert telemetry.cost is not None
    assert telemetry.cost.samples == 0
    assert "No space left on device" in (telemetry.cost.error or "")


@pytest.mark.real
def test_a_sampler_that_was_killed_has_no_figures(tmp_path: Path) -> None:
    """The memory killer leaves no time for last words; None, not 0."""
    telemetry = Telemetry().start(tmp_path / "telemetry.jsonl")
    assert telemetry._process is not None
    telemetry._process.kill()
    telemetry._process.wait()

    telemetry.watch(os.getpid())

    assert telemetry.stop() == TelemetryCost(error="the sampler ended with code -9")


def test_a_telemetry_that_never_started_can_be_stopped() -> None:
    """So that a failed start needs no special care."""
    with Telemetry() as telemetry:
        telemetry.watch(1)

    assert telemetry.stop() == TelemetryCost(error="telemetry was never started")


@pytest.mark.real
def test_the_engine_is_switched_while_sampling(tmp_path: Path) -> None:
    """One telemetry serves several engines, one after the other."""
    path = tmp_path / "telemetry.jsonl"
    begin = time.monotonic()
    with Telemetry().start(path, interval_s=0.05, origin=begin - 1e-05) as telemetry:
        wait_for(path, 1)
        telemetry.watch(os.getpid())
        wait_for(path, 4)
        telemetry.watch(None)
        wait_for(path, path.read_bytes().count(b"\n") + 2)
        with pytest.raises(RuntimeError, match="before"):
            telemetry.start(path)
    samples = read_samples(path)
    sizes = [sample.engine_rss_bytes for sample in samples]

    assert 0 < samples[0].t < samples[-1].t < time.monotonic() - begin + 1
    assert (sizes[0], sizes[-1]) == (None, None)
    assert any(sizes)
    assert telemetry.cost is not None
    assert (telemetry.cost.samples, telemetry.cost.error) == (len(samples), None)
    assert telemetry.stop() is telemetry.cost


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    """A crash in the middle of a line loses that line alone."""
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(b'{"t":1.0,"cpu_percent":50.0,"later_version":1}\n{"t":2.0,"cpu_per')

    assert read_samples(path) == [Sample(t=1.0, cpu_percent=50.0)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    """That is no crash but damage, and silence would hide it."""
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(b'{"t":1.0}\nhello\n{"t":2.0}\n')

    with pytest.raises(RunError, match="line 2"):
        read_samples(path)


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    """A sampler that was stopped at once."""
    (tmp_path / "telemetry.jsonl").touch()

    assert read_samples(tmp_path / "telemetry.jsonl") == []


def test_what_a_board_does_not_have_is_written_as_null() -> None:
    """A reader sees that the field exists and has no value."""
    assert b'"watts":null' in msgspec.json.encode(Sample(t=1.0))
