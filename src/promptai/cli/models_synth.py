"""``promptai models synth``: write a model with a real shape and random weights."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from promptai.cli.transfer import RateColumn
from promptai.models.catalog import load_catalog
from promptai.models.synth import write_synthetic
from promptai.models.tensors import QUANTS, Quant, tensor_bytes


@click.command(
    epilog="""\b
Examples:
  promptai models synth llama-3.2-3b && promptai bench synthetic-llama-3.2-3b-q4_k_m.gguf --budget 5m
  promptai models synth mistral-7b --quant q4_0 --layers 4 -o slice.gguf
"""
)
@click.argument("name")
@click.option("--quant", type=click.Choice(QUANTS), default="q4_k_m", show_default=True, help="Quantisation.")
@click.option(
    "--layers", type=click.IntRange(min=1), help="Number of layers, for a quick test with a slice of the model."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: synthetic-NAME-QUANT.gguf]",
)
def synth(*, name: str, quant: Quant, layers: int | None, output: Path | None) -> None:
    """
    Write the catalogue's model NAME with random weights, to measure speed and memory before any download.

    Shape, vocabulary size and quantisation mix are the real model's. The file, runs and reports are marked as
    synthetic, and accuracy is not measured.
    """
    entry = load_catalog().find(name)
    shape = entry.shape if layers is None else msgspec.structs.replace(entry.shape, layers=layers)
    slice_of = "" if layers is None else f"-{layers}-layers"
    path = output or Path(f"synthetic-{entry.id}{slice_of}-{quant}.gguf")
    console = Console(stderr=True)
    columns = (TextColumn("writing"), BarColumn(bar_width=24), DownloadColumn(binary_units=True), RateColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("writing", total=tensor_bytes(shape, quant))
        write_synthetic(
            path,
            shape,
            name=f"synthetic-{entry.id}{slice_of}",
            quant=quant,
            progress=lambda size: progress.advance(task, size),
        )
    click.echo(f"{path}: {path.stat().st_size:,} bytes of random weights, for speed and memory, never for accuracy")
