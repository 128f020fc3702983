"""Watch machine and engine from a process of its own, and read back what it saw.

The measuring side of ``recording``: starts it, tells it which engine to watch,
stops it and hears what it cost. Telemetry serves the measurement, never the
other way round. A file that cannot be opened is said at the start, while
nothing has been measured yet; whatever goes wrong later (disk full, sampler
killed for memory) must not cost an hour of results, so it is reported by
``stop`` as a value and never raised.

    with Telemetry().start(run_dir / "telemetry.jsonl") as telemetry:
        telemetry.watch(engine_pid)
        ...
    print(telemetry.cost)

The module is also the command line of the sampler: ``python -m
promptai.device.telemetry --out FILE`` samples until its standard input ends.
"""

import contextlib
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from promptai.device.sample import Command, Sample, SamplerCost
from promptai.errors import RunError
from promptai.wire.malformed import MALFORMED

__all__ = ["Sample", "Telemetry", "TelemetryCost", "read_samples"]

#: The sampler starts in 0.1 s on a PC; from a cold SD card under load it may take seconds.
_START_TIMEOUT_S = 30.0
#: The sampler may be waiting 2 s for each of two firmware answers when it is told to stop.
_STOP_TIMEOUT_S = 6.0


class TelemetryCost(msgspec.Struct, frozen=True, kw_only=True):
    """
    What the telemetry of one measurement cost, and how it ended.

    Attributes:
        samples: Samples written; ``None``, like all figures here, when the sampler died without a word.
        cpu_s: CPU seconds since its first sample.
        wall_s: Seconds since its first sample.
        cpu_percent_of_one_core: 100 · cpu_s / wall_s.
        max_rss_bytes: The most memory it held.
        energy_source: Where ``Sample.watts`` came from: "rapl_package", "pmic_rails" or "none".
        error: Why it ended before it was told to, one line; ``None`` when it did not.
    """

    samples: int | None = None
    cpu_s: float | None = None
    wall_s: float | None = None
    cpu_percent_of_one_core: float | None = None
    max_rss_bytes: int | None = None
    energy_source: str | None = None
    error: str | None = None


class Telemetry:
    """
    One sampler process. Start it once; leaving the ``with`` block stops it.

    Not for use from several threads at once.

    Attributes:
        cost: What it cost; ``None`` until it has been stopped.
    """

    def __init__(self) -> None:
        self.cost: TelemetryCost | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, path: Path, interval_s: float = 1.0, *, origin: float = 0.0) -> Self:
        """
        Start sampling into ``path``; returns when the sampler is running.

        Args:
            path: Appended to; an existing file is continued.
            interval_s: Seconds between samples, at least 0.02. A Pi 5's power chip takes 0.1 s to answer, so
                below about 0.2 s its samples are late.
            origin: The second of ``time.monotonic()`` that is 0 in the samples; lets a run that was resumed,
                perhaps after a reboot, go on with its own clock.

        Raises:
            RunError: The file cannot be written, or the sampler does not start.
        """
        if self._process is not None:
            raise RuntimeError("this telemetry was started before")
        ready, started = os.pipe()
        try:
            self._process = _spawn(path, interval_s, origin, started)
        finally:
            os.close(started)
        try:
            # It writes one byte when it samples; without one it died, or hangs.
            alive = bool(select.select([ready], [], [], _START_TIMEOUT_S)[0]) and os.read(ready, 1) != b""
        finally:
            os.close(ready)
        if not alive:
            reason = self.stop().error or "it did not begin in time"
            raise RunError(
                f"telemetry does not start: {reason}",
                hint=f"see that {path} can be written and its disk has room",
            )
        return self

    def watch(self, pid: int | None) -> None:
        """Watch another process and its descendants from now on; ``None`` watches none."""
        process = self._process
        if process is None or process.stdin is None or process.stdin.closed:
            return
        # A broken pipe is a sampler that has ended early; stop() will say why.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(Command(watch=pid)) + b"\n")

    def stop(self) -> TelemetryCost:
        """End the sampler and say what it cost; never raises, and a second call says the same again."""
        if self.cost is not None:
            return self.cost
        process = self._process
        if process is None:
            return TelemetryCost(error="telemetry was never started")
        try:
            out, err = process.communicate(msgspec.json.encode(Command(stop=True)) + b"\n", _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        self.cost = _cost(out, err, process.returncode)
        return self.cost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def read_samples(path: Path) -> list[Sample]:
    """
    Read a telemetry file; a last line that a crash or power cut left unfinished is left out.

    No file is no samples: a run can be shared without its telemetry.

    Raises:
        OSError: The file cannot be read.
        RunError: Another line is no sample; names it.
    """
    decoder = msgspec.json.Decoder(Sample)
    lines = path.read_bytes().splitlines() if path.exists() else []
    samples: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(decoder.decode(line))
        except MALFORMED as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not a telemetry sample: {error}") from error
    return samples


def _spawn(path: Path, interval_s: float, origin: float, started: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [
            sys.executable,
            # A file called signal.py in the user's folder must not become our standard library.
            "-P",
            *("-m", "promptai.device.telemetry"),
            *("--out", str(path)),
            *("--interval", str(interval_s)),
            # One word: a second one such as -1e-05 would be taken for an option.
            f"--origin={origin}",
            *("--ready-fd", str(started)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=(started,),
    )


def _cost(out: bytes, err: bytes, returncode: int) -> TelemetryCost:
    """Give what the sampler printed last, with the reason when it did not end as told."""
    error: str | None = None
    if returncode != 0:
        lines = err.decode("utf-8", "replace").strip().splitlines()
        error = lines[-1] if lines else f"the sampler ended with code {returncode}"
    try:
        cost = msgspec.json.decode(out, type=SamplerCost)
    except msgspec.DecodeError:
        return TelemetryCost(error=error or "the sampler did not say what it cost")
    return TelemetryCost(
        samples=cost.samples,
        cpu_s=cost.cpu_s,
        wall_s=cost.wall_s,
        cpu_percent_of_one_core=cost.cpu_percent_of_one_core,
        max_rss_bytes=cost.max_rss_bytes,
        energy_source=cost.energy_source,
        error=error,
    )


if __name__ == "__main__":
    # Here, because the parent has no use for the sampler's modules.
    from promptai.device.recording import main

    sys.exit(main())
