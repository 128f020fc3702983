"""``promptai models list``: local and catalogued models, whether they fit this machine, and their expected speed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click
import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from promptai.advisor.calibrate import load
from promptai.advisor.cost import ModelCost, cost_of_file, cost_of_shape
from promptai.advisor.fit import MachineCapacity, ModelFit, model_fit
from promptai.device.bandwidth import read_bandwidth_bytes_per_s
from promptai.device.cpu import default_threads, read_cpu
from promptai.device.memory import read_memory
from promptai.engine.locate import locate
from promptai.errors import EngineNotFoundError, ModelError
from promptai.models.catalog import Entry, load_catalog
from promptai.models.gguf import read_header
from promptai.models.library import Library
from promptai.models.tensors import Quant
from promptai.report import format as fmt
from promptai.settings import Settings, cache_directory, load_settings, models_directory

_GIB = 1024**3
_CONTEXT = 4096
_DEPTH = 512


class ModelRow(msgspec.Struct, frozen=True):
    """
    One model in the list.

    Attributes:
        here: Whether the file is on this machine.
        paper: The paper's model that it stands for; ``None`` for others.
        outlook: ``None`` for a file that cannot be used.
        problem: Why a local file cannot be used; ``None`` when it can.
    """

    name: str
    quantization: str
    here: bool
    paper: str | None
    outlook: ModelFit | None
    problem: str | None = None


@click.command(
    "list",
    epilog="""\b
Examples:
  promptai models list                  all models, with their expected speed here
  promptai models list --fits --json    models that fit this machine's memory
""",
)
@click.option("--fits", is_flag=True, help="Only models that fit the memory available now.")
@click.option("--here", "only_here", is_flag=True, help="Only models on this machine.")
@click.option("--context", type=click.IntRange(min=64), default=_CONTEXT, show_default=True, help="Tokens of KV cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_models(*, fits: bool, only_here: bool, context: int, as_json: bool) -> None:
    """
    List the models on this machine and in the catalogue.

    Rates are forecasts once this machine's engine is calibrated (promptai models calibrate);
    before that they are upper bounds from the memory bandwidth, measured on each call.
    """
    settings = load_settings()
    here = _here(settings)
    lines = [*_stored(settings, here, context), *(() if only_here else _catalogued(settings, here, context))]
    if fits:
        lines = [line for line in lines if line.outlook is not None and line.outlook.fits]
    if as_json:
        click.echo(msgspec.json.encode(lines))
        return
    console = Console()
    console.print(_table(lines, here))
    _explain(lines, here, context, console)


def _here(settings: Settings) -> MachineCapacity:
    cpu = read_cpu()
    threads = settings.engine.threads or default_threads(cpu)
    try:
        named = settings.engine.path
        binary = locate(Path(named) if named else None, cache=cache_directory() / "engines")
        folder = cache_directory() / "calibrations"
        calibration = load(folder, engine=binary.label, cpu=cpu.model_name, threads=threads)
    except EngineNotFoundError:
        calibration = None
    return MachineCapacity(
        available_bytes=read_memory().available_for_new_process(),
        read_bytes_per_s=read_bandwidth_bytes_per_s(threads),
        calibration=calibration,
    )


def _stored(settings: Settings, here: MachineCapacity, context: int) -> Iterator[ModelRow]:
    catalog = {entry.id: entry for entry in load_catalog().entries}
    for model in Library(models_directory(settings)).models():
        entry = catalog.get(model.sidecar.catalog or "") if model.sidecar is not None else None
        name = entry.id if entry is not None else model.name
        try:
            header = read_header(model.path)
        except ModelError as error:
            yield ModelRow(name, "", here=True, paper=None, outlook=None, problem=error.message)
            continue
        seen = model_fit(cost_of_file(header), here, context=context, depth=min(_DEPTH, context))
        yield ModelRow(name, header.quantization, here=True, paper=entry.paper if entry else None, outlook=seen)


def _catalogued(settings: Settings, here: MachineCapacity, context: int) -> Iterator[ModelRow]:
    stored = {k.sidecar.catalog for k in Library(models_directory(settings)).models() if k.sidecar is not None}
    for entry in load_catalog().entries:
        if entry.id in stored:
            continue
        quant: Literal["Q4_K_M", "Q4_0"] = "Q4_K_M" if "Q4_K_M" in entry.files else "Q4_0"
        seen = model_fit(_cost(entry, quant), here, context=context, depth=min(_DEPTH, context))
        yield ModelRow(entry.id, quant, here=False, paper=entry.paper, outlook=seen)


def _cost(entry: Entry, quant: Literal["Q4_K_M", "Q4_0"]) -> ModelCost:
    name: Quant = "q4_k_m" if quant == "Q4_K_M" else "q4_0"
    return msgspec.structs.replace(cost_of_shape(entry.shape, name), file_bytes=entry.expected_bytes(quant))


def _table(lines: list[ModelRow], here: MachineCapacity) -> Table:
    """Build a table with one line per model, within 80 columns."""
    at_least, at_most = ("", "") if here.calibration else (">", "<")
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "model", "weights", "paper", "file", "memory", "fits", "prefill", "decode"):
        right = name in ("file", "memory", "prefill", "decode")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for line in lines:
        seen, mark = line.outlook, "•" if line.here else ""
        if seen is None:
            table.add_row(mark, escape(line.name), "", "", "", "", f"[red]{escape(line.problem or '')}[/]", "", "")
            continue
        table.add_row(
            mark,
            escape(line.name),
            line.quantization,
            line.paper or "",
            f"{seen.file_bytes / _GIB:.2f}",
            "?" if seen.memory_bytes is None else f"{at_least}{seen.memory_bytes / _GIB:.2f}",
            {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}[seen.fits],
            fmt.number(seen.prefill_tps),
            "–" if seen.decode_tps is None else at_most + fmt.number(seen.decode_tps),
        )
    return table


def _explain(lines: list[ModelRow], here: MachineCapacity, context: int, console: Console) -> None:
    console.print(
        f"• on this machine; file and memory in GiB ({context} tokens of context; "
        f"{here.available_bytes / _GIB:.1f} GiB available); prefill and decode in tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    unknown = sorted({kind for line in lines if line.outlook for kind in line.outlook.unknown})
    if unknown:
        console.print(f"no rates for types missing from the calibration: {', '.join(unknown)}", highlight=False)
    if here.calibration is None:
        console.print(
            f"decode is the upper bound at a memory bandwidth of {here.read_bytes_per_s / 1e9:.1f} GB/s, measured just "
            "now; engines stay below it on an idle machine; for forecasts: promptai models calibrate",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(
            f"forecast for {here.calibration.engine}, {here.calibration.threads} threads, "
            f"{min(_DEPTH, context)} tokens into a conversation; calibrated {here.calibration.created[:10]}",
            highlight=False,
            soft_wrap=True,
        )
