"""The telemetry process: one sample a second, on time, at the smallest cost.

Sampling inside the process that measures would take its interpreter lock at the
very moments when tokens arrive, and the latency found would be the sampler's
own. So it runs alone (``python -m promptai.device.telemetry``) and is spoken to
through its standard input, one JSON ``Command`` a line. The end of that input is
its order to finish: a parent that is killed with SIGKILL cannot say goodbye, but
the kernel closes its pipes, so no sampler outlives a measurement.

    stdin   {"watch": 1234}, {"watch": null}, {"stop": true}; end of file = stop
    file    one ``Sample`` a line, appended, one write each; never fsynced (SD wear)
    stdout  one line at the end: ``SamplerCost``
    exit    0 told to stop, 2 a command or option it does not know, 3 the file cannot be written

Samples lie on a fixed grid of absolute deadlines, so their times do not drift.
When the machine stalls, the sample due is taken late with its true time, and
those missed altogether are left out, never filled in. SIGTERM means stop.
SIGINT is ignored: Ctrl-C reaches every process of a terminal, and the parent
decides.

Only the standard library and msgspec are imported. Measured on a 2.4 GHz x86
core, an engine of two processes and 21 threads, one sample a second: 0.08 % of
one core and 18 MB; 0.4 % where each sample starts ``vcgencmd`` twice.
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
#: Two kernel ticks: below that, CPU shares are noise and the sampler becomes the load.
MIN_INTERVAL_S = 0.02
#: The longest line ever written is under 1 KiB; a tail longer than this is not a cut sample.
_TAIL_BYTES = 8192


def next_deadline(start: float, interval: float, now: float) -> float:
    """Give the first point after ``now`` of the grid that begins at ``start``."""
    return start + interval * (math.floor((now - start) / interval) + 1)


class Inbox:
    """Standard input as commands; SIGTERM arrives as one of them."""

    def __init__(self, fd: int = 0) -> None:
        self._fd, self._rest = fd, b""
        self._signal_fd, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        # A byte in a pipe cannot be missed; a flag set between its test and select() would be.
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait(self, timeout_s: float) -> list[Command]:
        """
        Give the commands that come within the time, at once when some do; an empty list when none did.

        Raises:
            msgspec.DecodeError: A line is no command.
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
    Open the file to append whole lines to, after cutting off half a line that a power cut left.

    Raises:
        OSError: It cannot be written, or ends in something that never was a sample.
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
            raise OSError("it does not end in telemetry; choose another file")
        os.ftruncate(fd, end - len(rest))
    return fd


def _end_of_text(fd: int, size: int) -> int:
    """Step back over NULs: ext4 may leave pages of them where the size reached the disk and the data did not."""
    while size:
        start = max(0, size - _TAIL_BYTES)
        text = os.pread(fd, size - start, start).rstrip(b"\0")
        if text:
            return start + len(text)
        size = start
    return 0


class Recording:
    """
    One telemetry file being written.

    Attributes:
        samples: Lines written so far.
    """

    def __init__(self, sampler: Sampler, out: int, interval_s: float) -> None:
        self.samples = 0
        self._sampler, self._out, self._interval_s = sampler, out, interval_s
        self._encoder = msgspec.json.Encoder()
        self._start, self._start_cpu_s = time.monotonic(), own_cpu_s()

    def run(self, inbox: Inbox) -> None:
        """
        Take samples until told to stop.

        Raises:
            OSError: The file cannot be written.
            msgspec.DecodeError: An unknown command came in.
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
        """Say what it has cost until now."""
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
    """Run the telemetry process; give its exit code."""
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
        sys.stderr.write(f"telemetry was sent an unknown command: {error}\n")
        code = EXIT_USAGE
    sys.stdout.write(msgspec.json.encode(recording.cost()).decode() + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m promptai.device.telemetry",
        description="Sample this machine and one engine until standard input ends.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to append samples to")
    parser.add_argument("--interval", type=_interval, default=1.0, metavar="SECONDS", help="default 1.0")
    parser.add_argument(
        "--origin", type=float, default=0.0, metavar="SECONDS", help="monotonic second that samples call 0"
    )
    parser.add_argument(
        "--ready-fd", type=int, metavar="FD", help="file descriptor that gets one byte once sampling begins"
    )
    return parser


def _interval(text: str) -> float:
    seconds = float(text)
    if not MIN_INTERVAL_S <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least {MIN_INTERVAL_S} seconds")
    return seconds
