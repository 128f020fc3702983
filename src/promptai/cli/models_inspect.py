"""``promptai models inspect``: what a model file is."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from promptai.models.gguf import GgufHeader, read_header


@click.command(epilog="\b\nExample:\n  promptai models inspect yi-coder-1.5b.gguf")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, *, as_json: bool) -> None:
    """Say what a GGUF file is, from its header, and whether it is whole."""
    header = read_header(path)
    facts = _facts(header)
    if as_json:
        click.echo(msgspec.json.encode(facts))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, "not said" if value is None else f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def _facts(header: GgufHeader) -> dict[str, str | int | None]:
    return {
        "name": header.name,
        "architecture": header.architecture,
        "parameters": header.parameters,
        "quantization": header.quantization,
        "file_bytes": header.file_bytes,
        "context_length": header.context_length,
        "vocabulary": header.vocabulary,
        "kv_bytes_per_token_f16": header.kv_bytes_per_token(),
        "chat_template": "yes" if header.chat_template else "no (engines fall back to ChatML)",
        "synthetic": "yes: random weights" if header.synthetic else "no",
    }
