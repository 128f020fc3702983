"""Read the power that the board draws, always together with the name of the source.

Energy per token makes small boards interesting, and it is the figure most easily
compared wrongly: a Pi 5 whose power chip reports 4.5 W draws 11 W or more at the wall.
So a reading means nothing without its source, and readings of two sources never belong in one chart:

``rapl_package``  Running average power limit counters of Intel and AMD, for the
    processor package only: no memory modules, disk, fan or power supply.
    Readable by root only since CVE-2020-8694.
``pmic_rails``  The Pi 5's power chip: volts times amps, summed over the rails that
    report both. Its 5 V input (EXT5V) reports volts only, so consumers directly on
    5 V (USB, fan, HATs) and the conversion loss are not included: a lower
    bound, not wall power.
``none``  No source. Wall meters and user-supplied constants are not read here.

Figures are gross; subtract an idle baseline of the same source for the net.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, Protocol

from promptai.device.firmware import RunCommand, run_command
from promptai.device.procfs import PinnedFile, read_number, read_text, to_int

EnergySourceName = Literal["rapl_package", "pmic_rails", "none"]
#: Recorded when ``find_energy_source`` returns ``None``.
NO_SOURCE: Final[EnergySourceName] = "none"
_SHORTEST_S = 0.01


class EnergySource(Protocol):
    """Reports the current power."""

    @property
    def name(self) -> EnergySourceName:
        """Name of the source, recorded beside the watts."""
        ...

    def read(self) -> float | None:
        """Return watts; ``None`` when the source has no reading this time."""
        ...


def find_energy_source(
    root: Path = Path("/"),
    run: RunCommand = run_command,
    clock: Callable[[], float] = time.monotonic,
) -> EnergySource | None:
    """
    Return the best source that responds; ``None`` when there is none.

    Args:
        root: Parent of /sys.
        run: Runs ``vcgencmd``.
        clock: Monotonic clock, in seconds.
    """
    zones = _package_zones(root)
    if zones:
        return RaplPackage(zones, clock)
    rails = PmicRails(run)
    return rails if rails.read() is not None else None


class RaplPackage:
    """
    Mean watts of all processor packages since the previous reading.

    The first reading covers the time since construction. The counters move about once a
    millisecond, so readings less than 10 ms apart, which could be wrong by a tenth, return
    ``None``. One counter wrap between two readings is corrected; two wraps are
    indistinguishable from one, and take over 40 minutes at 100 W.
    """

    name: EnergySourceName = "rapl_package"

    def __init__(self, zones: list[Path], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counters = [PinnedFile(str(zone / "energy_uj"), 64) for zone in zones]
        self._ranges_uj = [read_number(zone / "max_energy_range_uj") or 0 for zone in zones]
        self._at, self._last_uj = clock(), self._read_uj()

    def read(self) -> float | None:
        """Return watts; ``None`` when a counter cannot be read, or the previous reading is too recent."""
        elapsed_s = self._clock() - self._at
        if elapsed_s < _SHORTEST_S:
            return None
        last_uj, now_uj = self._last_uj, self._read_uj()
        self._at, self._last_uj = self._at + elapsed_s, now_uj
        if last_uj is None or now_uj is None:
            return None
        used_uj = 0
        for now, last, limit in zip(now_uj, last_uj, self._ranges_uj, strict=True):
            if now < last and not limit:
                return None
            used_uj += now - last + (limit if now < last else 0)
        return used_uj / 1e6 / elapsed_s

    def _read_uj(self) -> list[int] | None:
        values = [to_int(counter.read()) for counter in self._counters]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None


class PmicRails:
    """
    Current power as measured by a Pi 5's power chip, in watts.

    Each reading runs ``vcgencmd``, which takes up to 100 ms, nearly all of it waiting for the chip's converters.
    """

    name: EnergySourceName = "pmic_rails"

    def __init__(self, run: RunCommand = run_command) -> None:
        self._run = run

    def read(self) -> float | None:
        """Return watts; ``None`` when the firmware does not respond."""
        return parse_pmic(self._run(("vcgencmd", "pmic_read_adc")) or "")


_PMIC_LINE = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE)


def parse_pmic(text: str) -> float | None:
    """
    Sum volts times amps over the rails that ``vcgencmd pmic_read_adc`` lists with both.

    Returns:
        Watts; ``None`` when no rail has both (another board, an error message).
    """
    amps: dict[str, float] = {}
    volts: dict[str, float] = {}
    try:
        for rail, unit, value in _PMIC_LINE.findall(text):
            (amps if unit == "A" else volts)[rail] = float(value)
    except ValueError:
        return None
    paired = amps.keys() & volts.keys()
    return sum(amps[rail] * volts[rail] for rail in paired) if paired else None


def _package_zones(root: Path) -> list[Path]:
    """
    List the RAPL zones of whole packages, if all are readable.

    Excludes their parts (``intel-rapl:0:0``, core and uncore) and the platform (``psys``), which
    would count the same joules twice, and ``intel-rapl-mmio``, a second interface to the same counter.
    """
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    packages = [zone for zone in zones if (read_text(zone / "name") or "").startswith("package-")]
    return packages if all(read_number(zone / "energy_uj") is not None for zone in packages) else []
