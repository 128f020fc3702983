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
    """A clock that the test turns."""

    now = 100.0

    def __call__(self) -> float:
        """Tell the time."""
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
    """No zeros where nothing is measured."""
    assert find_energy_source(tmp_path, no_command) is None


def test_a_counter_that_may_not_be_read_is_no_source(write_tree: WriteTree) -> None:
    """Since 2020 the counters are root's; a folder in the file's place fails as surely, even for root."""
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
def test_an_answer_without_a_whole_rail_is_none(text: str) -> None:
    """A voltage alone is no power."""
    assert parse_pmic(text) is None


def test_a_power_chip_that_falls_silent_is_none() -> None:
    """One missing answer is one missing value."""
    assert PmicRails(no_command).read() is None


def test_readings_too_close_together_are_refused(write_tree: WriteTree) -> None:
    """The counter moves once a millisecond; over two of them any figure is chance."""
    clock = Clock()
    source = RaplPackage([package(write_tree, 1_000_000)], clock)

    clock.now += 0.002
    package(write_tree, 1_900_000)
    assert source.read() is None

    clock.now += 0.998
    package(write_tree, 11_000_000)
    assert source.read() == pytest.approx(10.0)


def test_a_counter_that_wraps_is_carried_over(write_tree: WriteTree) -> None:
    """The kernel says where the counter starts again."""
    clock = Clock()
    source = RaplPackage([package(write_tree, 262_143_000_000)], clock)

    clock.now += 1
    package(write_tree, 9_671_150)

    assert source.read() == pytest.approx(10.0)


def test_a_counter_that_falls_without_a_known_range_is_none(write_tree: WriteTree) -> None:
    """How much was used cannot be known."""
    clock = Clock()
    zone = package(write_tree, 500)
    (zone / "max_energy_range_uj").unlink()
    source = RaplPackage([zone], clock)

    clock.now += 1
    (zone / "energy_uj").write_text("100")

    assert source.read() is None


def test_a_counter_that_fails_once_is_none_until_there_are_two_again(write_tree: WriteTree) -> None:
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


def test_packages_are_added_and_their_parts_are_not(write_tree: WriteTree) -> None:
    """Core, uncore and the platform are the same joules again."""
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


def test_rails_with_both_values_are_added() -> None:
    """EXT5V and BATT have no current and stay out."""
    assert parse_pmic(PMIC) == pytest.approx(3.7 * 0.1 + 3.3 * 0.2 + 0.88 * 2.5)


def test_a_pi_5_gives_its_rails(pi5: Path) -> None:
    """Found by asking, and named for what it is."""
    source = find_energy_source(pi5, lambda argv: PMIC if argv[1] == "pmic_read_adc" else None)

    assert source is not None
    assert source.name == "pmic_rails"
    assert source.read() == pytest.approx(3.23)
