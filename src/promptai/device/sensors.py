"""The machine's sensors: CPU load, memory, temperature and clock.

Each sensor finds its file on this board once and keeps it open, so a reading is one
system call and some parsing: cheap enough for every second beside a benchmark that
uses all cores. A sensor without a file always returns ``None``; a failed reading
returns ``None`` once.

The parsers are pure functions of a file's bytes.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from promptai.device.memory import meminfo_bytes
from promptai.device.procfs import PinnedFile, read_text, to_int

#: hwmon drivers of processor temperatures.
_CPU_HWMON = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
#: Names of a processor's thermal zones: "cpu-thermal" (Pi), "x86_pkg_temp", "package-thermal",
#: "soc-thermal", "cpu0-thermal". Excludes "acpitz", which is often a constant.
_CPU_ZONE = re.compile("cpu|pkg|package|soc", re.IGNORECASE)


class CpuTimes(NamedTuple):
    """Ticks since boot, summed over some CPUs."""

    busy: int
    total: int


def parse_cpu_times(stat: bytes, cpus: frozenset[int]) -> CpuTimes | None:
    """
    Sum the lines of ``cpus`` in /proc/stat.

    Columns as in proc(5): user nice system idle iowait irq softirq steal; user already
    includes guest time.

    Returns:
        ``None`` when none of ``cpus`` is listed.
    """
    busy = total = 0
    for line in stat.split(b"\n"):
        if not line.startswith(b"cpu"):
            break
        name, *columns = line.split()
        if (number := to_int(name[3:])) is not None and number in cpus and len(columns) >= 4:
            ticks = [int(column) for column in columns[:8]]
            idle = sum(ticks[3:5])
            total += sum(ticks)
            busy += sum(ticks) - idle
    return CpuTimes(busy, total) if total else None


def parse_pressure(text: bytes) -> float | None:
    """Parse "some avg10" of a /proc/pressure file, 0-100; ``None`` for any other text."""
    # some avg10=0.00 avg60=0.00 avg300=0.00 total=0
    words = text.split(maxsplit=2)
    if len(words) < 2 or words[0] != b"some":
        return None
    name, _, value = words[1].partition(b"=")
    return _to_float(value) if name == b"avg10" else None


class MachineSensors:
    """All sensors of one machine; load and clock cover ``cpus`` only."""

    def __init__(self, root: Path, cpus: Iterable[int]) -> None:
        self._cpus = frozenset(cpus)
        # CPU lines of /proc/stat have at most 240 bytes; the long list of interrupts after them is not read.
        stat_bytes = 240 * (2 + max(self._cpus, default=0))
        self._stat = PinnedFile(str(root / "proc/stat"), stat_bytes)
        self._meminfo = PinnedFile(str(root / "proc/meminfo"))
        self._loadavg = PinnedFile(str(root / "proc/loadavg"), 64)
        self._pressure = PinnedFile(str(root / "proc/pressure/memory"), 256)
        self._temperature = _find_temperature(root)
        self._clocks = _find_clocks(root, self._cpus)
        self._last_times: CpuTimes | None = None

    def cpu_percent(self) -> float | None:
        """Return the busy share of all CPUs since the previous call, 0-100; ``None`` on the first call."""
        last, now = self._last_times, parse_cpu_times(self._stat.read() or b"", self._cpus)
        self._last_times = now
        if last is None or now is None or now.total <= last.total:
            return None
        # iowait may decrease (proc(5)), and the busy time with it.
        return min(100.0, max(0.0, 100 * (now.busy - last.busy) / (now.total - last.total)))

    def memory(self) -> tuple[int | None, int | None]:
        """Return available memory and used swap, in bytes; swap is ``None`` on machines without it."""
        meminfo = self._meminfo.read() or b""
        available, total, free = (meminfo_bytes(meminfo, name) for name in (b"MemAvailable", b"SwapTotal", b"SwapFree"))
        return available, total - free if total and free is not None else None

    def load1(self) -> float | None:
        """Return the one-minute load average."""
        return _to_float((self._loadavg.read() or b"").partition(b" ")[0])

    def memory_pressure(self) -> float | None:
        """Return the share of the last 10 s in which a task waited for memory, 0-100."""
        return parse_pressure(self._pressure.read() or b"")

    def temperature_c(self) -> float | None:
        """Return the processor's temperature, in degrees Celsius."""
        milli = to_int(self._temperature.read()) if self._temperature else None
        return None if milli is None else milli / 1000

    def cpu_mhz(self) -> float | None:
        """Return the mean clock of the CPUs that report one."""
        khz = [value for clock in self._clocks if (value := to_int(clock.read())) is not None]
        return sum(khz) / len(khz) / 1000 if khz else None


def _find_temperature(root: Path) -> PinnedFile | None:
    """Open the file with the processor's temperature, in thousandths of a degree."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    monitors = sorted((root / "sys/class/hwmon").glob("hwmon*"))
    candidates = [
        *(zone / "temp" for zone in zones if _CPU_ZONE.search(read_text(zone / "type") or "")),
        *(monitor / "temp1_input" for monitor in monitors if read_text(monitor / "name") in _CPU_HWMON),
    ]
    for path in candidates:
        file = PinnedFile(str(path), 32)
        if to_int(file.read()) is not None:
            return file
        file.close()
    return None


def _find_clocks(root: Path, cpus: frozenset[int]) -> list[PinnedFile]:
    folder = root / "sys/devices/system/cpu"
    clocks = [PinnedFile(str(folder / f"cpu{cpu}/cpufreq/scaling_cur_freq"), 32) for cpu in sorted(cpus)]
    return [clock for clock in clocks if clock.is_open]


def _to_float(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
