"""Read the kernel's small text files, below any root.

/proc and /sys differ from board to board: a file may be missing, forbidden, present
but unreadable (PSI compiled in but switched off gives ``EOPNOTSUPP``), or vanish with
its process between two reads. This module reports all of these as ``None``, "not
available on this board": never as 0, never as an exception.

The root is an argument, so tests can pass a Raspberry Pi as a folder. Values are not
interpreted here; callers know what a file means.
"""

import os
from pathlib import Path
from typing import NamedTuple


def read_text(path: Path) -> str | None:
    """Return a file's text without surrounding whitespace and NULs; ``None`` when it cannot be read."""
    try:
        # Device-tree strings end in a NUL.
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """Return a file's single decimal integer; ``None`` when it cannot be read or contains something else."""
    return to_int(read_text(path))


def to_int(text: str | bytes | None) -> int | None:
    """Parse an integer; ``None`` when ``text`` is not one."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def parse_cpu_list(text: str) -> frozenset[int]:
    """
    Parse a kernel CPU list such as ``0-3,8``; an empty text is an empty list.

    Raises:
        ValueError: The text is not a CPU list.
    """
    cpus: set[int] = set()
    for part in text.replace("\n", "").split(","):
        if part.strip():
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


class CgroupDir(NamedTuple):
    """
    A control group that contains this process.

    Attributes:
        version: 1 or 2; determines the names of the group's files.
        path: The group's folder.
    """

    version: int
    path: Path


def cgroup_dirs(controller: str, root: Path) -> list[CgroupDir]:
    """
    List the groups that can limit this process, innermost first, of both cgroup versions.

    Any of them may have a limit, and the tightest applies: a pod's quota is on its parent, not on
    the container. Inside a container, the path in /proc/self/cgroup may be the host's, of which
    only the tail exists here, or the group itself may be mounted as the root; so every ancestor up
    to the mount is tried, and groups that do not exist are skipped.

    Args:
        controller: Name as in version 1: "cpu" or "memory".
        root: Parent of /proc and /sys.
    """
    mounts = root / "sys/fs/cgroup"
    found: list[CgroupDir] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        # The line without controllers is version 2; hybrid systems mount it one level down.
        if not controllers:
            tops = [(2, mounts), (2, mounts / "unified")]
        elif controller in controllers.split(","):
            # "cpu,cpuacct" is one mount with a link per name, or two mounts.
            tops = [(1, mounts / name) for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", "..")]
        for version, top in tops:
            inner_first = [top.joinpath(*names[:depth]) for depth in range(len(names), -1, -1)]
            found += [CgroupDir(version, path) for path in inner_first if path.is_dir()]
    return found


class PinnedFile:
    """
    A file of /proc or /sys that is kept open and reread from its start.

    For readings every second over hours, opening costs more than reading. A pinned file also
    stays bound to *its* process: after that process ends, reads fail (``ESRCH``) even if the PID
    is reused.
    """

    def __init__(self, path: str, size: int = 4096) -> None:
        self._size = size
        try:
            self._fd: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = None

    @property
    def is_open(self) -> bool:
        """Whether the file exists and could be opened."""
        return self._fd is not None

    def read(self) -> bytes | None:
        """Return the file's first ``size`` bytes; ``None`` when it cannot be read."""
        if self._fd is None:
            return None
        try:
            return os.pread(self._fd, self._size, 0)
        except OSError:
            return None

    def close(self) -> None:
        """Close the file; later reads return ``None``."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
