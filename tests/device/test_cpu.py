import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from promptai.device.cpu import CpuFacts, board_name, board_slug, default_threads, read_cpu

WriteTree = Callable[[dict[str, str]], Path]


def test_a_machine_that_reports_nothing_has_one_cpu_and_no_features(tmp_path: Path) -> None:
    """Unknown values are "unknown" or None; only the one CPU that runs the test is certain."""
    assert read_cpu(tmp_path, affinity={0}) == CpuFacts(
        model_name="unknown",
        architecture=os.uname().machine,
        logical_cpus=1,
        physical_cores=1,
        usable_cpus=1,
        usable_cores=1,
    )


def test_a_quota_below_one_cpu_still_allows_one_thread(pod: Path, write_tree: WriteTree) -> None:
    """An engine needs at least one thread."""
    write_tree({"sys/fs/cgroup/kubepods/pod1/engine/cpu.max": "50000 100000\n"})

    cpu = read_cpu(pod, affinity=range(4))

    assert cpu.quota_cpus == 0.5
    assert default_threads(cpu) == 1


def test_the_quota_is_rounded_down(pod: Path) -> None:
    """With 1.5 CPUs a second thread would make both of them wait."""
    cpu = read_cpu(pod, affinity=range(4))

    assert cpu.quota_cpus == 1.5
    assert default_threads(cpu) == 1


def test_the_tightest_quota_of_all_ancestors_applies(pod: Path, write_tree: WriteTree) -> None:
    """A pod's limit applies to its containers."""
    write_tree({"sys/fs/cgroup/kubepods/pod1/cpu.max": "120000 100000\n"})

    assert read_cpu(pod, affinity=range(4)).quota_cpus == 1.2


def test_a_version_1_quota_is_read(pi5: Path, write_tree: WriteTree) -> None:
    """Older container hosts still keep the quota in two files."""
    write_tree(
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
    )

    assert default_threads(read_cpu(pi5, affinity=range(4))) == 2


def test_an_unlimited_quota_is_none(pi5: Path, write_tree: WriteTree) -> None:
    """Version 1 writes -1, version 2 "max"; neither is a number of CPUs."""
    write_tree(
        {
            "proc/self/cgroup": "3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )

    assert read_cpu(pi5, affinity=range(4)).quota_cpus is None


def test_an_affinity_to_cpus_that_are_offline_is_ignored(pi5: Path) -> None:
    """Some sandboxes report an affinity unrelated to the CPUs that they list."""
    assert read_cpu(pi5, affinity={64, 65}).usable_cpus == 4


def test_smt_siblings_count_once(pc: Path) -> None:
    """Two threads of one core share the SIMD unit that a model saturates."""
    cpu = read_cpu(pc, affinity=range(8))

    assert (cpu.logical_cpus, cpu.physical_cores, cpu.usable_cpus) == (8, 4, 8)
    assert default_threads(cpu) == 4


def test_a_cpuset_of_two_siblings_is_one_core(pc: Path) -> None:
    """CPUs 1 and 5 are one core; a cpuset may split cores."""
    assert default_threads(read_cpu(pc, affinity={1, 5})) == 1
    assert default_threads(read_cpu(pc, affinity={1, 2, 5})) == 2


def test_without_topology_every_cpu_is_a_core(pi5: Path, write_tree: WriteTree) -> None:
    """Some containers hide the topology, so only CPUs can be counted."""
    for n in range(4):
        write_tree({f"sys/devices/system/cpu/cpu{n}/topology/core_cpus_list": ""})

    assert read_cpu(pi5, affinity=range(4)).physical_cores == 4


def test_a_malformed_online_list_falls_back_to_cpuinfo(pi5: Path, write_tree: WriteTree) -> None:
    """The number of processors is in two files; one is enough."""
    write_tree({"sys/devices/system/cpu/online": "garbage"})

    assert read_cpu(pi5, affinity=range(4)).logical_cpus == 4


def test_a_pi_5_is_recognised(pi5: Path) -> None:
    """Every fact that the advice for a Pi 5 uses."""
    cpu = read_cpu(pi5, affinity=range(4))

    assert cpu == CpuFacts(
        model_name="Cortex-A76",
        architecture="aarch64",
        logical_cpus=4,
        physical_cores=4,
        usable_cpus=4,
        usable_cores=4,
        quota_cpus=None,
        features=("NEON", "ARM_FMA", "FP16_VA", "DOTPROD"),
        governor="ondemand",
        max_mhz=2400.0,
    )
    assert default_threads(cpu) == 4


def test_mixed_governors_are_all_named(pc: Path) -> None:
    """One core left on another governor explains a strange measurement."""
    assert read_cpu(pc, affinity=range(8)).governor == "performance+powersave"
    assert read_cpu(pc, affinity={3}).governor == "powersave"


def test_facts_survive_json(pi5: Path) -> None:
    """The facts are part of a run's manifest."""
    cpu = read_cpu(pi5, affinity=range(4))

    assert msgspec.json.decode(msgspec.json.encode(cpu), type=CpuFacts) == cpu


def test_this_machine_can_be_read() -> None:
    """Reads the real /proc and /sys of the test machine."""
    cpu = read_cpu()

    assert 1 <= default_threads(cpu) <= cpu.logical_cpus
    assert cpu.usable_cpus == len(os.sched_getaffinity(0))


def test_a_board_s_name_comes_from_the_device_tree(pi5: Path) -> None:
    """The name that a user would search for."""
    assert board_name(pi5) == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_pc_s_name_is_its_dmi_product(pc: Path) -> None:
    """The vendor sets it."""
    assert board_name(pc) == "OptiPlex 7090"


@pytest.mark.parametrize("product", ["", "To Be Filled By O.E.M.", "Standard PC (Q35 + ICH9, 2009)", "HVM domU"])
def test_placeholder_products_fall_back_to_the_processor(pc: Path, write_tree: WriteTree, product: str) -> None:
    """Placeholders and hypervisors are unrelated to speed."""
    write_tree({"sys/class/dmi/id/product_name": product})

    assert board_name(pc) == "11th Gen Intel(R) Core(TM) i5-1145G7 @ 2.60GHz"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("", "unknown"),
        ("Raspberry Pi 5 Model B Rev 1.0", "pi5"),
        ("Raspberry Pi 4 Model B Rev 1.4", "pi4"),
        ("Raspberry Pi 500 Rev 1.0", "pi500"),
        ("Raspberry Pi Compute Module 5 Rev 1.0", "cm5"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "pi-zero2"),
        ("Radxa ROCK 5B", "radxa-rock-5b"),
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763"),
        ("AMD Ryzen 7 5800H with Radeon Graphics", "amd-ryzen-7-5800h"),
        ("Intel(R) Xeon(R) Platinum 8272CL CPU @ 2.60GHz", "intel-xeon-platinum-8272cl"),
        ("11th Gen Intel(R) Core(TM) i5-1145G7 @ 2.60GHz", "11th-gen-intel-core-i5-1145g7"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 80, "x" * 32),
    ],
)
def test_slugs_are_short_and_safe_in_a_path(name: str, slug: str) -> None:
    """A slug becomes part of a directory name."""
    assert board_slug(name) == slug
