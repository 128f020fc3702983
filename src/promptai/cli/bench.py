"""``promptai bench``: measure models or servers."""

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape

from promptai.bench.arrivals import Arrivals
from promptai.bench.manifest import (
    Manifest,
    describe_machine,
    describe_packages,
    describe_workload,
    verify_same_machine,
)
from promptai.bench.plan import Protocol, typical_prompt
from promptai.bench.prepare import (
    EngineOptions,
    choose_conversations,
    cut_to_budget,
    describe_targets,
    load_workload,
    reload_selected,
)
from promptai.bench.recorder import create_run, read_manifest
from promptai.bench.target import is_url, verify_unchanged
from promptai.bench.trace import Cache
from promptai.cli.measure import OutputOptions, calibrate, measure
from promptai.cli.progress import HashProgress
from promptai.device.cpu import board_slug
from promptai.device.memory import read_memory
from promptai.engine.locate import locate
from promptai.errors import SettingsError
from promptai.models.bundled import bundled_model
from promptai.models.library import Library, resolve
from promptai.settings import Settings, cache_directory, load_secrets, load_settings, models_directory

#: Of the budget, for a look at what a target does before the workload is cut to it.
_LOOK_SHARE = 0.05
_CACHES: dict[str, tuple[Cache, ...]] = {"cold": ("cold",), "warm": ("warm",), "both": ("cold", "warm")}


@click.command(
    epilog="""\b
Examples:
  promptai bench                               the bundled model, to see how it goes
  promptai bench yi-coder-1.5b.gguf            the paper's protocol: 50 conversations, cold and warm
  promptai bench a.gguf b.gguf --budget 2h     two models taking turns, as much as fits two hours
  promptai bench http://pi-3:8080 --cache warm a server that is already running
  promptai bench --resume runs/2026-11-20T12-00-00_yi-coder-1.5b_pi5
"""
)
@click.argument("targets", nargs=-1, metavar="[MODEL|URL]...")
@click.option("--workload", help="edge-50 (bundled), oasst1 (from the hub), oasst1:FILE, or a .jsonl file.")
@click.option("--conversations", type=int, help="Play this many, drawn evenly from short to long.")
@click.option("--budget", help="Play as much as fits, e.g. 30m or 8h.")
@click.option(
    "--cache",
    type=click.Choice(list(_CACHES)),
    default="both",
    show_default=True,
    help="KV cache off, on, or one after the other.",
)
@click.option(
    "--history",
    type=click.Choice(["data", "own"]),
    default="data",
    show_default=True,
    help="Earlier answers in the prompt: the data's (same prompts for all) or the model's.",
)
@click.option("--max-tokens", type=int, help="Cap of tokens an answer.  [default: 500]")
@click.option("--repeats", type=int, help="Times the workload is played.  [default: 1]")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Conversations at once (closed loop).",
)
@click.option(
    "--arrivals",
    default="closed",
    show_default=True,
    help="closed, constant:RATE or poisson:RATE, in conversations a second.",
)
@click.option("--ignore-eos", is_flag=True, help="Let every answer run to --max-tokens.")
@click.option("--seed", type=int, help="For sampler, arrivals and choice of conversations.  [default: 0]")
@click.option("--engine", "engine_path", type=click.Path(path_type=Path), help="A llama-server to use.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the physical cores that are ours]")
@click.option(
    "--context",
    type=click.IntRange(min=64),
    help="Tokens of context of a slot.  [default: what the workload needs]",
)
@click.option("--slots", type=click.IntRange(min=1), help="Slots of the engine.  [default: as many as --concurrency]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the engine.  [default: a free one]")
@click.option("--timeout", type=float, help="Longest silence in an answer, in seconds.  [default: 1800]")
@click.option("--runs", type=click.Path(path_type=Path), help="Where runs are collected.  [default: runs]")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this run; takes no other options.")
@click.option("--config", type=click.Path(path_type=Path), help="A promptai.toml.")
@click.option("--report/--no-report", default=True, help="Write report.html at the end, or later: promptai report RUN.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def bench(**options: Any) -> None:
    """
    Measure models or servers on conversations, and write a report.

    A MODEL is a .gguf file or the name of one that is kept (promptai models disk).
    Without a target the bundled model is measured. Several targets take turns.
    What was measured survives Ctrl-C and power cuts: go on with --resume.
    """
    settings = load_settings(options["config"])
    console = Console(stderr=options["as_json"])
    if options["resume"] is not None:
        _refuse_more_than_resume()
        resume(options["resume"], settings, OutputOptions(console, options["as_json"], options["report"]))
        return
    start(options, settings, OutputOptions(console, options["as_json"], options["report"]))


def start(options: dict[str, Any], settings: Settings, output: OutputOptions) -> None:
    """Check everything, make the run's directory, and measure."""
    console = output.console
    protocol = _protocol(options, settings)
    silence_s = _chosen(options["timeout"], settings.bench.timeout_s)
    if not silence_s > 0:  # NaN is not above 0 either
        raise SettingsError(f"--timeout must be above 0 seconds, not {silence_s:g}")
    budget_s = parse_duration(options["budget"]) if options["budget"] is not None else None
    with console.status("reading the workload"):  # from the hub that takes a while
        workload = load_workload(options["workload"] or settings.bench.workload)
    conversations, selection = choose_conversations(workload, count=options["conversations"], seed=protocol.seed)
    sources = _sources(options["targets"], settings) or [str(bundled_model())]
    machine = describe_machine()
    named = options["engine_path"] or (Path(settings.engine.path) if settings.engine.path else None)
    with HashProgress(console) as hashing:
        targets = describe_targets(
            sources,
            conversations,
            protocol,
            _wishes(options, settings),
            engine=lambda: locate(named, cache=cache_directory() / "engines"),
            cpu=machine.cpu,
            available_bytes=read_memory().available_for_new_process(),
            hashing=hashing.count,
        )
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        command=("promptai", *sys.argv[1:]),
        machine=machine,
        workload=describe_workload(workload, conversations, selection),
        protocol=protocol,
        targets=tuple(targets),
        packages=describe_packages(),
    )
    secrets = load_secrets()
    runs = options["runs"] or Path(settings.runs)
    label = f"{targets[0].name}{f'+{len(targets) - 1}' if len(targets) > 1 else ''}_{board_slug(machine.board)}"
    if budget_s is not None:
        rates = calibrate(
            manifest,
            typical_prompt(conversations, protocol.history),
            at_most_s=_LOOK_SHARE * budget_s,
            api_key=secrets.api_key,
            silence_s=silence_s,
            console=console,
        )
        conversations, selection = cut_to_budget(conversations, selection, protocol, rates, budget_s)
        manifest = msgspec.structs.replace(
            manifest, workload=describe_workload(workload, conversations, selection), budget_s=budget_s
        )
    directory = create_run(runs, manifest, label=label, now=datetime.now(UTC))
    console.print(_headline(manifest), highlight=False)
    measure(
        directory,
        manifest,
        conversations,
        api_key=secrets.api_key,
        silence_s=silence_s,
        output=output,
    )


