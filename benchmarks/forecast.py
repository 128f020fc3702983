"""Compare forecasts with measurements: does calibrating small models predict large ones?

Run with ``make bench-models``; it takes about nine minutes on two cores, 5.6 GiB of disk and 6.5 GiB of free memory.
Leave the machine alone meanwhile. The benchmark calibrates this machine's engine, writes catalogue shapes of 0.6 to
3.8 GiB with random weights, forecasts and runs each, and prints both. Before that, it checks the sizes of the
paper's eight shapes against independent arithmetic.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from promptai.advisor.calibrate import calibrate
from promptai.advisor.calibration import Calibration
from promptai.advisor.cost import cost_of_shape
from promptai.advisor.forecast import forecast
from promptai.device.cpu import default_threads, read_cpu
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import free_port
from promptai.engine.locate import EngineBinary, locate
from promptai.engine.probe import Probed, probe
from promptai.errors import EngineError
from promptai.models.catalog import Entry, load_catalog
from promptai.models.synth import write_synthetic
from promptai.models.tensors import Quant, plan_tensors, tensor_bytes
from promptai.settings import cache_directory

#: Small to large, five architectures, three quantisations, tied and untied, few and many KV heads.
CASES: tuple[tuple[str, Quant], ...] = (
    ("qwen3-0.6b", "q8_0"),
    ("llama-3.2-1b", "q4_k_m"),
    ("yi-coder-1.5b", "q4_0"),
    ("gemma-2-2b", "q4_k_m"),
    ("phi-3.5-mini", "q4_0"),
    ("mistral-7b", "q4_0"),
)
CONTEXT, PROMPT_TOKENS, ANSWER_TOKENS, TRIES = 2048, 256, 24, 3
AIM = 0.15


class Row(NamedTuple):
    """One figure of one model: forecast and measured."""

    model: str
    what: str
    expected: float
    seen: float

    @property
    def error(self) -> float:
        """(expected - seen) / seen."""
        return self.expected / self.seen - 1


def sizes() -> Iterator[tuple[str, float, float]]:
    """The paper's shapes in Q4_0: planned bytes, and bytes at 4.5 bits per weight, 6.5625 for the output matrix."""
    for entry in load_catalog().entries:
        if entry.paper is not None:
            shape = entry.shape
            output = shape.width * shape.vocabulary
            other = sum(tensor.weights for tensor in plan_tensors(shape, "q4_0")) - output
            yield entry.id, float(tensor_bytes(shape, "q4_0")), (other * 4.5 + output * 6.5625) / 8


def compare(entry: Entry, quant: Quant, calibration: Calibration, seen: Probed) -> Iterator[Row]:
    """Pair each forecast of a model with its measurement."""
    expected = forecast(cost_of_shape(entry.shape, quant), calibration, context=CONTEXT, depth=PROMPT_TOKENS)
    name = f"{entry.id} {quant}"
    yield Row(name, "decode, tokens/s", expected.decode_tps or float("nan"), 1 / seen.decode_s)
    anonymous, mapped = seen.peak.anon_bytes, seen.peak.file_bytes
    if anonymous is None or mapped is None:
        raise EngineError("the kernel does not report the engine's memory", hint="is /proc restricted here?")
    yield Row(name, "memory, GiB", (expected.resident_bytes or float("nan")) / 2**30, (anonymous + mapped) / 2**30)
    yield Row(name, "prefill, tokens/s", expected.prefill_tps or float("nan"), 1 / seen.prefill_s)


async def run(binary: EngineBinary, path: Path, threads: int) -> Probed:
    """Measure one file."""
    flags = EngineFlags(model=str(path), port=free_port(), threads=threads, context=CONTEXT)
    log = path.with_suffix(".log")
    return await probe(binary, flags, log=log, prompt_tokens=PROMPT_TOKENS, answer_tokens=ANSWER_TOKENS, tries=TRIES)


def main() -> int:
    """Print sizes, then each figure once known; return 1 when decode or memory misses the target."""
    console = Console()
    wrong = 0
    for name, planned, arithmetic in sizes():
        error = planned / arithmetic - 1
        wrong += abs(error) > 0.01
        console.print(f"size of {name} in q4_0: {planned / 2**30:.3f} GiB, arithmetic {error:+.2%} [dim]\\[1 %][/]")
    binary, cpu = locate(cache=cache_directory() / "engines"), read_cpu()
    threads = default_threads(cpu)
    table = Table(
        "model", "what", "forecast", "measured", "error", title=f"{binary.label}, {threads} threads, {cpu.model_name}"
    )
    with tempfile.TemporaryDirectory() as folder, console.status("calibrating") as status:
        calibration = asyncio.run(
            calibrate(binary, cpu=cpu.model_name, threads=threads, cache=Path(folder), observe=lambda *_: None)
        )
        for name, quant in CASES:
            status.update(f"{name} {quant}")
            entry, path = load_catalog().find(name), Path(folder) / f"{name}-{quant}.gguf"
            write_synthetic(path, entry.shape, name=name, quant=quant)
            seen = asyncio.run(run(binary, path, threads))
            with contextlib.suppress(OSError):
                path.unlink()
            for row in compare(entry, quant, calibration, seen):
                off = not abs(row.error) <= AIM  # NaN (no forecast) is off, too
                wrong += off and not row.what.startswith("prefill")
                colour = "red" if off else "green"
                table.add_row(
                    row.model, row.what, f"{row.expected:.2f}", f"{row.seen:.2f}", f"[{colour}]{row.error:+.1%}[/]"
                )
                console.print(f"{row.model}: {row.what} {row.expected:.2f}, measured {row.seen:.2f}, {row.error:+.1%}")
    console.print(table)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
