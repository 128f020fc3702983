"""Know how much memory a model may still take, and what one is taking.

A 4 GB board that runs out of memory does not fail, it swaps: tokens come at
0.01 a second and nothing says why. Two numbers prevent that, and both are
easily read wrong. *Free for one more process* is not ``MemFree`` (page cache
counts as used there), nor ``MemAvailable`` inside a container whose cgroup ends
earlier. *Used by the engine* is not its RSS: llama.cpp maps the weights, and
mapped pages are page cache that the kernel can drop, while the KV cache is
anonymous memory that it cannot. So the two kinds are never added up here.

Here is the first number; the second is in ``device.process``. Numbers are bytes.
/proc's "kB" are KiB (proc(5)).
"""

import re
from pathlib import Path

import msgspec

from promptai.device.procfs import cgroup_dirs, read_number, read_text, to_int

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
        limit_bytes: The cgroup limit that is nearest to being hit: the lower of the hard one and the one above
            which the group is slowed down (``memory.high``); ``None``: no limit.
        limit_used_bytes: What counts towards that limit now, less the page cache of files, which the kernel
            gives back before it refuses memory; ``None`` without a limit.
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


def meminfo_bytes(meminfo: bytes, name: bytes) -> int | None:
    """
    Give one line of /proc/meminfo in bytes; ``None`` when it is not there, or a count without a unit.

    Asked every second: looking for three lines costs a quarter of reading all fifty.
    """
    found = re.search(rb"^" + name + rb":\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def read_memory(root: Path = _HERE) -> MemoryFacts:
    """
    Read the machine's memory and this process's limit.

    Raises:
        OSError: There is no /proc/meminfo.
        ValueError: It does not say how much memory there is, or is left.
    """
    meminfo = (root / "proc/meminfo").read_bytes()
    total, available, free, swap_total, swap_free = (
        meminfo_bytes(meminfo, name) for name in (b"MemTotal", b"MemAvailable", b"MemFree", b"SwapTotal", b"SwapFree")
    )
    if total is None:
        raise ValueError("/proc/meminfo has no MemTotal")
    # MemFree is what is left of the truth on kernels before 3.14: too little, never too much.
    left = free if available is None else available
    if left is None:
        raise ValueError("/proc/meminfo has neither MemAvailable nor MemFree")
    limit, used = _tightest_limit(root, total)
    return MemoryFacts(
        total_bytes=total,
        available_bytes=left,
        swap_total_bytes=swap_total or 0,
        swap_used_bytes=0 if swap_total is None or swap_free is None else swap_total - swap_free,
        limit_bytes=limit,
        limit_used_bytes=used,
    )


def _tightest_limit(root: Path, total_bytes: int) -> tuple[int | None, int | None]:
    """Give limit and use, in bytes, of the group with the least left to give."""
    found: list[tuple[int, int, int]] = []
    for version, group in cgroup_dirs("memory", root):
        limits, use = _LIMITS_AND_USE[version]
        set_limits = [value for name in limits if (value := read_number(group / name)) is not None]  # "max" is none
        limit, used = min(set_limits, default=_NO_LIMIT_BYTES), read_number(group / use)
        # A limit beyond the machine limits nothing.
        if used is None or limit >= min(_NO_LIMIT_BYTES, total_bytes):
            continue
        used = max(0, used - _page_cache(group, version))
        found.append((limit - used, limit, used))
    return min(found)[1:] if found else (None, None)


_LIMITS_AND_USE = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    2: (("memory.max", "memory.high"), "memory.current"),
}


def _page_cache(group: Path, version: int) -> int:
    """
    Give the bytes of files in a group's memory, on both of the kernel's lists, as ``MemAvailable`` counts them.

    A model file that was hashed and then loaded was read twice and is all on the active list: counted as
    used, it would have no room beside itself. Shared memory and tmpfs are on neither list.
    """
    prefix = "" if version == 2 else "total_"
    wanted = (f"{prefix}inactive_file", f"{prefix}active_file")
    lines = (line.partition(" ") for line in (read_text(group / "memory.stat") or "").splitlines())
    return sum(to_int(value) or 0 for name, _, value in lines if name in wanted)


def peak_rss_bytes() -> int | None:
    """
    The most memory that this process itself has held (``VmHWM``).

    Not getrusage's ``ru_maxrss``: execve carries the parent's peak over into it, so
    that a small child of a large parent would be reported as large.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", read_text(_HERE / "proc/self/status") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None
