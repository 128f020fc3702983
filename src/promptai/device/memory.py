"""Read how much memory is available to one more model.

A 4 GB board that runs out of memory does not fail, it swaps: it generates 0.01 tokens/s
and logs no reason. Two figures prevent that, and both are easily misread. *Available to
one more process* is not ``MemFree`` (which counts page cache as used), nor
``MemAvailable`` inside a container with a lower cgroup limit. *Used by the engine* is
not its RSS: llama.cpp maps the weights, and mapped pages are page cache that the kernel
can drop, while the KV cache is anonymous memory that it cannot. So the two kinds are
never added up.

This module reads the first figure, ``device.process`` the second. Values are in bytes;
/proc's "kB" are KiB (proc(5)).
"""

import re
from pathlib import Path

import msgspec

from promptai.device.procfs import cgroup_dirs, read_number, read_text, to_int

_HERE = Path("/")
#: cgroup version 1 represents "no limit" by the largest page-aligned number; no machine has an exbibyte.
_NO_LIMIT_BYTES = 1 << 60


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """
    A machine's memory, and the share of it that this process may use.

    Attributes:
        total_bytes: Memory managed by the kernel: less than the board's nominal size.
        available_bytes: Memory available to a new process without swapping (``MemAvailable``).
        swap_total_bytes: 0 without swap.
        swap_used_bytes: Swap in use, zram included.
        limit_bytes: The cgroup limit closest to being reached: the lower of the hard limit and the throttling
            limit (``memory.high``); ``None`` when unlimited.
        limit_used_bytes: Usage counted towards that limit, less the page cache of files, which the kernel
            reclaims before it denies memory; ``None`` when unlimited.
    """

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_used_bytes: int
    limit_bytes: int | None = None
    limit_used_bytes: int | None = None

    def available_for_new_process(self) -> int:
        """Return the bytes available to one more process: the machine's, or less if the cgroup has less left."""
        if self.limit_bytes is None:
            return self.available_bytes
        headroom = self.limit_bytes - (self.limit_used_bytes or 0)
        return max(0, min(self.available_bytes, headroom))


def meminfo_bytes(meminfo: bytes, name: bytes) -> int | None:
    """
    Return one value of /proc/meminfo in bytes; ``None`` when it is missing, or a count without a unit.

    Searches for a single line because it runs every second: three searches cost a quarter of parsing all fifty lines.
    """
    found = re.search(rb"^" + name + rb":\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def read_memory(root: Path = _HERE) -> MemoryFacts:
    """
    Read the machine's memory and this process's limit.

    Raises:
        OSError: /proc/meminfo cannot be read.
        ValueError: It lacks the total or the available memory.
    """
    meminfo = (root / "proc/meminfo").read_bytes()
    total, available, free, swap_total, swap_free = (
        meminfo_bytes(meminfo, name) for name in (b"MemTotal", b"MemAvailable", b"MemFree", b"SwapTotal", b"SwapFree")
    )
    if total is None:
        raise ValueError("/proc/meminfo has no MemTotal")
    # Kernels before 3.14 have no MemAvailable; MemFree is a lower bound of it.
    available = free if available is None else available
    if available is None:
        raise ValueError("/proc/meminfo has neither MemAvailable nor MemFree")
    limit, used = _tightest_limit(root, total)
    return MemoryFacts(
        total_bytes=total,
        available_bytes=available,
        swap_total_bytes=swap_total or 0,
        swap_used_bytes=0 if swap_total is None or swap_free is None else swap_total - swap_free,
        limit_bytes=limit,
        limit_used_bytes=used,
    )


def _tightest_limit(root: Path, total_bytes: int) -> tuple[int | None, int | None]:
    """Return limit and usage, in bytes, of the group with the least memory left."""
    found: list[tuple[int, int, int]] = []
    for version, group in cgroup_dirs("memory", root):
        limits, use = _LIMITS_AND_USE[version]
        set_limits = [value for name in limits if (value := read_number(group / name)) is not None]  # None for "max"
        limit, used = min(set_limits, default=_NO_LIMIT_BYTES), read_number(group / use)
        # A limit above the machine's memory has no effect.
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
    Return a group's page cache of files, active and inactive, as ``MemAvailable`` counts it.

    The active list counts because a model file that was hashed and then loaded has been read twice and is entirely
    on it: counted as used, the model would not fit beside its own file. Shared memory and tmpfs are on neither list.
    """
    prefix = "" if version == 2 else "total_"
    wanted = (f"{prefix}inactive_file", f"{prefix}active_file")
    lines = (line.partition(" ") for line in (read_text(group / "memory.stat") or "").splitlines())
    return sum(to_int(value) or 0 for name, _, value in lines if name in wanted)


def peak_rss_bytes() -> int | None:
    """
    Return this process's peak memory (``VmHWM``).

    Not getrusage's ``ru_maxrss``: execve carries the parent's peak over, so a small child of a
    large parent would be reported as large.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", read_text(_HERE / "proc/self/status") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None
