"""Machines as folders: /proc and /sys of the boards used in the tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

WriteTree = Callable[[dict[str, str]], Path]

_PI_CORE = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
_PI_BOARD = """\
Revision\t: c04170
Serial\t\t: 0000000000000000
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
_PI_MEMINFO = """\
MemTotal:        4129600 kB
MemFree:          210000 kB
MemAvailable:    3300000 kB
Buffers:           64000 kB
Cached:          3000000 kB
SwapTotal:        524288 kB
SwapFree:         524000 kB
HugePages_Total:       0
"""
_PC_FLAGS = "fpu lm pni ssse3 fma avx f16c avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni avx512vbmi"


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """Write files below a root: path without the leading slash → content."""

    def write(files: dict[str, str]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


@pytest.fixture
def pi5(write_tree: WriteTree) -> Path:
    """A 4 GB Raspberry Pi 5 with swap."""
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/cpuinfo": "".join(_PI_CORE.format(number=n) for n in range(4)) + _PI_BOARD,
        "proc/meminfo": _PI_MEMINFO,
        "proc/loadavg": "1.52 0.80 0.40 2/180 4242\n",
        "proc/stat": "cpu  400 0 40 3560 0 0 0 0 0 0\n"
        + "".join(f"cpu{n} 100 0 10 890 0 0 0 0 0 0\n" for n in range(4))
        + "intr 1 2 3\n",
        "proc/self/cgroup": "0::/user.slice\n",
        "proc/self/statm": "900 400 300 1 0 200 0\n",
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "61450\n",
        f"{cpu}/online": "0-3\n",
    }
    for n in range(4):
        files |= {
            f"{cpu}/cpu{n}/topology/core_cpus_list": f"{n}\n",
            f"{cpu}/cpu{n}/cpufreq/scaling_governor": "ondemand\n",
            f"{cpu}/cpu{n}/cpufreq/cpuinfo_max_freq": "2400000\n",
            f"{cpu}/cpu{n}/cpufreq/scaling_cur_freq": "1500000\n",
        }
    return write_tree(files)


@pytest.fixture
def pod(pi5: Path, write_tree: WriteTree) -> Path:
    """A container on that Pi: a quota of 1.5 CPUs on its own group, a limit of 1 GiB of memory on its parent."""
    group = "sys/fs/cgroup/kubepods/pod1"
    assert pi5.exists()
    return write_tree(
        {
            "proc/self/cgroup": "0::/kubepods/pod1/engine\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            f"{group}/cpu.max": "max 100000\n",
            f"{group}/memory.max": "1073741824\n",
            f"{group}/memory.current": "700000000\n",
            f"{group}/memory.stat": "anon 100000000\ninactive_file 200000000\nactive_file 400000000\n",
            f"{group}/engine/cpu.max": "150000 100000\n",
            f"{group}/engine/memory.max": "max\n",
            f"{group}/engine/memory.current": "700000000\n",
        }
    )


@pytest.fixture
def pc(write_tree: WriteTree) -> Path:
    """An x86 machine with 4 cores of 2 SMT threads, numbered as by Linux: siblings are n and n + 4."""
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/cpuinfo": "".join(
            f"processor\t: {n}\nmodel name\t: 11th Gen Intel(R) Core(TM) i5-1145G7 @ 2.60GHz\n"
            f"physical id\t: 0\ncore id\t\t: {n % 4}\nflags\t\t: {_PC_FLAGS}\n\n"
            for n in range(8)
        ),
        "proc/self/cgroup": "0::/\n",
        "sys/class/dmi/id/product_name": "OptiPlex 7090\n",
        f"{cpu}/online": "0-7\n",
    }
    for n in range(8):
        files[f"{cpu}/cpu{n}/topology/thread_siblings_list"] = f"{n % 4},{n % 4 + 4}\n"
        files[f"{cpu}/cpu{n}/cpufreq/scaling_governor"] = "powersave\n" if n else "performance\n"
        files[f"{cpu}/cpu{n}/cpufreq/cpuinfo_max_freq"] = "4400000\n"
    return write_tree(files)
