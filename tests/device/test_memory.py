from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.device.memory import MemoryFacts, meminfo_bytes, read_memory

WriteTree = Callable[[dict[str, str]], Path]
KIB = 1024


def test_a_machine_without_meminfo_is_an_error(tmp_path: Path) -> None:
    """Advice needs the machine's memory."""
    with pytest.raises(FileNotFoundError):
        read_memory(tmp_path)


def test_a_meminfo_without_a_total_is_an_error(write_tree: WriteTree) -> None:
    """A total of 0 would be invented."""
    with pytest.raises(ValueError, match="MemTotal"):
        read_memory(write_tree({"proc/meminfo": "MemFree: 1 kB\n"}))


def test_a_cgroup_above_its_limit_leaves_nothing() -> None:
    """Never a negative number of bytes."""
    facts = MemoryFacts(
        total_bytes=100,
        available_bytes=50,
        swap_total_bytes=0,
        swap_used_bytes=0,
        limit_bytes=10,
        limit_used_bytes=12,
    )

    assert facts.available_for_new_process() == 0


def test_without_memavailable_only_free_memory_counts(write_tree: WriteTree) -> None:
    """Kernels before 3.14; the result is too low rather than too high."""
    root = write_tree({"proc/meminfo": "MemTotal: 100 kB\nMemFree: 20 kB\nCached: 60 kB\n"})

    assert read_memory(root).available_bytes == 20 * KIB


def test_a_pi_s_memory_is_read_in_bytes(pi5: Path) -> None:
    """/proc's "kB" are KiB."""
    assert read_memory(pi5) == MemoryFacts(
        total_bytes=4129600 * KIB,
        available_bytes=3300000 * KIB,
        swap_total_bytes=524288 * KIB,
        swap_used_bytes=288 * KIB,
    )


def test_without_a_limit_a_new_process_may_take_what_is_available(pi5: Path) -> None:
    """Without a cgroup there is no other bound."""
    assert read_memory(pi5).available_for_new_process() == 3300000 * KIB


def test_the_limit_of_an_ancestor_applies(pod: Path) -> None:
    """Page cache does not count as used: a model file that was read twice is entirely on the active list."""
    facts = read_memory(pod)

    assert (facts.limit_bytes, facts.limit_used_bytes) == (1 << 30, 100_000_000)
    assert facts.available_for_new_process() == (1 << 30) - 100_000_000


@pytest.mark.parametrize(
    ("high", "limit"),
    [("800000000", 800_000_000), ("2000000000", 1 << 30), ("max", 1 << 30)],
    ids=["below", "above", "none"],
)
def test_memory_high_counts_as_a_limit(pod: Path, write_tree: WriteTree, high: str, limit: int) -> None:
    """Above it the kernel does not kill the group but slows it down until nothing moves."""
    write_tree({"sys/fs/cgroup/kubepods/pod1/memory.high": f"{high}\n"})

    assert read_memory(pod).limit_bytes == limit


def test_memory_high_counts_without_memory_max(pod: Path, write_tree: WriteTree) -> None:
    """Units of systemd often set MemoryHigh= without MemoryMax=."""
    group = "sys/fs/cgroup/kubepods/pod1"
    write_tree({f"{group}/memory.high": "500000000\n", f"{group}/memory.max": "max\n"})

    assert read_memory(pod).available_for_new_process() == 400_000_000


def test_the_group_with_the_least_left_is_the_limit(pod: Path, write_tree: WriteTree) -> None:
    """The smallest limit is not always the closest."""
    write_tree({"sys/fs/cgroup/kubepods/pod1/engine/memory.max": "1000000000\n"})

    facts = read_memory(pod)

    # The container's own group does not report its page cache, so all of its usage counts.
    assert (facts.limit_bytes, facts.limit_used_bytes) == (1_000_000_000, 700_000_000)


def test_a_version_1_limit_is_read(pi5: Path, write_tree: WriteTree) -> None:
    """Version 1 has other file names."""
    group = "sys/fs/cgroup/memory"
    write_tree(
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n",
            f"{group}/memory.limit_in_bytes": "2000000000\n",
            f"{group}/memory.usage_in_bytes": "500000000\n",
            f"{group}/memory.stat": "active_file 1\ntotal_inactive_file 60000000\ntotal_active_file 40000000\n",
        }
    )

    facts = read_memory(pi5)

    assert (facts.limit_bytes, facts.limit_used_bytes) == (2_000_000_000, 400_000_000)


def test_a_limit_above_the_machine_s_memory_is_no_limit(pi5: Path, write_tree: WriteTree) -> None:
    """Version 1 represents "unlimited" by its largest number."""
    write_tree(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000\n",
        }
    )

    assert read_memory(pi5).limit_bytes is None


def test_a_count_without_a_unit_is_not_a_size() -> None:
    """HugePages_Total is a number of pages."""
    meminfo = b"MemTotal:      8 kB\nHugePages_Total: 5\n"

    assert meminfo_bytes(meminfo, b"MemTotal") == 8 * KIB
    assert meminfo_bytes(meminfo, b"HugePages_Total") is None


def test_a_line_is_found_by_its_whole_name() -> None:
    """SwapCached and MemFreeable are not Cached and MemFree."""
    meminfo = b"SwapCached: 1 kB\nMemFreeable: 2 kB\nCached: 3 kB\nMemFree: 4 kB\n"

    assert [meminfo_bytes(meminfo, name) for name in (b"Cached", b"MemFree", b"Absent")] == [3 * KIB, 4 * KIB, None]
