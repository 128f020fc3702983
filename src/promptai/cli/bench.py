"""``promptai bench``: measure models or servers."""

import re
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape

from promptai.bench.arrivals import Arrivals
from promptai.bench.manifest import Manifest
from promptai.bench.options import BenchOptions
from promptai.bench.prepare import prepare, prepare_resume
from promptai.bench.trace import Cache
from promptai.cli.measure import OutputOptions, measure
from promptai.cli.progress import PrepareProgress
from promptai.errors import SettingsError
from promptai.settings import Settings, cache_directory, load_secrets, load_settings, models_directory

_CACHES: dict[str, tuple[Cache, ...]] = {"cold": ("cold",), "warm": ("warm",), "both": ("cold", "warm")}


def parse_duration(text: str) -> float:
    """Seconds in ``90s``, ``30m``, ``8h``, ``1d`` or a plain number; raises ``SettingsError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0.0
    if seconds <= 0:
        raise SettingsError(f"invalid --budget {text!r} (expected a duration such as 90s, 30m, 8h or 1d)")
    return seconds


def parse_arrivals(text: str) -> Arrivals:
    """``closed``, ``constant:0.2`` or ``poisson:0.2``; raises ``SettingsError``."""
    match = re.fullmatch(r"closed|(constant|poisson):(\d+(?:\.\d+)?)", text)
    if match is None or (match[2] is not None and float(match[2]) <= 0):
        raise SettingsError(f"invalid --arrivals {text!r} (expected closed, constant:RATE or poisson:RATE)")
    if match[1] == "constant":
        return Arrivals("constant", float(match[2]))
    if match[1] == "poisson":
        return Arrivals("poisson", float(match[2]))
    return Arrivals()


@click.command(
    epilog="""\b
Examples:
  promptai bench                               the bundled model, as a first try
  promptai bench yi-coder-1.5b.gguf            the paper's protocol: 50 conversations, cold and warm
  promptai bench a.gguf b.gguf --budget 2h     two models taking turns, as much as fits two hours
  promptai bench http://pi-3:8080 --cache warm a server that is already running
  promptai bench --resume runs/2026-11-20T12-00-00_yi-coder-1.5b_pi5
