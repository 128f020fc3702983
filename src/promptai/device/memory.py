"""Know how much memory a model may still take, and what one is taking.

A 4 GB board that runs out of memory does not fail, it swaps: tokens come at
0.01 a second and nothing says why. Two numbers prevent that, and both are
easily read wrong. *Free for one more process* is not ``MemFree`` (page cache
counts as used there), nor ``MemAvailable`` inside a container whose cgroup ends
earlier. *Used by the engine* is not its RSS: llama.cpp maps the weights, and
mapped pages are page cache that the kernel can drop, while the KV cache is
anonymous memory that it cannot. So the two kinds are never added up here.

Numbers are bytes. /proc's "kB" are KiB (proc(5)). What one read costs is in the
docstring of ``ProcessTree``.

Does not tell shared pages apart: a file mapped by two processes of one tree is
counted twice (PSS would cost milliseconds a read: smaps walks the page tables).
"""

import re
from pathlib import Path

import msgspec

from promptai.device.process import ProcessMemory, ProcessTree
from promptai.device.procfs import cgroup_dirs, read_number, read_text, to_int

__all__ = ["MemoryFacts", "ProcessMemory", "parse_meminfo", "read_memory", "read_process_tree"]

_HERE = Path("/")
#: Version 1 writes "no limit" as the largest page-aligned number; no machine has an exbibyte.
_NO_LIMIT_BYTES = 1 << 60


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """
    One machine's memory, and the part of it that this process may use.

    Attributes:
        total_bytes: What the kernel manages: less than the board is sold with.
        available_bytes: What the machine could give to a new process without swapping (``MemAvailable``).
        swap_total_bytes: 0 where there is no swap.
        swap_used_bytes: Swap in use, zram included.
        limit_bytes: The cgroup limit that is nearest to being hit; ``None``: no limit.
        limit_used_bytes: What counts towards that limit now, less inactive page cache, which the kernel gives
            back before it refuses memory (kubelet's "working set"); ``None`` without a limit.
    """

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_used_bytes: int
    limit_bytes: int | None = None
    limit_used_bytes: int | None = None

    def available_for_new_process(self) -> int:
        """Give the bytes that one more process could take: what the machine has or the cgroup leaves."""
        if self.limit_bytes is None:
            return self.available_bytes
        headroom = self.limit_bytes - (self.limit_used_bytes or 0)
        return max(0, min(self.available_bytes, headroom))


def parse_meminfo(text: str | bytes) -> dict[str, int]:
    """Give /proc/meminfo as bytes by the kernel's names; lines without "kB" are counts and are left out."""
    lines = (text.decode("ascii", "replace") if isinstance(text, bytes) else text).splitlines()
    found: dict[str, int] = {}
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[2] == "kB" and (kib := to_int(words[1])) is not None:
            found[words[0].rstrip(":")] = kib * 1024
    return found


def read_memory(root: Path = _HERE) -> MemoryFacts:
    """
    Read the machine's memory and this process's limit.

    Raises:
        OSError: There is no /proc/meminfo.
        ValueError: It does not say how much memory there is.
    """
    meminfo = parse_meminfo((root / "proc/meminfo").read_bytes())
    try:
        total, swap_total = meminfo["MemTotal"], meminfo.get("SwapTotal", 0)
        # MemFree is what is left of the truth on kernels before 3.14: too little, never too much.
        available = meminfo.get("MemAvailable", meminfo.get("MemFree"))
    except KeyError:
        raise ValueError("/proc/meminfo has no MemTotal") from None
    limit, used = _tightest_limit(root, total)
    return MemoryFacts(
        total_bytes=total,
        available_bytes=available or 0,
        swap_total_bytes=swap_total,
        swap_used_bytes=swap_total - meminfo.get("SwapFree", swap_total),
        limit_bytes=limit,
        limit_used_bytes=used,
    )


def read_process_tree(pid: int, root: Path = _HERE) -> ProcessMemory | None:
    """
    Add up the memory of a process and all its descendants, now.

    Returns:
        ``None`` when the process itself is gone. Descendants that end while
        being read are left out.
    """
    tree = ProcessTree(pid, root)
    try:
        reading = tree.read()
    finally:
        tree.close()
    return None if reading is None else reading.memory


def _tightest_limit(root: Path, total_bytes: int) -> tuple[int | None, int | None]:
    """Give limit and use, in bytes, of the group with the least left to give."""
    found: list[tuple[int, int, int]] = []
    for version, group in cgroup_dirs("memory", root):
        names = ("memory.max", "memory.current") if version == 2 else _V1_NAMES
        limit, used = (read_number(group / name) for name in names)
        # A limit beyond the machine limits nothing; "max" is no number.
        if limit is None or used is None or limit >= min(_NO_LIMIT_BYTES, total_bytes):
            continue
        used = max(0, used - _inactive_file(group, version))
        found.append((limit - used, limit, used))
    _, limit, used = min(found, default=(None, None, None))
    return limit, used


_V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _inactive_file(group: Path, version: int) -> int:
    """Give the bytes of page cache in a group that the kernel would drop first."""
    wanted = "inactive_file" if version == 2 else "total_inactive_file"
    for line in (read_text(group / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == wanted:
            return to_int(value) or 0
    return 0


def peak_rss_bytes() -> int | None:
    """
    The most memory that this process itself has held (``VmHWM``).

    Not getrusage's ``ru_maxrss``: execve carries the parent's peak over into it, so
    that a small child of a large parent would be reported as large.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", read_text(_HERE / "proc/self/status") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None
