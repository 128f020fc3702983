from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.device.sensors import CpuTimes, MachineSensors, parse_cpu_times, parse_pressure

WriteTree = Callable[[dict[str, str]], Path]

STAT = b"""\
cpu  1 1 1 1
cpu0 100 10 20 800 50 5 5 10 0 0
cpu1 200 0 0 700 100 0 0 0 0 0
intr 5 cpu7
"""


def test_a_bare_machine_reports_nothing(tmp_path: Path) -> None:
    """Every sensor is None, none is 0."""
    machine = MachineSensors(tmp_path, {0})

    assert machine.cpu_percent() is None
    assert machine.memory() == (None, None)
    assert machine.load1() is None
    assert machine.memory_pressure() is None
    assert machine.temperature_c() is None
    assert machine.cpu_mhz() is None


def test_unusable_cpus_are_not_counted() -> None:
    """Idle and iowait count as idle, steal as busy."""
    assert parse_cpu_times(STAT, frozenset({0})) == CpuTimes(busy=150, total=1000)
    assert parse_cpu_times(STAT, frozenset({0, 1})) == CpuTimes(busy=350, total=2000)


def test_unlisted_cpus_are_none() -> None:
    """An offline CPU is not idle."""
    assert parse_cpu_times(STAT, frozenset({7})) is None


@pytest.mark.parametrize("text", [b"", b"full avg10=1.0 avg60=0\n", b"some\n", b"some avg10=x total=0\n"])
def test_a_pressure_file_without_its_figure_is_none(text: bytes) -> None:
    """With PSI switched off the file has no content."""
    assert parse_pressure(text) is None


def test_pressure_is_the_ten_second_share_of_some() -> None:
    """Uses "some", not "full": one waiting thread already slows a model down."""
    text = b"some avg10=12.34 avg60=1.00 avg300=0.10 total=5\nfull avg10=9.00 avg60=0 avg300=0 total=0\n"

    assert parse_pressure(text) == 12.34


def test_decreasing_times_are_not_a_negative_load(pi5: Path, write_tree: WriteTree) -> None:
    """The kernel's iowait may decrease."""
    machine = MachineSensors(pi5, {0})
    write_tree({"proc/stat": "cpu0 100 0 0 100 500\n"})
    machine.cpu_percent()
    write_tree({"proc/stat": "cpu0 100 0 0 900 400\n"})

    assert machine.cpu_percent() == 0.0


def test_no_tick_between_two_readings_is_none(pi5: Path) -> None:
    """No time has passed, so there is no rate."""
    machine = MachineSensors(pi5, range(4))
    machine.cpu_percent()

    assert machine.cpu_percent() is None


def test_load_is_the_share_of_all_usable_cores(pi5: Path, write_tree: WriteTree) -> None:
    """One of two usable cores busy all the time is 50, regardless of the other cores."""
    machine = MachineSensors(pi5, {2, 3})
    machine.cpu_percent()
    write_tree({"proc/stat": "cpu 0\ncpu0 900 0 10 890\ncpu2 200 0 10 890\ncpu3 100 0 10 990\n"})

    assert machine.cpu_percent() == pytest.approx(50.0)


def test_a_machine_without_swap_has_no_swap_in_use(write_tree: WriteTree) -> None:
    """None, not 0: there is no swap to use."""
    root = write_tree({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"})

    assert MachineSensors(root, {0}).memory() == (5 * 1024, None)


def test_another_chip_s_sensor_is_not_the_processor_s_temperature(write_tree: WriteTree) -> None:
    """The zone "acpitz" is often constant; the processor's own monitor is used instead."""
    root = write_tree(
        {
            "sys/class/thermal/thermal_zone0/type": "acpitz\n",
            "sys/class/thermal/thermal_zone0/temp": "27800\n",
            "sys/class/hwmon/hwmon0/name": "nvme\n",
            "sys/class/hwmon/hwmon0/temp1_input": "40000\n",
            "sys/class/hwmon/hwmon1/name": "k10temp\n",
            "sys/class/hwmon/hwmon1/temp1_input": "55250\n",
        }
    )

    assert MachineSensors(root, {0}).temperature_c() == 55.25


def test_a_pi_s_sensors_are_read(pi5: Path) -> None:
    """In the units of the samples."""
    machine = MachineSensors(pi5, range(4))

    assert machine.memory() == (3300000 * 1024, 288 * 1024)
    assert machine.load1() == 1.52
    assert machine.temperature_c() == 61.45
    assert machine.cpu_mhz() == 1500.0


def test_the_clock_is_the_mean_of_the_usable_cpus(pi5: Path, write_tree: WriteTree) -> None:
    """A core that this process may not use does not count."""
    write_tree({"sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "2400000\n"})

    assert MachineSensors(pi5, {2, 3}).cpu_mhz() == 1950.0
    assert MachineSensors(pi5, {0, 1}).cpu_mhz() == 1500.0
