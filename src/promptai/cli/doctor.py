"""``promptai doctor``: describe this machine, warn of bad conditions, and measure our own error."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from promptai.bench.manifest import MachineFacts, describe_machine
from promptai.bench.selftest import TOLERANCE, SelftestCheck, selftest
from promptai.device.energy import find_energy_source
from promptai.device.memory import MemoryFacts, read_memory
from promptai.engine.locate import EngineBinary, find_engines, missing_features
from promptai.report import format as fmt
from promptai.settings import cache_directory, load_settings


@click.command(
    epilog="""\b
Examples:
  promptai doctor
  promptai doctor --selftest     measures a simulated engine of known speed and prints the error
"""
)
@click.option(
    "--selftest",
    "test",
    is_flag=True,
    help="Measure a simulated engine of known speed; exit with 1 if an error exceeds 2 %.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, test: bool, as_json: bool) -> int:
    """Check this machine before you trust its measurements."""
    console = Console()
    if test:
        with console.status("measuring three prompts of known speed, about 6 s"):
            checks = asyncio.run(selftest())
        if as_json:
            click.echo(msgspec.json.encode([{"error": check.error, **msgspec.to_builtins(check)} for check in checks]))
        else:
            console.print(_selftest_table(checks))
        return int(any(abs(check.error) > TOLERANCE for check in checks))
    settings = load_settings()
    named = Path(settings.engine.path) if settings.engine.path else None
    machine, memory = describe_machine(), read_memory()
    engines = find_engines(named, cache=cache_directory() / "engines")
    energy = find_energy_source(Path("/"))
    advice = list(_advice(machine, memory, engines))
    if as_json:
        click.echo(
            msgspec.json.encode(
                {
                    "machine": machine,
                    "memory": memory,
                    "engines": engines,
                    "energy_source": energy.name if energy is not None else None,
                    "advice": advice,
                }
            )
        )
        return 0
    console.print(_machine_table(machine, memory, engines, energy.name if energy is not None else None))
    for line in advice:
        console.print(f"[yellow]advice[/]  {escape(line)}", highlight=False)
    if not advice:
        console.print("no problems found", highlight=False)
    return 0


def _advice(machine: MachineFacts, memory: MemoryFacts, engines: list[EngineBinary]) -> Iterator[str]:
    """Yield each condition that makes measurements slower or less steady here, with its remedy."""
    cpu = machine.cpu
    if cpu.governor is not None and cpu.governor != "performance":
        yield (
            f"the CPU governor is {cpu.governor}, so the clock varies; before measuring, run: "
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    missing = missing_features(engines[0], cpu.features)
    if missing:
        yield (
            f"the engine in use does not use this CPU's {', '.join(missing)}; "
            "a llama-server built on this machine is faster: promptai engine build, then promptai engine compare"
        )
    if cpu.quota_cpus is not None and cpu.quota_cpus < cpu.usable_cores:
        yield (
            f"a CPU quota of {cpu.quota_cpus:g} is set for {cpu.usable_cores} cores; the engine's threads wait for "
            "each other, so one throttled thread stalls all: assign whole cores instead of a quota"
        )
    if memory.swap_used_bytes:
        yield (
            f"{fmt.quantity(memory.swap_used_bytes, 'bytes')} of swap is in use, which distorts results; "
            "close other programs"
        )


def _machine_table(
    machine: MachineFacts, memory: MemoryFacts, engines: list[EngineBinary], energy: str | None
) -> Table:
    cpu = machine.cpu
    quota = "no quota" if cpu.quota_cpus is None else f"quota {cpu.quota_cpus:g}"
    total, free = (fmt.quantity(n, "bytes") for n in (memory.total_bytes, memory.available_for_new_process()))
    rows = [
        ("board", machine.board),
        ("processor", f"{cpu.model_name}, {cpu.architecture}"),
        ("cores", f"{cpu.physical_cores} physical, {cpu.usable_cores} usable, {quota}"),
        ("SIMD", " ".join(cpu.features) or "none used by llama.cpp"),
        ("governor", cpu.governor or "unknown (no cpufreq)"),
        ("memory", f"{total}, {free} available"),
        ("power", f"measured by {energy}" if energy else "not available on this machine"),
    ]
    for number, binary in enumerate(engines):
        features = "SIMD unknown" if binary.features is None else " ".join(binary.features)
        rows.append(("engine" if number == 0 else "also", f"{binary.label} ({binary.source}): {features}"))
    table = Table(show_header=False)
    for label, words in rows:
        table.add_row(label, escape(words))
    return table


def _selftest_table(checks: list[SelftestCheck]) -> Table:
    worst = max(abs(check.error) for check in checks)
    table = Table(
        "prompt",
        "metric",
        "expected",
        "measured",
        "error",
        caption=f"largest error {100 * worst:.2f} %, limit {100 * TOLERANCE:.0f} %; token counts are exact",
        caption_justify="left",
    )
    for check in checks:
        colour = "green" if abs(check.error) <= TOLERANCE else "red"
        table.add_row(
            f"{check.case.prompt_tokens} tokens",
            check.metric,
            fmt.quantity(check.expected, check.unit),
            fmt.quantity(check.measured, check.unit),
            f"[{colour}]{100 * check.error:+.2f} %[/]",
        )
    return table
