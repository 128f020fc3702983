"""The telemetry process: takes one sample per second, on time, at minimal cost.

Sampling inside the measuring process would take its interpreter lock at the very
moments when tokens arrive, and the measured latency would be the sampler's own. So the
sampler is a separate process (``python -m promptai.device.telemetry``) that reads one
JSON ``Command`` per line from its standard input. End of input means stop: a parent
killed with SIGKILL cannot send a command, but the kernel closes its pipes, so no sampler
outlives a measurement.

    stdin   {"watch": 1234}, {"watch": null}, {"stop": true}; end of file = stop
    file    one ``Sample`` per line, appended in a single write; never fsynced (SD wear)
    stdout  one line at the end: ``SamplerCost``
    exit    0 stopped on request, 2 unknown command or option, 3 the file cannot be written

Samples follow a fixed grid of absolute deadlines, so their times do not drift. When the
machine stalls, the due sample is taken late with its true time, and missed samples are
left out, never filled in. SIGTERM means stop. SIGINT is ignored: Ctrl-C reaches every
process of a terminal, and the parent decides.

Imports only the standard library and msgspec. Measured on a 2.4 GHz x86 core, with an
engine of two processes and 21 threads, at one sample per second: 0.08 % of one core and
18 MB; 0.4 % where each sample runs ``vcgencmd`` twice.
"""

import argparse
import math
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path

import msgspec

from promptai.device.memory import peak_rss_bytes
from promptai.device.sample import Command, SamplerCost
from promptai.device.sampler import Sampler, own_cpu_s
from promptai.wire.malformed import MALFORMED

EXIT_USAGE, EXIT_UNWRITABLE = 2, 3
#: Two kernel ticks: below that, CPU shares are noise and the sampler itself becomes the load.
MIN_INTERVAL_S = 0.02
#: Lines are always shorter than 1 KiB; a longer unterminated tail is not a truncated sample.
_TAIL_BYTES = 8192


def next_deadline(start: float, interval: float, now: float) -> float:
    """Return the first point after ``now`` on the grid that starts at ``start``."""
    return start + interval * (math.floor((now - start) / interval) + 1)


class Inbox:
    """Commands from standard input; SIGTERM arrives as a stop command."""

    def __init__(self, fd: int = 0) -> None:
        self._fd, self._rest = fd, b""
        self._signal_fd, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        # Race: a flag set between its test and select() would be missed; a byte in a pipe is not.
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait(self, timeout_s: float) -> list[Command]:
        """
        Wait for commands; returns as soon as some arrive, or an empty list after the timeout.

        Raises:
            msgspec.DecodeError: A line is not a command.
        """
        ready, _, _ = select.select([self._fd, self._signal_fd], [], [], max(0.0, timeout_s))
        if self._signal_fd in ready:
            return [Command(stop=True)]
        if self._fd not in ready:
            return []
        chunk = os.read(self._fd, 4096)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        commands = [msgspec.json.decode(line, type=Command) for line in lines if line.strip()]
        return commands if chunk else [*commands, Command(stop=True)]


def open_out(path: Path) -> int:
    """
    Open a file for appending, after removing a truncated last line that a power cut left.

    Raises:
        OSError: The file cannot be written, or ends in something that was never a sample.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode):
        end = _end_of_text(fd, info.st_size)
        start = max(0, end - _TAIL_BYTES)
        tail = os.pread(fd, end - start, start)
        rest = tail[tail.rfind(b"\n") + 1 :]
        if len(rest) == _TAIL_BYTES or (rest and rest[:1] not in (b"{", b"\0")):
            os.close(fd)
            raise OSError("its end is not telemetry; choose another file")
        os.ftruncate(fd, end - len(rest))
    return fd


def _end_of_text(fd: int, size: int) -> int:
    """Find the end before trailing NULs: after a power cut, ext4 may have written the size but not the data."""
    while size:
        start = max(0, size - _TAIL_BYTES)
        text = os.pread(fd, size - start, start).rstrip(b"\0")
        if text:
            return start + len(text)
        size = start
    return 0


class Recording:
    """
    A telemetry file being written.

    Attributes:
        samples: Number of lines written.
    """

    def __init__(self, sampler: Sampler, out: int, interval_s: float) -> None:
        self.samples = 0
        self._sampler, self._out, self._interval_s = sampler, out, interval_s
        self._encoder = msgspec.json.Encoder()
        self._start, self._start_cpu_s = time.monotonic(), own_cpu_s()

    def run(self, inbox: Inbox) -> None:
        """
        Take samples until a stop command.

        Raises:
            OSError: The file cannot be written.
            msgspec.DecodeError: An unknown command arrived.
        """
        deadline = self._start
        while True:
            for command in inbox.wait(deadline - time.monotonic()):
                if command.stop:
                    return
                if command.watch is not msgspec.UNSET:
                    self._sampler.watch(command.watch)
            if time.monotonic() >= deadline:
                self._take()
                deadline = next_deadline(self._start, self._interval_s, time.monotonic())

    def cost(self) -> SamplerCost:
        """Return the cost so far."""
        wall_s, cpu_s = time.monotonic() - self._start, own_cpu_s() - self._start_cpu_s
        return SamplerCost(
            samples=self.samples,
            cpu_s=round(cpu_s, 6),
            wall_s=round(wall_s, 6),
            cpu_percent_of_one_core=round(100 * cpu_s / wall_s, 3),
            max_rss_bytes=peak_rss_bytes(),
            energy_source=self._sampler.energy_source,
        )

    def _take(self) -> None:
        line = self._encoder.encode(self._sampler.sample()) + b"\n"
        while line:
            line = line[os.write(self._out, line) :]
        self.samples += 1


def main(argv: list[str] | None = None) -> int:
    """Run the telemetry process; returns its exit code."""
    options = _parser().parse_args(argv)
    inbox = Inbox()
    try:
        out = open_out(options.out)
    except OSError as error:
        sys.stderr.write(f"telemetry cannot write {options.out}: {error}\n")
        return EXIT_UNWRITABLE
    recording, code = Recording(Sampler(origin=options.origin), out, options.interval), 0
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"\n")
        os.close(options.ready_fd)
    try:
        recording.run(inbox)
    except OSError as error:
        sys.stderr.write(f"telemetry cannot write {options.out}: {error}\n")
        code = EXIT_UNWRITABLE
    except MALFORMED as error:
        sys.stderr.write(f"telemetry received an unknown command: {error}\n")
        code = EXIT_USAGE
    sys.stdout.write(msgspec.json.encode(recording.cost()).decode() + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m promptai.device.telemetry",
        description="Sample this machine and one engine until end of input.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to append samples to")
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="SECONDS", help="seconds between samples (default 1.0)"
    )
    parser.add_argument(
        "--origin", type=float, default=0.0, metavar="SECONDS", help="monotonic time at which samples start counting"
    )
    parser.add_argument(
        "--ready-fd", type=int, metavar="FD", help="file descriptor to write one byte to when sampling starts"
    )
    return parser


def _interval(text: str) -> float:
    seconds = float(text)
    if not MIN_INTERVAL_S <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least {MIN_INTERVAL_S} seconds")
    return seconds
