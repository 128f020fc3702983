import os
import time
from pathlib import Path

import msgspec
import pytest

from promptai.device.sample import Sample
from promptai.device.telemetry import Telemetry, TelemetryCost, read_samples
from promptai.errors import RunError


def wait_for(path: Path, count: int) -> None:
    """Wait until the file has ``count`` lines."""
    give_up = time.monotonic() + 20
    while path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.mark.real
def test_an_unwritable_file_is_an_error_at_the_start(tmp_path: Path) -> None:
    """Before an hour of measuring, not after it."""
    with pytest.raises(RunError, match="No such file or directory"), Telemetry() as telemetry:
        telemetry.start(tmp_path / "absent" / "telemetry.jsonl")


@pytest.mark.real
def test_a_full_disk_does_not_stop_the_measurement() -> None:
    """It is reported as a value at the end, never as an exception in between."""
    with Telemetry().start(Path("/dev/full"), interval_s=0.05) as telemetry:
        assert telemetry._process is not None
        telemetry._process.wait(timeout=20)
        telemetry.watch(os.getpid())

    assert telemetry.cost is not None
    assert telemetry.cost.samples == 0
    assert "No space left on device" in (telemetry.cost.error or "")


@pytest.mark.real
def test_a_killed_sampler_has_no_figures(tmp_path: Path) -> None:
    """After the out-of-memory killer the figures are None, not 0."""
    telemetry = Telemetry().start(tmp_path / "telemetry.jsonl")
    assert telemetry._process is not None
    telemetry._process.kill()
    telemetry._process.wait()

    telemetry.watch(os.getpid())

    assert telemetry.stop() == TelemetryCost(error="the sampler ended with code -9")


def test_telemetry_that_never_started_can_be_stopped() -> None:
    """A failed start needs no special handling."""
    with Telemetry() as telemetry:
        telemetry.watch(1)

    assert telemetry.stop() == TelemetryCost(error="telemetry was never started")


@pytest.mark.real
def test_the_engine_can_be_switched_while_sampling(tmp_path: Path) -> None:
    """One sampler serves several engines in turn."""
    path = tmp_path / "telemetry.jsonl"
    begin = time.monotonic()
    with Telemetry().start(path, interval_s=0.05, origin=begin - 1e-05) as telemetry:
        wait_for(path, 1)
        telemetry.watch(os.getpid())
        wait_for(path, 4)
        telemetry.watch(None)
        wait_for(path, path.read_bytes().count(b"\n") + 2)
        with pytest.raises(RuntimeError, match="only once"):
            telemetry.start(path)
    samples = read_samples(path)
    sizes = [sample.engine_rss_bytes for sample in samples]

    assert 0 < samples[0].t < samples[-1].t < time.monotonic() - begin + 1
    assert (sizes[0], sizes[-1]) == (None, None)
    assert any(sizes)
    assert telemetry.cost is not None
    assert (telemetry.cost.samples, telemetry.cost.error) == (len(samples), None)
    assert telemetry.stop() is telemetry.cost


def test_a_truncated_last_line_is_left_out(tmp_path: Path) -> None:
    """A crash in the middle of a line loses only that line."""
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(b'{"t":1.0,"cpu_percent":50.0,"later_version":1}\n{"t":2.0,"cpu_per')

    assert read_samples(path) == [Sample(t=1.0, cpu_percent=50.0)]


def test_a_malformed_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    """That is not the trace of a crash but damage, and must not go unnoticed."""
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(b'{"t":1.0}\nhello\n{"t":2.0}\n')

    with pytest.raises(RunError, match="line 2"):
        read_samples(path)


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    """From a sampler that was stopped at once."""
    (tmp_path / "telemetry.jsonl").touch()

    assert read_samples(tmp_path / "telemetry.jsonl") == []


def test_missing_values_are_written_as_null() -> None:
    """A reader sees that the field exists and has no value."""
    assert b'"watts":null' in msgspec.json.encode(Sample(t=1.0))
