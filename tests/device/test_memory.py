import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.device.memory import MemoryFacts, parse_meminfo, read_memory, read_process_tree

WriteTree = Callable[[dict[str, str]], Path]
KIB = 1024


def test_a_machine_without_meminfo_is_an_error(tmp_path: Path) -> None:
    """Without the machine's memory there is nothing to advise on."""
    with pytest.raises(FileNotFoundError):
        read_memory(tmp_path)


def test_a_meminfo_without_a_total_is_an_error(write_tree: WriteTree) -> None:
    """A total of 0 would be an invented answer."""
    with pytest.raises(ValueError, match="MemTotal"):
        read_memory(write_tree({"proc/meminfo": "MemFree: 1 kB\n"}))


def test_a_cgroup_that_is_over_its_limit_leaves_nothing() -> None:
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


def test_an_old_kernel_without_memavailable_counts_free_memory_alone(write_tree: WriteTree) -> None:
    """Too little rather than too much."""
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
    """No cgroup, no other bound."""
    assert read_memory(pi5).available_for_new_process() == 3300000 * KIB


def test_the_limit_of_an_ancestor_holds(pod: Path) -> None:
    """The page cache that the kernel would drop first does not count as used."""
    facts = read_memory(pod)

    assert (facts.limit_bytes, facts.limit_used_bytes) == (1 << 30, 400_000_000)
    assert facts.available_for_new_process() == (1 << 30) - 400_000_000


def test_the_group_with_the_least_left_is_the_limit(pod: Path, write_tree: WriteTree) -> None:
    """The smallest limit is not always the nearest."""
    write_tree({"sys/fs/cgroup/kubepods/pod1/engine/memory.max": "1000000000\n"})

    facts = read_memory(pod)

    # The container's own group says nothing of its page cache, so all of its use counts.
    assert (facts.limit_bytes, facts.limit_used_bytes) == (1_000_000_000, 700_000_000)


def test_a_version_1_limit_is_read(pi5: Path, write_tree: WriteTree) -> None:
    """Version 1 has other names for the same facts."""
    group = "sys/fs/cgroup/memory"
    write_tree(
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n",
            f"{group}/memory.limit_in_bytes": "2000000000\n",
            f"{group}/memory.usage_in_bytes": "500000000\n",
            f"{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 100000000\n",
        }
    )

    facts = read_memory(pi5)

    assert (facts.limit_bytes, facts.limit_used_bytes) == (2_000_000_000, 400_000_000)


def test_a_limit_beyond_the_machine_is_no_limit(pi5: Path, write_tree: WriteTree) -> None:
    """Version 1 writes "unlimited" as the largest number it has."""
    write_tree(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000\n",
        }
    )

    assert read_memory(pi5).limit_bytes is None


def test_counts_are_not_taken_for_bytes() -> None:
    """HugePages_Total has no unit: it is a number of pages."""
    assert parse_meminfo(b"MemTotal: 8 kB\nHugePages_Total: 5\n") == {"MemTotal": 8 * KIB}


def test_a_process_that_never_was_is_none(tmp_path: Path) -> None:
    """No process, no zeros."""
    assert read_process_tree(4242, tmp_path) is None


def test_one_process_is_read_in_under_two_milliseconds() -> None:
    """The best of several, because this machine has other things to do."""

    def once() -> float:
        begin = time.perf_counter()
        assert read_process_tree(os.getpid()) is not None
        return time.perf_counter() - begin

    assert min(once() for _ in range(20)) < 0.002
