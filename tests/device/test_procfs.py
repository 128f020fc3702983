from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.device.procfs import PinnedFile, cgroup_dirs, parse_cpu_list, read_number, read_text


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    """A missing file is never an exception."""
    assert read_text(tmp_path / "absent") is None
    assert read_number(tmp_path / "absent") is None


def test_a_folder_in_a_file_s_place_is_none(tmp_path: Path) -> None:
    """A file that opens but cannot be read counts as missing."""
    pinned = PinnedFile(str(tmp_path))

    assert pinned.is_open
    assert pinned.read() is None
    pinned.close()


def test_text_in_a_number_s_place_is_none(tmp_path: Path) -> None:
    """A driver may report "<unsupported>"."""
    (tmp_path / "freq").write_text("<unsupported>\n")

    assert read_number(tmp_path / "freq") is None


def test_a_device_tree_string_loses_its_nul(tmp_path: Path) -> None:
    """Device-tree strings end in the NUL of a C string."""
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")

    assert read_text(tmp_path / "model") == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_pinned_file_is_reread_each_time(tmp_path: Path) -> None:
    """Each read starts at the beginning and returns the current content."""
    path = tmp_path / "temp"
    path.write_text("40000\n")
    pinned = PinnedFile(str(path))
    assert pinned.read() == b"40000\n"

    path.write_text("50000\n")

    assert pinned.read() == b"50000\n"
    pinned.close()


def test_a_closed_pinned_file_is_none(tmp_path: Path) -> None:
    """Closing twice is harmless, and later reads return None."""
    (tmp_path / "temp").write_text("1")
    pinned = PinnedFile(str(tmp_path / "temp"))
    pinned.close()
    pinned.close()

    assert pinned.read() is None


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("3", {3}), ("0-3", {0, 1, 2, 3}), ("0-1,8,10-11\n", {0, 1, 8, 10, 11})],
)
def test_cpu_lists_are_parsed(text: str, cpus: set[int]) -> None:
    """The kernel's list format, ranges included."""
    assert parse_cpu_list(text) == cpus


def test_a_container_s_groups_are_found_up_to_the_mount(pod: Path) -> None:
    """Innermost first: any of them may have a limit."""
    top = pod / "sys/fs/cgroup"

    found = [(group.version, group.path) for group in cgroup_dirs("memory", pod)]

    assert found == [
        (2, top / "kubepods/pod1/engine"),
        (2, top / "kubepods/pod1"),
        (2, top / "kubepods"),
        (2, top),
    ]


def test_a_host_path_falls_back_to_the_mount(
    write_tree: Callable[[dict[str, str]], Path],
) -> None:
    """In the host's cgroup namespace the path does not exist inside the container; the mount is the group."""
    root = write_tree(
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "1",
        }
    )

    assert cgroup_dirs("memory", root) == [(1, root / "sys/fs/cgroup/memory")]
    assert cgroup_dirs("cpu", root) == [(1, root / "sys/fs/cgroup/cpu,cpuacct")]
