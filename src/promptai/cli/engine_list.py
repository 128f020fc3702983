"""``promptai engine list``: the llama-servers of this machine."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Column, Table

from promptai.device.cpu import read_cpu
from promptai.engine.choice import read_choice
from promptai.engine.locate import find_engines, missing_features
from promptai.settings import cache_directory, load_settings


@click.command("list", epilog="\b\nExample:\n  promptai engine list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_engines(*, as_json: bool) -> None:
    """List the llama-servers of this machine, the one in use first."""
    settings = load_settings()
    named = Path(settings.engine.path) if settings.engine.path else None
    engines = cache_directory() / "engines"
    found = find_engines(named, cache=engines)
    cpu = read_cpu()
    if as_json:
        click.echo(msgspec.json.encode([{"name": binary.name, **msgspec.to_builtins(binary)} for binary in found]))
        return
    table = Table(*(Column(name, overflow="fold") for name in ("name", "build", "reason", "unused CPU features")))
    for binary in found:
        table.add_row(
            binary.name,
            binary.build or "unknown",
            binary.reason if binary.trouble is None else f"not used: {binary.trouble}",
            " ".join(missing_features(binary, cpu.features)) or "-",
        )
    console = Console()
    console.print(table)
    for binary in found:
        features = "unknown" if binary.features is None else " ".join(binary.features)
        line = f"{binary.name}: {' '.join(binary.command)}; SIMD: {features}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    chosen = read_choice(engines)
    if chosen is not None and chosen not in {binary.name for binary in found}:
        console.print(
            f"the chosen engine {chosen} no longer exists (reset the choice: promptai engine use auto)", markup=False
        )
