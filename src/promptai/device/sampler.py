"""Combine all sensors into one sample, keeping the previous readings that rates need.

A rate needs two readings of the same thing: a newly started engine counts from the moment
it is watched, and an ended engine yields ``None``, not its last values. Readings that wait
for the Pi's firmware (up to 0.1 s) come last, so they delay no other reading.

``Sampler`` only reads; ``recording`` schedules it and writes the samples.
"""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from promptai.device.energy import NO_SOURCE, find_energy_source
from promptai.device.firmware import RunCommand, find_throttled, run_command
from promptai.device.process import ProcessMemory, ProcessTree
from promptai.device.procfs import PinnedFile
from promptai.device.sample import Sample
from promptai.device.sensors import MachineSensors

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")  # 16 KiB on a Pi 5's default kernel
#: CPU time is counted in ticks of 10 ms; a share over less than one tick is 0 or meaningless.
_SHORTEST_S = 0.01


class Sampler:
    """
    Takes samples, with rates since the previous one.

    Args:
        root: Parent of /proc and /sys.
        run: Runs ``vcgencmd``.
        clock: Monotonic clock, in seconds.
        cpus: CPUs that count as usable; ``None`` for the kernel's answer.
        origin: Value of ``clock`` at which ``Sample.t`` is 0.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        run: RunCommand = run_command,
        clock: Callable[[], float] = time.monotonic,
        cpus: frozenset[int] | None = None,
        *,
        origin: float = 0.0,
    ) -> None:
        self._root, self._clock, self._origin = root, clock, origin
        usable = cpus if cpus is not None else frozenset(os.sched_getaffinity(0))
        self._cpu_count = max(1, len(usable))
        self._machine = MachineSensors(root, usable)
        self._throttled = find_throttled(run)
        self._energy = find_energy_source(root, run, clock)
        self._statm = PinnedFile(str(root / "proc/self/statm"), 128)
        self._tree: ProcessTree | None = None
        self._engine_before: tuple[float, float] | None = None
        self._own_before: tuple[float, float] | None = None

    @property
    def energy_source(self) -> str:
        """Name of the source of ``Sample.watts``; "none" without a source."""
        return self._energy.name if self._energy else NO_SOURCE

    def watch(self, pid: int | None) -> None:
        """Switch to another process, ``None`` for none; its CPU share in the next sample counts from this call."""
        if self._tree is not None:
            self._tree.close()
        self._tree = None if pid is None else ProcessTree(pid, self._root)
        self._engine_before = None
        self._read_engine()

    def sample(self) -> Sample:
        """Take a sample."""
        t = self._clock() - self._origin
        cpu_percent = self._machine.cpu_percent()
        engine, engine_percent = self._read_engine()
        available, swap_used = self._machine.memory()
        return Sample(
            t=round(t, 6),
            cpu_percent=_rounded(cpu_percent, 2),
            engine_cpu_percent=_rounded(engine_percent, 2),
            engine_anon_bytes=engine.anon_bytes if engine else None,
            engine_file_bytes=engine.file_bytes if engine else None,
            engine_rss_bytes=_rss(engine) if engine else None,
            available_bytes=available,
            swap_used_bytes=swap_used,
            major_faults=engine.major_faults if engine else None,
            load1=self._machine.load1(),
            temperature_c=self._machine.temperature_c(),
            cpu_mhz=_rounded(self._machine.cpu_mhz(), 1),
            memory_pressure=self._machine.memory_pressure(),
            # These two may run a command and wait for it, so they come after all timed readings.
            throttled=self._throttled() if self._throttled else None,
            watts=_rounded(self._energy.read(), 3) if self._energy else None,
            own_cpu_percent_of_one_core=_rounded(self._own_percent(), 3),
            own_rss_bytes=self._own_rss(),
        )

    def _read_engine(self) -> tuple[ProcessMemory | None, float | None]:
        """Return the engine's memory, and its CPU share since the previous call."""
        at = self._clock()
        reading = self._tree.read() if self._tree else None
        if reading is None:
            self._tree = self._engine_before = None
            return None, None
        before = self._engine_before
        if before is not None and at - before[0] < _SHORTEST_S:
            return reading.memory, None
        self._engine_before = (at, reading.cpu_s)
        if before is None:
            return reading.memory, None
        share = 100 * (reading.cpu_s - before[1]) / (at - before[0]) / self._cpu_count
        # Whole ticks in a short interval may add up to more than 100 %.
        return reading.memory, min(100.0, share)

    def _own_percent(self) -> float | None:
        now = (self._clock(), own_cpu_s())
        before, self._own_before = self._own_before, now
        if before is None or now[0] <= before[0]:
            return None
        return 100 * (now[1] - before[1]) / (now[0] - before[0])

    def _own_rss(self) -> int | None:
        pages = (self._statm.read() or b"").split()
        return int(pages[1]) * _PAGE_BYTES if len(pages) > 1 else None


def own_cpu_s() -> float:
    """Return the CPU seconds of this process and of its finished commands."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _rss(memory: ProcessMemory) -> int | None:
    """Return the RSS as other tools define it: anonymous, file-backed and shared memory."""
    if memory.anon_bytes is None or memory.file_bytes is None or memory.shmem_bytes is None:
        return None
    return memory.anon_bytes + memory.file_bytes + memory.shmem_bytes


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
