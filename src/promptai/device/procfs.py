"""Read the kernel's small text files, below any root.

/proc and /sys answer everything this package asks, but never the same way
twice: a file may be missing, forbidden, there and yet refuse to be read (PSI
compiled in but switched off gives ``EOPNOTSUPP``), or vanish with its process
between two reads. All of these are one fact here, "this board does not say",
and that fact is ``None``, never 0 and never an exception.

The root is an argument, so that a test can hand over a Raspberry Pi as a
folder. Nothing here interprets a value; the callers know what a file means.
"""

import os
from pathlib import Path
from typing import NamedTuple


def read_text(path: Path) -> str | None:
    """Give the file's text without surrounding space and NULs; ``None`` when it cannot be read."""
    try:
        # Device-tree strings end in a NUL.
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """Give the file's one decimal integer; ``None`` when it cannot be read or holds something else."""
    return to_int(read_text(path))


def to_int(text: str | bytes | None) -> int | None:
    """Give ``text`` as an integer, ``None`` when it is none."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def parse_cpu_list(text: str) -> frozenset[int]:
    """
    Give the numbers in a kernel CPU list such as ``0-3,8``; an empty text names none.

    Raises:
        ValueError: The text is not such a list.
    """
    cpus: set[int] = set()
    for part in text.replace("\n", "").split(","):
        if part.strip():
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


class CgroupDir(NamedTuple):
    """
    One control group that holds this process.

    Attributes:
        version: 1 or 2; it decides how the group's files are called.
        path: The group's folder.
    """

    version: int
    path: Path


def cgroup_dirs(controller: str, root: Path) -> list[CgroupDir]:
    """
    List the groups that can limit this process, innermost first, of both versions.

    A limit may sit on any of them, and the tightest one holds: a pod's quota is
    on its parent, not on the container. Inside a container the path in
    /proc/self/cgroup may be the host's, of which only the tail end exists here,
    or the group itself may be mounted as the top; groups that do not exist are
    passed over by looking at every ancestor up to the mount.

    Args:
        controller: As version 1 calls it, "cpu" or "memory".
        root: Where /proc and /sys are.
    """
    mounts = root / "sys/fs/cgroup"
    found: list[CgroupDir] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        # Version 2 is the line without controllers; a hybrid system mounts it one level down.
        if not controllers:
            tops = [(2, mounts), (2, mounts / "unified")]
        elif controller in controllers.split(","):
            # "cpu,cpuacct" is one mount with a link for each name, or two mounts.
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
    A file of /proc or /sys kept open and read anew from its start each time.

    Once a second for hours, opening costs more than reading. A pinned file of a
    process also keeps naming *that* process: after its death a read fails
    (``ESRCH``), even when the process number is taken again.
    """

    def __init__(self, path: str, size: int = 4096) -> None:
        self._size = size
        try:
            self._fd: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = None

    @property
    def is_open(self) -> bool:
        """True when there was such a file to open."""
        return self._fd is not None

    def read(self) -> bytes | None:
        """Give the file's first ``size`` bytes as they are now; ``None`` when it cannot be read."""
        if self._fd is None:
            return None
        try:
            return os.pread(self._fd, self._size, 0)
        except OSError:
            return None

    def close(self) -> None:
        """Let the file go; reads give ``None`` from now on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
