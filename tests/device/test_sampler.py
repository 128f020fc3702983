from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from promptai.device.sample import Sample
from promptai.device.sampler import Sampler

WriteTree = Callable[[dict[str, str]], Path]
ALWAYS = {"t", "own_cpu_percent_of_one_core"}


class Clock:
    """A clock that the test advances."""

    now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def no_command(_argv: Sequence[str]) -> None:
    """A machine without vcgencmd."""


def put_engine(write: WriteTree, *, ticks: int, faults: int = 0) -> None:
    write(
        {
            "proc/77/stat": f"77 (llama-server) S 1 1 1 0 -1 4 9 0 {faults} 0 {ticks} 0 0 0 0\n",
            "proc/77/status": "RssAnon:\t 10 kB\nRssFile:\t 200 kB\nRssShmem:\t 1 kB\nVmSwap:\t 0 kB\n",
            "proc/77/task/77/children": "",
        }
    )


def test_a_bare_machine_s_sample_contains_no_zeros(tmp_path: Path) -> None:
    """Missing values are null in the file."""
    clock = Clock()
    sampler = Sampler(tmp_path, no_command, clock, frozenset({0}))
    sampler.sample()
    clock.now += 1

    fields = msgspec.to_builtins(sampler.sample())

    assert {name for name, value in fields.items() if value is not None} == ALWAYS
    assert sampler.energy_source == "none"


def test_the_first_sample_has_no_rates(pi5: Path) -> None:
    """A rate needs two readings."""
    sample = Sampler(pi5, no_command, Clock(), frozenset(range(4))).sample()

    assert sample.cpu_percent is None
    assert sample.own_cpu_percent_of_one_core is None
    assert sample.temperature_c == 61.45


def test_an_ended_engine_has_no_values(pi5: Path, write_tree: WriteTree) -> None:
    """Its last values must not be repeated for ever."""
    put_engine(write_tree, ticks=0)
    sampler = Sampler(pi5, no_command, Clock(), frozenset(range(4)))
    sampler.watch(77)
    assert sampler.sample().engine_rss_bytes == 211 * 1024
    (pi5 / "proc/77/stat").write_text("")

    sample = sampler.sample()

    assert (sample.engine_anon_bytes, sample.engine_rss_bytes, sample.major_faults) == (None, None, None)


def test_an_engine_without_memory_figures_is_still_watched(pi5: Path, write_tree: WriteTree) -> None:
    """Unknown fields are null: 0 bytes would lower a mean."""
    put_engine(write_tree, ticks=0, faults=3)
    write_tree({"proc/77/status": "RssAnon:\t 10 kB\nRssFile:\t 200 kB\n"})
    sampler = Sampler(pi5, no_command, Clock(), frozenset(range(4)))
    sampler.watch(77)

    sample = sampler.sample()

    assert (sample.engine_anon_bytes, sample.engine_file_bytes) == (10 * 1024, 200 * 1024)
    assert (sample.engine_rss_bytes, sample.major_faults) == (None, 3)


def test_times_count_from_the_origin(pi5: Path) -> None:
    """A run resumed after a reboot continues its own clock."""
    sampler = Sampler(pi5, no_command, Clock(), frozenset({0}), origin=-250.5)

    assert sampler.sample().t == 1250.5


def test_a_missing_process_is_not_watched(pi5: Path) -> None:
    """The engine may end before it is watched."""
    sampler = Sampler(pi5, no_command, Clock(), frozenset(range(4)))

    sampler.watch(77)

    assert (sampler.sample().engine_cpu_percent, sampler.sample().major_faults) == (None, None)


def test_an_engine_s_share_is_of_all_usable_cores(pi5: Path, write_tree: WriteTree) -> None:
    """Two of four busy cores are 50, not 200; usage before the watch does not count."""
    clock = Clock()
    put_engine(write_tree, ticks=5000)
    sampler = Sampler(pi5, no_command, clock, frozenset(range(4)))
    sampler.watch(77)
    clock.now += 2
    put_engine(write_tree, ticks=5400, faults=3)

    sample = sampler.sample()

    assert sample.engine_cpu_percent == pytest.approx(50.0)
    assert sample.major_faults == 3


def test_a_sample_right_after_the_watch_has_no_share(pi5: Path, write_tree: WriteTree) -> None:
    """Over less than a tick the share would be 0 or in the hundreds; the next sample counts from the watch."""
    clock = Clock()
    put_engine(write_tree, ticks=0)
    sampler = Sampler(pi5, no_command, clock, frozenset(range(4)))
    sampler.watch(77)
    clock.now += 0.001
    assert sampler.sample().engine_cpu_percent is None

    clock.now += 0.999
    put_engine(write_tree, ticks=100)

    assert sampler.sample().engine_cpu_percent == pytest.approx(25.0)


def test_watching_another_engine_resets_the_count(pi5: Path, write_tree: WriteTree) -> None:
    """The difference between two engines' CPU times is meaningless."""
    clock = Clock()
    put_engine(write_tree, ticks=9000)
    sampler = Sampler(pi5, no_command, clock, frozenset(range(4)))
    sampler.watch(77)
    sampler.watch(None)
    clock.now += 1
    assert sampler.sample().engine_cpu_percent is None

    sampler.watch(77)
    clock.now += 1

    assert sampler.sample().engine_cpu_percent == 0.0


def test_a_pi_5_s_sample_is_complete(pi5: Path, write_tree: WriteTree) -> None:
    """Every field has a value on the board that the format was made for."""
    answers = {
        "get_throttled": "throttled=0x20002\n",
        "pmic_read_adc": "VDD_CORE_A current(7)=2.0A\nVDD_CORE_V volt(15)=0.9V\n",
    }
    clock = Clock()
    put_engine(write_tree, ticks=0)
    write_tree({"proc/pressure/memory": "some avg10=1.50 avg60=0 avg300=0 total=1\n"})
    sampler = Sampler(pi5, lambda argv: answers[argv[1]], clock, frozenset(range(4)))
    sampler.watch(77)
    sampler.sample()
    clock.now += 1
    put_engine(write_tree, ticks=200)
    write_tree({"proc/stat": "cpu 0\n" + "".join(f"cpu{n} 160 0 10 930 0 0 0 0\n" for n in range(4))})

    sample = sampler.sample()

    assert sampler.energy_source == "pmic_rails"
    assert msgspec.structs.replace(sample, own_cpu_percent_of_one_core=None, own_rss_bytes=None) == Sample(
        t=1001.0,
        cpu_percent=60.0,
        engine_cpu_percent=50.0,
        engine_anon_bytes=10 * 1024,
        engine_file_bytes=200 * 1024,
        engine_rss_bytes=211 * 1024,
        available_bytes=3300000 * 1024,
        swap_used_bytes=288 * 1024,
        major_faults=0,
        load1=1.52,
        temperature_c=61.45,
        cpu_mhz=1500.0,
        throttled=0x20002,
        watts=1.8,
        memory_pressure=1.5,
    )