"""
)
@click.argument("targets", nargs=-1, metavar="[MODEL|URL]...")
@click.option("--workload", help="edge-50 (bundled), oasst1 (from the hub), oasst1:FILE, or a .jsonl file.")
@click.option("--conversations", type=int, help="Number of conversations, selected evenly by length.  [default: all]")
@click.option(
    "--budget",
    "budget_s",
    callback=lambda _context, _option, text: None if text is None else parse_duration(text),
    help="Select what fits this time, such as 30m or 8h.",
)
@click.option(
    "--cache",
    "caches",
    type=click.Choice(list(_CACHES)),
    default="both",
    show_default=True,
    callback=lambda _context, _option, name: _CACHES[name],
    help="KV cache off (cold), on (warm), or one after the other.",
)
@click.option(
    "--history",
    type=click.Choice(["data", "own"]),
    default="data",
    show_default=True,
    help="Earlier answers in the prompt: the data set's (same prompts for all models) or the model's own.",
)
@click.option("--max-tokens", type=int, help="Token limit of an answer.  [default: 500]")
@click.option("--repeats", type=int, help="Passes over the workload.  [default: 1]")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Concurrent conversations (closed loop).",
)
@click.option(
    "--arrivals",
    default="closed",
    show_default=True,
    callback=lambda _context, _option, text: parse_arrivals(text),
    help="closed, constant:RATE or poisson:RATE, in conversations per second.",
)
@click.option("--ignore-eos", is_flag=True, help="Generate --max-tokens for every answer.")
@click.option("--seed", type=int, help="Seed of sampler, arrivals and selection.  [default: 0]")
@click.option("--engine", "engine_path", type=click.Path(path_type=Path), help="Path of a llama-server.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: the physical cores available to this process]",
)
@click.option(
    "--context",
    type=click.IntRange(min=64),
    help="Tokens of context per slot.  [default: enough for the workload]",
)
@click.option("--slots", type=click.IntRange(min=1), help="Slots of the engine.  [default: --concurrency]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the engine.  [default: a free one]")
@click.option(
    "--timeout", "silence_s", type=float, help="Longest silence within an answer, in seconds.  [default: 1800]"
)
@click.option("--runs", type=click.Path(path_type=Path), help="Directory of all runs.  [default: runs]")
@click.option("--resume", type=click.Path(path_type=Path), help="Continue this run; takes no other options.")
@click.option("--config", type=click.Path(path_type=Path), help="Path of a promptai.toml.")
@click.option(
    "--report/--no-report", default=True, help="Write report.html at the end; promptai report RUN writes it later."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def bench(*, resume: Path | None, config: Path | None, report: bool, as_json: bool, **given: Any) -> None:
    """
    Measure models or servers on conversations, and write a report.

    A MODEL is a .gguf file or the name of a downloaded model (see promptai models disk).
    Without a target, the bundled model is measured. Several targets take turns.
    Results survive Ctrl-C and power cuts: continue with --resume.
    """
    settings = load_settings(config)
    output = OutputOptions(Console(stderr=as_json), as_json, report)
    if resume is None:
        start(_options(given, settings), output)
        return
    _refuse_more_than_resume()
    prepared = prepare_resume(
        resume,
        api_key=load_secrets().api_key,
        silence_s=settings.bench.timeout_s,
        observer=PrepareProgress(output.console),
    )
    measure(prepared, output)


def start(options: BenchOptions, output: OutputOptions) -> None:
    """Start a run and measure."""
    prepared = prepare(options, PrepareProgress(output.console))
    output.console.print(_headline(prepared.manifest), highlight=False)
    measure(prepared, output)


def default_options(settings: Settings) -> BenchOptions:
    """The options that settings and environment set."""
    engine, protocol = settings.engine, settings.bench
    return BenchOptions(
        library=models_directory(settings),
        engines=cache_directory() / "engines",
        workload=protocol.workload,
        max_tokens=protocol.max_tokens,
        repeats=protocol.repeats,
        seed=protocol.seed,
        engine_path=Path(engine.path) if engine.path else None,
        threads=engine.threads,
        context=engine.context,
        slots=engine.slots,
        batch=engine.batch,
        cache_type=engine.cache_type,
        cache_ram_mib=engine.cache_ram_mib,
        mmap=engine.mmap,
        silence_s=protocol.timeout_s,
        runs=Path(settings.runs),
        api_key=load_secrets().api_key,
        command=("promptai", *sys.argv[1:]),
    )


def _options(given: dict[str, Any], settings: Settings) -> BenchOptions:
    """Override the settings with the command line, where ``None`` means not given."""
    options = msgspec.structs.replace(
        default_options(settings), **{name: value for name, value in given.items() if value is not None}
    )
    if given["slots"] is None:
        options = msgspec.structs.replace(options, slots=max(options.slots, options.concurrency))
    return options


def _refuse_more_than_resume() -> None:
    """Reject options that a resumed run would ignore: it continues as it began."""
    context = click.get_current_context()
    allowed = {"resume", "config", "as_json", "report"}
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name is not None
        and option.name not in allowed
        and (option.name != "targets" or context.params["targets"])
        and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise SettingsError(f"--resume cannot be combined with {', '.join(given)}", hint="a run continues as it began")


def _headline(manifest: Manifest) -> str:
    facts, machine = manifest.workload, manifest.machine
    engines = {target.engine.build or "unknown build" for target in manifest.targets if target.engine is not None}
    threads = {str(target.engine.flags.threads) for target in manifest.targets if target.engine is not None}
    where = f", engine {', '.join(sorted(engines))}, {'/'.join(sorted(threads))} threads" if engines else ""
    return (
        f"[bold]{escape(facts.name)}[/]: {len(facts.selected)} of {facts.total} conversations, {facts.turns} turns, "
        f"{' and '.join(manifest.protocol.caches)}; "
        f"on {escape(machine.board)}, {machine.cpu.physical_cores} cores{where}"
    )
