"""Control the telemetry process, and read back its samples.

The measuring side of ``recording``: starts the sampler, selects the engine to watch,
stops the sampler and collects its cost. Telemetry must never spoil the measurement it
serves. A file that cannot be opened is an error at the start, before anything is
measured; later failures (disk full, sampler killed for memory) must not cost an hour of
results, so ``stop`` returns them as a value and never raises.

    with Telemetry().start(run_dir / "telemetry.jsonl") as telemetry:
        telemetry.watch(engine_pid)
        ...
    print(telemetry.cost)

The module is also the sampler's command line: ``python -m promptai.device.telemetry
--out FILE`` samples until end of input.
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

#: The sampler starts in 0.1 s on a PC, but may take seconds from a cold SD card under load.
_START_TIMEOUT_S = 30.0
#: When it receives the stop command, the sampler may be waiting 2 s for each of two firmware responses.
_STOP_TIMEOUT_S = 6.0


class TelemetryCost(msgspec.Struct, frozen=True, kw_only=True):
    """
    The cost of one measurement's telemetry, and how it ended.

    All figures are ``None`` when the sampler died without reporting them.

    Attributes:
        samples: Number of samples written.
        cpu_s: CPU seconds since the first sample.
        wall_s: Seconds since the first sample.
        cpu_percent_of_one_core: 100 · cpu_s / wall_s.
        max_rss_bytes: Peak memory.
        energy_source: Source of ``Sample.watts``: "rapl_package", "pmic_rails" or "none".
        error: Why the sampler ended prematurely, one line; ``None`` when it stopped on request.
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
    One sampler process, started once; leaving the ``with`` block stops it.

    Not thread-safe.

    Attributes:
        cost: ``None`` until the sampler has stopped.
    """

    def __init__(self) -> None:
        self.cost: TelemetryCost | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, path: Path, interval_s: float = 1.0, *, origin: float = 0.0) -> Self:
        """
        Start sampling into ``path``; returns when the sampler is running.

        Args:
            path: File to append to.
            interval_s: Seconds between samples, at least 0.02. A Pi 5's power chip takes 0.1 s to respond, so
                below about 0.2 s its samples are late.
            origin: Value of ``time.monotonic()`` at which the samples' time is 0; a resumed run continues its
                own clock with it, even after a reboot.

        Raises:
            RunError: The file cannot be written, or the sampler does not start.
        """
        if self._process is not None:
            raise RuntimeError("telemetry can be started only once")
        ready, started = os.pipe()
        try:
            self._process = _spawn(path, interval_s, origin, started)
        finally:
            os.close(started)
        try:
            # The sampler writes one byte when it starts sampling; without it, the sampler died or hangs.
            alive = bool(select.select([ready], [], [], _START_TIMEOUT_S)[0]) and os.read(ready, 1) != b""
        finally:
            os.close(ready)
        if not alive:
            reason = self.stop().error or "it timed out"
            raise RunError(
                f"telemetry did not start: {reason}",
                hint=f"check that {path} is writable and its disk has free space",
            )
        return self

    def watch(self, pid: int | None) -> None:
        """Switch to watching another process and its descendants; ``None`` for no process."""
        process = self._process
        if process is None or process.stdin is None or process.stdin.closed:
            return
        # A broken pipe means that the sampler ended early; stop() reports why.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(Command(watch=pid)) + b"\n")

    def stop(self) -> TelemetryCost:
        """Stop the sampler and return its cost; never raises, and repeated calls return the same value."""
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
    Read a telemetry file, without a last line that a crash or power cut truncated.

    A missing file means no samples: a run can be shared without its telemetry.

    Raises:
        OSError: The file cannot be read.
        RunError: Any other line is malformed; names the line.
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
            # -P: a signal.py in the user's directory must not shadow the standard library.
            "-P",
            *("-m", "promptai.device.telemetry"),
            *("--out", str(path)),
            *("--interval", str(interval_s)),
            # A single argument: argparse would take a separate -1e-05 for an option.
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
    """Parse the cost that the sampler printed, and add the reason if it ended prematurely."""
    error: str | None = None
    if returncode != 0:
        lines = err.decode("utf-8", "replace").strip().splitlines()
        error = lines[-1] if lines else f"the sampler ended with code {returncode}"
    try:
        cost = msgspec.json.decode(out, type=SamplerCost)
    except msgspec.DecodeError:
        return TelemetryCost(error=error or "the sampler did not report its cost")
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
    # Imported here: the parent process does not need the sampler's modules.
    from promptai.device.recording import main

    sys.exit(main())
