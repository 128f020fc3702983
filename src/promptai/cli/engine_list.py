"""``promptai engine list``: the llama-servers of this machine."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from promptai.device.cpu import read_cpu
from promptai.engine.locate import find_engines, missing_features
from promptai.settings import cache_directory, load_settings


@click.command("list", epilog="\b\nExample:\n  promptai engine list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_engines(*, as_json: bool) -> None:
    """List the llama-servers of this machine, the one that is used first."""
    settings = load_settings()
    named = Path(settings.engine.path) if settings.engine.path else None
    found = find_engines(named, cache=cache_directory() / "engines")
    cpu = read_cpu()
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    table = Table("from", "build", "command", "SIMD it uses", "CPU has more")
    for binary in found:
        features = "unknown" if binary.features is None else " ".join(binary.features)
        table.add_row(
            binary.source,
            binary.build or "unknown",
            binary.command[0],
            features,
            " ".join(missing_features(binary, cpu.features)) or "-",
        )
    Console().print(table)
