"""Watts, from whatever the board can measure of itself, always with the source's name.

Energy per token is what makes a small board interesting, and it is the number
most easily compared wrongly: a Pi 5 whose power chip says 4.5 W draws 11 W or
more at the wall. So a reading is useless without its source, and readings of two
sources never belong in one chart:

``rapl_package``  Intel's and AMD's running average power limit counters, the
    processor package alone: no memory modules, disk, fan or power supply.
    Readable by root only since CVE-2020-8694.
``pmic_rails``  The Pi 5's power chip, volts times amps over the rails that have
    both. Its 5 V input (EXT5V) is measured in volts only, so whatever hangs on
    5 V directly (USB, fan, HATs) and the conversion loss are invisible: a lower
    bound, not wall power.
``none``  Nothing to read. A wall meter or a user's constant is not read here.

The figures are gross; subtract an idle baseline of the same source for the net.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, Protocol

from promptai.device.firmware import RunCommand, run_command
from promptai.device.procfs import PinnedFile, read_number, read_text, to_int

EnergySourceName = Literal["rapl_package", "pmic_rails", "none"]
#: What a record says when ``find_energy_source`` gave ``None``.
NO_SOURCE: Final[EnergySourceName] = "none"
_SHORTEST_S = 0.01


class EnergySource(Protocol):
    """Something that knows the power drawn now."""

    @property
    def name(self) -> EnergySourceName:
        """Which source this is; goes into every record beside the watts."""
        ...

    def read(self) -> float | None:
        """Give watts; ``None`` when the source does not say this time."""
        ...


def find_energy_source(
    root: Path = Path("/"),
    run: RunCommand = run_command,
    clock: Callable[[], float] = time.monotonic,
) -> EnergySource | None:
    """
    Give the best source that really answers; ``None`` when there is none.

    Args:
        root: Where /sys is.
        run: Runs ``vcgencmd``.
        clock: Monotonic seconds.
    """
    zones = _package_zones(root)
    if zones:
        return RaplPackage(zones, clock)
    rails = PmicRails(run)
    return rails if rails.read() is not None else None


class RaplPackage:
    """
    Mean watts of all processor packages since the previous reading.

    The first reading is against the moment of construction. The counters move
    about once a millisecond, so readings less than 10 ms apart are refused
    rather than wrong by a tenth. A counter that
    wraps once between two readings is accounted for; twice cannot be told from
    once, and takes over 40 minutes at 100 W.
    """

    name: EnergySourceName = "rapl_package"

    def __init__(self, zones: list[Path], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counters = [PinnedFile(str(zone / "energy_uj"), 64) for zone in zones]
        self._ranges_uj = [read_number(zone / "max_energy_range_uj") or 0 for zone in zones]
        self._at, self._last_uj = clock(), self._read_uj()

    def read(self) -> float | None:
        """Give watts; ``None`` when a counter cannot be read or the reading before is too near."""
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
    Watts that a Pi 5's power chip sees now.

    A reading starts ``vcgencmd``, which answers after up to 100 ms while the
    chip's converters run, nearly all of it waiting.
    """

    name: EnergySourceName = "pmic_rails"

    def __init__(self, run: RunCommand = run_command) -> None:
        self._run = run

    def read(self) -> float | None:
        """Give watts; ``None`` when the firmware does not answer."""
        return parse_pmic(self._run(("vcgencmd", "pmic_read_adc")) or "")


_PMIC_LINE = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE)


def parse_pmic(text: str) -> float | None:
    """
    Add up volts times amps over the rails that ``vcgencmd pmic_read_adc`` lists with both.

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
    List the readable RAPL zones that are whole packages.

    Not their parts (``intel-rapl:0:0``, core and uncore) and not the platform
    (``psys``), which would count the same joules twice; not ``intel-rapl-mmio``
    either, a second window on the same counter.
    """
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    packages = [zone for zone in zones if (read_text(zone / "name") or "").startswith("package-")]
    return packages if all(read_number(zone / "energy_uj") is not None for zone in packages) else []
