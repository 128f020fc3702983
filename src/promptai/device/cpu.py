"""Describe the processor, to choose an engine and its number of threads.

``os.cpu_count()`` is the wrong number of threads in three ways: it counts SMT siblings,
which share the SIMD unit that a model saturates; it counts cores that a cpuset withholds
from this process; and it ignores a CFS quota, under which surplus threads run for a few
milliseconds, are all stopped together, and leave every token waiting for the next period.
A container with ``--cpus 1.5`` on a Pi 5 sees four cores and may use one and a half.

Everything is read below ``root``, so tests can describe a board as a folder.

Big and little cores of one chip are not distinguished: ``default_threads`` counts both,
and users of such a chip set the number by hand.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from promptai.device.cpuinfo import architecture, model_name, parse_cpuinfo, simd_features
from promptai.device.procfs import cgroup_dirs, parse_cpu_list, read_number, read_text, to_int

_HERE = Path("/")


class CpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """
    A machine's processor, and the share of it that this process may use.

    Attributes:
        model_name: "Cortex-A76", "AMD EPYC"; "unknown" when the kernel does not report it.
        architecture: As in ``uname -m``: "aarch64", "x86_64".
        logical_cpus: Online CPUs; SMT siblings count separately.
        physical_cores: Online cores.
        usable_cpus: CPUs available to this process (affinity and cpuset).
        usable_cores: Cores with at least one usable CPU.
        quota_cpus: Tightest cgroup quota, in CPUs; ``None`` when unlimited.
        features: SIMD extensions common to all cores, in llama.cpp's names and order.
        governor: Frequency governor, several joined by "+"; ``None`` without cpufreq (most virtual machines).
        max_mhz: Hardware limit of the fastest usable CPU; ``None`` without cpufreq.
    """

    model_name: str
    architecture: str
    logical_cpus: int
    physical_cores: int
    usable_cpus: int
    usable_cores: int
    quota_cpus: float | None = None
    features: tuple[str, ...] = ()
    governor: str | None = None
    max_mhz: float | None = None


def read_cpu(root: Path = _HERE, affinity: Iterable[int] | None = None) -> CpuFacts:
    """
    Read the processor's facts.

    Args:
        root: Parent of /proc and /sys.
        affinity: CPUs that this process may run on; ``None`` for the kernel's answer.
    """
    processors = parse_cpuinfo(read_text(root / "proc/cpuinfo") or "")
    online = _online_cpus(root, {int(p["processor"]) for p in processors if p["processor"].isdigit()})
    allowed = frozenset(os.sched_getaffinity(0) if affinity is None else affinity)
    # Container runtimes may mask the CPU list but not the affinity, or vice versa.
    usable = (online & allowed) or online
    cores = {cpu: _core_of(cpu, root) for cpu in online}
    policies = [root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq" for cpu in sorted(usable)]
    governors = sorted({name for policy in policies if (name := read_text(policy / "scaling_governor"))})
    limits_khz = [khz for policy in policies if (khz := read_number(policy / "cpuinfo_max_freq"))]
    return CpuFacts(
        model_name=model_name(processors),
        architecture=architecture(processors),
        logical_cpus=len(online),
        physical_cores=len(set(cores.values())),
        usable_cpus=len(usable),
        usable_cores=len({cores[cpu] for cpu in usable}),
        quota_cpus=_quota(root),
        features=simd_features(processors),
        governor="+".join(governors) or None,
        max_mhz=max(limits_khz) / 1000 if limits_khz else None,
    )


def default_threads(cpu: CpuFacts) -> int:
    """
    Return the number of engine threads that this process can keep busy; at least 1.

    That is its usable physical cores, limited to the whole CPUs of the quota: one thread
    too many makes all of them wait.
    """
    cores = cpu.usable_cores
    if cpu.quota_cpus is not None:
        cores = min(cores, math.floor(cpu.quota_cpus))
    return max(1, cores)


def board_name(root: Path = _HERE) -> str:
    """
    Return the machine's common name, such as "Raspberry Pi 5 Model B Rev 1.0".

    Uses the device tree's model; on a PC the DMI product, unless it is a hypervisor's
    or a vendor's placeholder; else the processor's name.
    """
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if model := read_text(root / path):
            return model
    product = read_text(root / "sys/class/dmi/id/product_name") or ""
    if product and not _NO_PRODUCT.search(product):
        return product
    return model_name(parse_cpuinfo(read_text(root / "proc/cpuinfo") or ""))


_NO_PRODUCT = re.compile(
    r"filled by|default string|system product name|not (applicable|specified)|^none$|^unknown$"
    r"|standard pc|virtual|vmware|kvm|qemu|hvm|bochs|compute engine|openstack|firecracker",
    re.IGNORECASE,
)
_PI = re.compile(r"^Raspberry Pi (?P<compute>Compute Module )?(?P<kind>Zero 2|Zero|\d+)", re.IGNORECASE)
#: Parts of a processor's marketing name that do not identify it.
_CPU_NOISE = re.compile(r"\((r|tm|c)\)|@.*$|\bwith\b.*$|\b(cpu|processor|(\d+|\w+)-core)\b", re.IGNORECASE)
_SLUG_LENGTH = 32


def board_slug(name: str) -> str:
    """
    Shorten a board's name for directory names: "pi5", "cm4", "amd-epyc"; at most 32 characters.

    Leaves out revision and memory size: boards of one kind share a slug, by which profiles are compared.
    """
    if pi := _PI.match(name):
        kind = pi["kind"].lower().replace(" ", "")
        return ("cm" if pi["compute"] else "pi-" if kind.startswith("zero") else "pi") + kind
    words = re.findall(r"[a-z0-9]+", _CPU_NOISE.sub(" ", name.lower()))
    return "-".join(words)[:_SLUG_LENGTH].strip("-") or "unknown"


def _online_cpus(root: Path, listed: set[int]) -> frozenset[int]:
    """Return the online CPUs; falls back to ``listed`` (from /proc/cpuinfo) when sysfs does not list them."""
    try:
        online = parse_cpu_list(read_text(root / "sys/devices/system/cpu/online") or "")
    except ValueError:
        online = frozenset()
    return online or frozenset(listed) or frozenset({0})


def _core_of(cpu: int, root: Path) -> str:
    """Identify a CPU's physical core by its list of SMT siblings, or by its own number when sysfs has no list."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list") or str(cpu)


def _quota(root: Path) -> float | None:
    """Return the tightest CPU quota of this process's cgroups, in CPUs; ``None`` when unlimited."""
    quotas: list[float] = []
    for version, group in cgroup_dirs("cpu", root):
        if version == 2:
            # "150000 100000"; "max 100000" means unlimited.
            limit, _, period_text = (read_text(group / "cpu.max") or "").partition(" ")
            quota, period = to_int(limit), to_int(period_text)
        else:
            # -1 means unlimited.
            quota, period = read_number(group / "cpu.cfs_quota_us"), read_number(group / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)
