from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from promptai.device.energy import PmicRails, RaplPackage, find_energy_source, parse_pmic

WriteTree = Callable[[dict[str, str]], Path]

PMIC = """\
   3V7_WL_SW_A current(0)=0.10000000A
     3V3_SYS_A current(1)=0.20000000A
    VDD_CORE_A current(7)=2.50000000A
   3V7_WL_SW_V volt(8)=3.70000000V
     3V3_SYS_V volt(9)=3.30000000V
    VDD_CORE_V volt(15)=0.88000000V
       EXT5V_V volt(24)=5.10000000V
        BATT_V volt(25)=0.00341880V
"""


class Clock:
    """A clock that the test advances."""

    now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def no_command(_argv: Sequence[str]) -> None:
    """A machine without vcgencmd."""


def package(write: WriteTree, energy_uj: int, number: int = 0) -> Path:
    zone = f"sys/class/powercap/intel-rapl:{number}"
    root = write(
        {
            f"{zone}/name": f"package-{number}\n",
            f"{zone}/energy_uj": f"{energy_uj}\n",
            f"{zone}/max_energy_range_uj": "262143328850\n",
        }
    )
    return root / zone


def test_a_machine_without_any_source_has_none(tmp_path: Path) -> None:
    """Without a measurement there is no zero."""
    assert find_energy_source(tmp_path, no_command) is None


def test_an_unreadable_counter_is_not_a_source(write_tree: WriteTree) -> None:
    """Since 2020 only root may read the counters; a folder in the file's place fails for root, too."""
    root = write_tree(
        {
            "sys/class/powercap/intel-rapl:0/name": "package-0",
            "sys/class/powercap/intel-rapl:0/energy_uj/x": "",
        }
    )

    assert find_energy_source(root, no_command) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        'error=1 error_msg="Command not registered"\n',
        "EXT5V_V volt(24)=5.1V\n",
        "VDD_CORE_A current(7)=1.2.3A\nVDD_CORE_V volt(15)=0.8V\n",
    ],
)
def test_a_response_without_a_complete_rail_is_none(text: str) -> None:
    """A voltage alone is not enough for a power."""
    assert parse_pmic(text) is None


def test_a_power_chip_that_stops_responding_is_none() -> None:
    """Each missing response is one missing value."""
    assert PmicRails(no_command).read() is None


def test_readings_too_close_together_are_none(write_tree: WriteTree) -> None:
    """The counter moves once a millisecond; over two of those, any figure is noise."""
    clock = Clock()
    source = RaplPackage([package(write_tree, 1_000_000)], clock)

    clock.now += 0.002
    package(write_tree, 1_900_000)
    assert source.read() is None

    clock.now += 0.998
    package(write_tree, 11_000_000)
    assert source.read() == pytest.approx(10.0)


def test_a_counter_wrap_is_corrected(write_tree: WriteTree) -> None:
    """The kernel reports the counter's range."""
    clock = Clock()
    source = RaplPackage([package(write_tree, 262_143_000_000)], clock)

    clock.now += 1
    package(write_tree, 9_671_150)

    assert source.read() == pytest.approx(10.0)


def test_a_counter_that_decreases_without_a_known_range_is_none(write_tree: WriteTree) -> None:
    """The energy used is unknown."""
    clock = Clock()
    zone = package(write_tree, 500)
    (zone / "max_energy_range_uj").unlink()
    source = RaplPackage([zone], clock)

    clock.now += 1
    (zone / "energy_uj").write_text("100")

    assert source.read() is None


def test_a_failed_reading_is_none_until_there_are_two_again(write_tree: WriteTree) -> None:
    """A mean over an interval needs both its ends."""
    clock = Clock()
    zone = package(write_tree, 0)
    source = RaplPackage([zone], clock)
    readings: list[float | None] = []
    for text in ("garbage", "2000000", "7000000"):
        clock.now += 1
        (zone / "energy_uj").write_text(text)
        readings.append(source.read())

    assert readings == [None, None, pytest.approx(5.0)]


def test_packages_are_summed_without_their_parts(write_tree: WriteTree) -> None:
    """Core, uncore and the platform count the same joules again."""
    clock = Clock()
    parts = {"intel-rapl:0:0": "core", "intel-rapl:1:0": "dram", "intel-rapl:2": "psys"}

    def write(packages_uj: int, parts_uj: int) -> Path:
        for zone, name in parts.items():
            folder = f"sys/class/powercap/{zone}"
            write_tree({f"{folder}/name": name, f"{folder}/energy_uj": str(parts_uj)})
        package(write_tree, packages_uj, 0)
        return package(write_tree, packages_uj, 1).parents[3]

    source = find_energy_source(write(0, 0), no_command, clock)
    assert source is not None
    clock.now += 2
    write(8_000_000, 5_000_000)

    assert source.name == "rapl_package"
    assert source.read() == pytest.approx(8.0)


def test_rails_with_both_values_are_summed() -> None:
    """EXT5V and BATT report no current and are left out."""
    assert parse_pmic(PMIC) == pytest.approx(3.7 * 0.1 + 3.3 * 0.2 + 0.88 * 2.5)


def test_the_source_of_a_pi_5_is_its_rails(pi5: Path) -> None:
    """The source is found by running the command, and carries its name."""
    source = find_energy_source(pi5, lambda argv: PMIC if argv[1] == "pmic_read_adc" else None)

    assert source is not None
    assert source.name == "pmic_rails"
    assert source.read() == pytest.approx(3.23)
