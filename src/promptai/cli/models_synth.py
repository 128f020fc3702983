"""``promptai models synth``: a model of true shape and random weights."""

from pathlib import Path

import click

from promptai.models.synth import LLAMA_1B, write_synthetic


@click.command(
    epilog="\b\nExample:\n  promptai models synth synthetic-1b.gguf && promptai bench synthetic-1b.gguf --budget 5m"
)
@click.argument("path", type=click.Path(path_type=Path))
def synth(path: Path) -> None:
    """Write a model of TinyLlama's shape (1.1 B, Q4_0, 0.6 GB) with random weights, to measure speed and memory."""
    write_synthetic(path, LLAMA_1B, name="synthetic-llama-1.1b")
    click.echo(f"{path}: {path.stat().st_size:,} bytes, random weights: for speed and memory, never for accuracy")