def resume(directory: Path, settings: Settings, output: OutputOptions) -> None:
    """Go on with a run where its traces end."""
    manifest = read_manifest(directory)
    verify_same_machine(manifest.machine, describe_machine())
    workload = load_workload(manifest.workload.source)
    conversations = reload_selected(workload, manifest.workload.sha256, manifest.workload.selected)
    with HashProgress(output.console) as hashing:
        for target in manifest.targets:
            verify_unchanged(target, hashing.count)
    measure(
        directory,
        manifest,
        conversations,
        api_key=load_secrets().api_key,
        silence_s=settings.bench.timeout_s,
        output=output,
    )


def parse_duration(text: str) -> float:
    """Seconds in ``90s``, ``30m``, ``8h``, ``1d`` or a plain number; raises ``SettingsError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0.0
    if seconds <= 0:
        raise SettingsError(f"{text!r} is not a duration", hint="for example 90s, 30m, 8h or 1d")
    return seconds


def parse_arrivals(text: str) -> Arrivals:
    """``closed``, ``constant:0.2`` or ``poisson:0.2``; raises ``SettingsError``."""
    match = re.fullmatch(r"closed|(constant|poisson):(\d+(?:\.\d+)?)", text)
    if match is None or (match[2] is not None and float(match[2]) <= 0):
        raise SettingsError(f"{text!r} is no way to arrive", hint="closed, constant:0.2 or poisson:0.2")
    if match[1] == "constant":
        return Arrivals("constant", float(match[2]))
    if match[1] == "poisson":
        return Arrivals("poisson", float(match[2]))
    return Arrivals()


def _refuse_more_than_resume() -> None:
    """A run goes on as it began: an option that would be ignored is an error."""
    context = click.get_current_context()
    allowed = {"resume", "config", "as_json", "report"}
    given = [
        name
        for name in context.params
        if name not in allowed and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given and (given != ["targets"] or context.params["targets"]):
        names = ", ".join(name.replace("_", "-") for name in given)
        raise SettingsError(f"--resume goes on as the run began and takes no {names}", hint="leave it out")


def _sources(targets: Sequence[str], settings: Settings) -> list[str]:
    """URLs and paths as they were given, and the files of models that are kept."""
    library = Library(models_directory(settings))
    found = [Path(target) if is_url(target) else resolve(target, library) for target in targets]
    return [target if path == Path(target) else str(path) for target, path in zip(targets, found, strict=True)]


def _protocol(options: dict[str, Any], settings: Settings) -> Protocol:
    defaults = settings.bench
    protocol = Protocol(
        max_tokens=_chosen(options["max_tokens"], defaults.max_tokens),
        seed=_chosen(options["seed"], defaults.seed),
        caches=_CACHES[options["cache"]],
        history=options["history"],
        repeats=_chosen(options["repeats"], defaults.repeats),
        concurrency=options["concurrency"],
        arrivals=parse_arrivals(options["arrivals"]),
        ignore_eos=options["ignore_eos"],
    )
    if protocol.max_tokens < 1 or protocol.repeats < 1:
        raise SettingsError("--max-tokens and --repeats must be at least 1")
    if protocol.concurrency > 1 and protocol.arrivals.kind != "closed":
        raise SettingsError(
            f"--concurrency {protocol.concurrency} and --arrivals {options['arrivals']} exclude each other",
            hint="open arrivals begin whether or not others have ended; leave one of the two out",
        )
    return protocol


def _wishes(options: dict[str, Any], settings: Settings) -> EngineOptions:
    engine = settings.engine
    return EngineOptions(
        threads=_chosen(options["threads"], engine.threads),
        context=_chosen(options["context"], engine.context),
        slots=_chosen(options["slots"], max(engine.slots, options["concurrency"])),
        batch=engine.batch,
        cache_type=engine.cache_type,
        cache_ram_mib=engine.cache_ram_mib,
        mmap=engine.mmap,
        port=options["port"] or 0,
    )


def _chosen(option: Any, setting: Any) -> Any:
    """The command line beats the file; ``None`` means that it says nothing."""
    return setting if option is None else option


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
