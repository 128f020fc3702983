"""``promptai engine compare``: the engines of this machine, measured side by side."""

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from promptai.bench.comparison import ComparisonResult, ComparisonTask, compare, first_is_faster, ratio
from promptai.bench.statistics import MIN_FOR_INTERVAL, Metric
from promptai.bench.target_facts import check_fits
from promptai.cli.engine_progress import StepProgress
from promptai.device.cpu import default_threads, read_cpu
from promptai.device.memory import read_memory
from promptai.engine.choice import MeasuredEngine, processor_key, write_comparison
from promptai.engine.locate import EngineBinary, find_engines
from promptai.errors import EngineError
from promptai.models.gguf import read_header
from promptai.models.synth import LLAMA_1B, write_synthetic
from promptai.report import format as fmt
from promptai.settings import cache_directory, load_settings

_SYNTHETIC = "synthetic-llama-1.1b"


@click.command(
    "compare",
    epilog="""\b
Examples:
  promptai engine compare
  promptai engine compare --model yi-coder-1.5b.gguf --repeats 9
""",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A GGUF file.  [default: random weights in the shape of TinyLlama, 0.6 GiB, kept in the cache]",
)
@click.option(
    "--prompt-tokens", type=click.IntRange(16, 100_000), default=256, show_default=True, help="Length of a prompt."
)
@click.option("--tokens", type=click.IntRange(8, 100_000), default=64, show_default=True, help="Length of an answer.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Number of rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare_engines(*, model: Path | None, prompt_tokens: int, tokens: int, repeats: int, as_json: bool) -> None:
    """
    Measure the engines of this machine side by side; the fastest is used from then on.

    Engines take turns; each is reloaded and warmed up in every round. With fewer than five rounds the result
    is not kept.
    """
    console = Console(stderr=as_json)
    engines = cache_directory() / "engines"
    settings, cpu = load_settings(), read_cpu()
    named = Path(settings.engine.path) if settings.engine.path else None
    found = different([engine for engine in find_engines(named, cache=engines) if engine.trouble is None])
    if len(found) < 2:
        if as_json:
            click.echo(msgspec.json.encode({"comparison": None, "ratios": {}, "failed": {}, "kept": False}))
        for engine in found:
            _print(console, f"nothing to compare: the only engine is {engine.label} ({engine.name})")
        _print(console, "promptai engine build makes one for this processor")
        return
    with StepProgress(console) as progress:
        path = model or _synthetic(progress)
        header = read_header(path)
        check_fits(header, prompt_tokens + tokens, read_memory().available_for_new_process())
        progress.step(f"comparing {len(found)} engines, {repeats} rounds")
        contest = ComparisonTask(
            model=path,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            repeats=repeats,
            threads=settings.engine.threads or default_threads(cpu),
        )
        with tempfile.TemporaryDirectory() as logs:
            key = processor_key(cpu.model_name, cpu.features)
            outcome = asyncio.run(compare(found, contest, progress, cpu=key, log=Path(logs) / "engines.log"))
    kept = len(outcome.comparison.engines) > 1 and repeats >= MIN_FOR_INTERVAL
    if kept:
        _keep(engines, outcome)
    ratios = _ratios(outcome.comparison.engines)
    if as_json:
        failed = outcome.failed
        click.echo(
            msgspec.json.encode({"comparison": outcome.comparison, "ratios": ratios, "failed": failed, "kept": kept})
        )
        return
    _show(console, outcome, ratios, used=find_engines(named, cache=engines)[0], kept=kept)


def different(found: Sequence[EngineBinary]) -> list[EngineBinary]:
    """Return each engine file once: the engine on PATH is often a link to the named or a built one."""
    by_file = {Path(e.command[0]).resolve() if not e.embedded else Path(e.name): e for e in reversed(found)}
    return [engine for engine in found if engine in by_file.values()]


def _synthetic(progress: StepProgress) -> Path:
    path = cache_directory() / "models" / f"{_SYNTHETIC}.gguf"
    if not path.exists():
        progress.step(f"writing {path}")
        total, done = 620_000_000, 0

        def wrote(size: int) -> None:
            nonlocal done
            done += size
            progress.share(min(1.0, done / total), f"{done / 2**20:.0f} MiB")

        write_synthetic(path, LLAMA_1B, name=_SYNTHETIC, progress=wrote)
    return path


def _keep(engines: Path, outcome: ComparisonResult) -> None:
    try:
        write_comparison(engines, outcome.comparison)
    except OSError as error:
        raise EngineError(
            f"cannot store the comparison in {engines}: {error.strerror}", hint="free disk space"
        ) from None


def _base(measured: Sequence[MeasuredEngine]) -> MeasuredEngine | None:
    """Return the engine that the others are compared with: the wheel, which every installation has; else the last."""
    return next((engine for engine in measured if engine.name == "embedded"), measured[-1] if measured else None)


def _ratios(measured: Sequence[MeasuredEngine]) -> dict[str, dict[str, Metric]]:
    """Return each engine's rates divided by those of the base, by the engine's name."""
    base = _base(measured)
    if base is None:
        return {}
    return {
        engine.name: {
            "prefill_tps": ratio([r.prefill_tps for r in engine.rounds], [r.prefill_tps for r in base.rounds]),
            "decode_tps": ratio([r.decode_tps for r in engine.rounds], [r.decode_tps for r in base.rounds]),
        }
        for engine in measured
    }


def _show(
    console: Console, outcome: ComparisonResult, ratios: dict[str, dict[str, Metric]], *, used: EngineBinary, kept: bool
) -> None:
    comparison = outcome.comparison
    base = _base(comparison.engines)
    rounds, base_name = (len(base.rounds), base.name) if base is not None else (0, "")
    table = Table("", *(engine.name for engine in comparison.engines))
    for text, rate in (("prefill, tokens/s", "prefill_tps"), ("decode, tokens/s", "decode_tps")):
        table.add_row(text, *(_spread([getattr(r, rate) for r in engine.rounds]) for engine in comparison.engines))
    for text, rate in (("prefill", "prefill_tps"), ("decode", "decode_tps")):
        cells = (_times(ratios[engine.name][rate]) for engine in comparison.engines)
        table.add_row(f"{text} / {base_name}", *cells)
    console.print(table)
    _print(
        console,
        f"{comparison.model}, {comparison.prompt_tokens} prompt and {comparison.generated_tokens} generated tokens, "
        f"{comparison.threads} threads; median (minimum to maximum) of n = {rounds} rounds; ratios of the same "
        "rounds, with 95 % intervals in brackets",
    )
    for name, reason in outcome.failed.items():
        _print(console, f"{name} failed: {reason}")
    if not kept:
        _print(console, f"not kept: a comparison needs two engines and at least {MIN_FOR_INTERVAL} rounds")
    elif not first_is_faster(comparison):
        _print(
            console,
            "no clear difference between the first two; try more rounds (--repeats 15) on an otherwise idle machine",
        )
    _print(console, f"used from now on: {used.name} ({used.reason}); choose another with promptai engine use NAME")


def _times(found: Metric) -> str:
    interval = f" ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})" if found.ci95 is not None else ""
    return f"{found.value:.2f}{interval}"


def _spread(values: Sequence[float]) -> str:
    return f"{fmt.number(statistics.median(values))} ({fmt.number(min(values))} to {fmt.number(max(values))})"


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
