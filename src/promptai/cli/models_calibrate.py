"""``promptai models calibrate``: measure this machine's engine, for forecasts of models."""

import asyncio
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from promptai.advisor.calibrate import calibrate as measure
from promptai.advisor.calibrate import save
from promptai.advisor.calibration import Calibration
from promptai.device.cpu import default_threads, read_cpu
from promptai.engine.locate import locate
from promptai.settings import cache_directory, load_settings


@click.command(
    epilog="""\b
Example:
  promptai models calibrate && promptai models list
"""
)
@click.option("--engine", "engine_path", type=click.Path(path_type=Path), help="llama-server to use.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: physical cores available to this process]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate(*, engine_path: Path | None, threads: int | None, as_json: bool) -> None:
    """
    Measure twenty small models with random weights, twice each, and store the cost per byte and per token.

    Takes about three minutes on a PC and longer on a board, and up to 0.4 GiB of disk while it runs.
    Do not use the machine for other work meanwhile.
    """
    settings, console = load_settings(), Console(stderr=as_json)
    named = engine_path or (Path(settings.engine.path) if settings.engine.path else None)
    binary, cpu = locate(named, cache=cache_directory() / "engines"), read_cpu()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("calibrating", total=None)

        def observe(done: int, total: int, name: str) -> None:
            line = f"probe {done + 1} of {total}: {name}"
            progress.update(task, completed=done, total=total, description=line)
            if not console.is_terminal:
                console.print(line, highlight=False)

        calibration = asyncio.run(
            measure(
                binary,
                cpu=cpu.model_name,
                threads=threads or settings.engine.threads or default_threads(cpu),
                cache=cache_directory(),
                observe=observe,
            )
        )
    save(cache_directory() / "calibrations", calibration)
    if as_json:
        click.echo(msgspec.json.encode(calibration))
        return
    _print(calibration, console)


def _print(calibration: Calibration, console: Console) -> None:
    table = Table("weights", "decode reads, GB/s", "prefill, billion weights/s", "copied in memory")
    for kind, price in calibration.decode_s_per_byte.items():
        prefill = calibration.prefill_s_per_weight.get(kind)
        table.add_row(
            kind,
            f"{1 / price / 1e9:.1f}" if price else "too fast to measure",
            f"{1 / prefill / 1e9:.1f}" if prefill else "-",
            "yes" if calibration.copied_share.get(kind) else "no",
        )
    console.print(table)
    console.print(
        f"{calibration.engine}, {calibration.threads} threads, {calibration.cpu}; each layer costs "
        f"{1e6 * calibration.decode_s_per_layer:.0f} µs per token\nnext:    promptai models list",
        highlight=False,
    )
