"""``promptai models``: look into model files, and write synthetic ones."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from promptai.models.gguf import GgufHeader, read_header
from promptai.models.synth import LLAMA_1B, write_synthetic


@click.group()
def models() -> None:
    """Model files: inspect one, or write a synthetic one."""


@models.command(epilog="\b\nExample:\n  promptai models inspect yi-coder-1.5b.gguf")
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


@models.command(
    epilog="\b\nExample:\n  promptai models synth synthetic-1b.gguf && promptai bench synthetic-1b.gguf --budget 5m"
)
@click.argument("path", type=click.Path(path_type=Path))
def synth(path: Path) -> None:
    """Write a model of TinyLlama's shape (1.1 B, Q4_0, 0.6 GB) with random weights, to measure speed and memory."""
    write_synthetic(path, LLAMA_1B, name="synthetic-llama-1.1b")
    click.echo(f"{path}: {path.stat().st_size:,} bytes, random weights: for speed and memory, never for accuracy")


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
