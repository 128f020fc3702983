"""``promptai models quantize``: quantise a model, and compare the result with its source."""

import asyncio
import contextlib
import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from promptai.bench.agreement import POSITIONS_PER_TEXT, Agreement, Position, compare, run_perplexity, score, texts
from promptai.bench.target_facts import check_fits
from promptai.cli.models_inspect import harmless, mix
from promptai.cli.progress import duration
from promptai.cli.transfer import Transfer
from promptai.device.cpu import default_threads, read_cpu
from promptai.device.memory import read_memory
from promptai.engine.command_log import run_logged
from promptai.engine.locate import locate
from promptai.errors import PromptAIError, SettingsError
from promptai.models.bundled import NAME, bundled_model
from promptai.models.convert import converted_checkpoint, find_converter, origin_of, read_checkpoint
from promptai.models.gguf import GgufHeader
from promptai.models.library import Library, disk_errors, resolve
from promptai.models.quantize import TYPES, Origin, QuantizeResult, QuantizeTool, ToolRunner, find_program, quantize
from promptai.report import format as fmt
from promptai.settings import cache_directory, load_settings, models_directory

#: Common suffixes for the type in a source's name.
_TYPE_IN_NAME = re.compile(r"[-._](f16|fp16|bf16|f32|fp32|q8_0)$", re.IGNORECASE)
_CHECK_CONTEXT = 2048


class QuantizeJob(msgspec.Struct, frozen=True):
    """
    The user's options, and the tools and directories for the job.

    Attributes:
        engine: The llama-server configured in the settings; ``None`` when not set.
        engines: Directory of the engines built by ``promptai engine build``.
        scratch: Temporary folder for logs.
    """

    source: Path
    target: Path
    kind: str
    threads: int
    trust_code: bool
    engine: Path | None
    engines: Path
    scratch: Path

    @property
    def run(self) -> ToolRunner:
        """Run programs with their output in a log."""
        return functools.partial(run_logged, log=self.scratch / "tool.log")


@click.command(
    "quantize",
    epilog="""\b
Examples:
  promptai models quantize yi-coder-1.5b-f16.gguf --type q4_k_m
  promptai models quantize yi-coder-1.5b/ --type q4_0 -o edge.gguf    a directory of safetensors files
""",
)
@click.argument("source", metavar="FILE|NAME|DIRECTORY")
@click.option(
    "--type",
    "kind",
    type=click.Choice(list(TYPES), case_sensitive=False),
    default="q4_0",
    show_default=True,
    help="q4_0, q8_0 and f16 work without llama-quantize; the others need it (promptai engine build).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: NAME-TYPE.gguf in the current directory]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: physical cores available to this process]",
)
@click.option("--check/--no-check", default=True, help="Compare the predictions of source and result.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--trust-code", is_flag=True, help="Allow a checkpoint's own Python code to run during the conversion.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def quantize_model(
    *,
    source: str,
    kind: str,
    output: Path | None,
    threads: int | None,
    check: bool,
    force: bool,
    trust_code: bool,
    as_json: bool,
) -> None:
    """
    Quantise a 16- or 8-bit model, and measure the loss.

    The result records its source's name, type and SHA-256, and appears only once it is complete. Then both models
    read the same text, and the command counts how often they predict the same next token.
    """
    console = Console(stderr=True, highlight=False)
    settings = load_settings()
    path = bundled_model() if source == NAME else resolve(source, Library(models_directory(settings)))
    target = output or Path(f"{_TYPE_IN_NAME.sub('', path.absolute().name.removesuffix('.gguf'))}-{kind}.gguf")
    if target.exists() and not force:
        raise SettingsError(f"{target} already exists", hint="choose another name with -o, or use --force")
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    with disk_errors(target):
        made = tempfile.TemporaryDirectory(prefix=".promptai-", dir=folder)
    with made as scratch:
        job = QuantizeJob(
            source=path,
            target=target,
            kind=kind,
            threads=threads or default_threads(read_cpu()),
            trust_code=trust_code,
            engine=Path(settings.engine.path) if settings.engine.path else None,
            engines=cache_directory() / "engines",
            scratch=Path(scratch),
        )
        with contextlib.ExitStack() as stack:
            with Transfer(console) as progress:
                opened, origin = stack.enter_context(_opened(job, progress))
                program = find_program("llama-quantize", job.engines, beside=job.engine)
                tool = QuantizeTool(program, job.run) if program is not None else None
                done = quantize(opened, target, kind, tool=tool, progress=progress, threads=job.threads, origin=origin)
            if not as_json:
                _print_sizes(done, Console(highlight=False))
            found = _check(done, job, console) if check else "--no-check"
    if as_json:
        click.echo(msgspec.json.encode(_facts(done, found)))
    else:
        _print_agreement(found, Console(highlight=False))


@contextlib.contextmanager
def _opened(job: QuantizeJob, progress: Transfer) -> Iterator[tuple[Path, Origin | None]]:
    """Yield the GGUF to quantise; converts a checkpoint to a temporary GGUF first."""
    if not job.source.is_dir():
        yield job.source, None
        return
    checkpoint = read_checkpoint(job.source, trust_code=job.trust_code)
    converter = find_converter(job.engines, cache_directory(), job.run)
    origin = origin_of(checkpoint, progress)
    with converted_checkpoint(
        checkpoint, job.target, converter=converter, progress=progress, cache=cache_directory()
    ) as middle:
        yield middle, origin


def _check(done: QuantizeResult, job: QuantizeJob, console: Console) -> Agreement | str:
    """Measure the loss, or return why that failed: the result is valid without it, so no failure is an error."""
    if done.source.synthetic:
        return "the weights are random, so agreement would mean nothing"
    try:
        check_fits(done.source, _CHECK_CONTEXT, read_memory().available_for_new_process())
        program = find_program("llama-perplexity", job.engines, beside=job.engine)
        if program is not None:
            with console.status("llama-perplexity is loading the source") as status:
                return run_perplexity(
                    program,
                    Path(done.source.path),
                    job.target,
                    threads=job.threads,
                    folder=job.scratch,
                    progress=lambda what, left_s: status.update(
                        f"llama-perplexity is reading the {what}, about {duration(left_s)} in total"
                    ),
                )
        return _check_with_engine(done, job, console)
    except (PromptAIError, OSError) as error:
        return str(error)


def _check_with_engine(done: QuantizeResult, job: QuantizeJob, console: Console) -> Agreement:
    engine = locate(job.engine, cache=job.engines)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    passages = texts()

    def positions(header: GgufHeader, what: str) -> list[Position | None]:
        task = progress.add_task(f"comparing: {what}", total=len(passages) * POSITIONS_PER_TEXT)
        return asyncio.run(
            score(
                Path(header.path),
                passages,
                engine=engine,
                threads=job.threads,
                log=job.scratch / f"{what}.log",
                most_context=header.context_length,
                progress=functools.partial(progress.advance, task),
            )
        )

    with progress:
        return compare(positions(done.source, "source"), positions(done.result, "result"))


def _facts(done: QuantizeResult, found: Agreement | str) -> dict[str, object]:
    return {
        "path": done.result.path,
        "file_bytes": done.result.file_bytes,
        "quantization": done.result.quantization,
        "mix": mix(done.result),
        "quantized_by": done.by,
        "source": {
            "name": done.result.metadata.get("promptai.source.name"),
            "file_bytes": done.source.file_bytes,
            "quantization": done.source.quantization,
            "sha256": done.source_sha256,
        },
        "synthetic": done.result.synthetic,
        "agreement": found if isinstance(found, Agreement) else None,
        "not_checked": found if isinstance(found, str) else None,
    }


def _print_sizes(done: QuantizeResult, console: Console) -> None:
    old, new = done.source.file_bytes, done.result.file_bytes
    shares = ", ".join(f"{share.type} {100 * share.share:.1f} %" for share in mix(done.result))
    console.print(
        f"[bold]{escape(harmless(done.result.path))}[/]: {fmt.quantity(new, 'bytes')}, {100 * new / old:.1f} % of "
        f"{fmt.quantity(old, 'bytes')} ({done.source.quantization})\n"
        f"  types by bytes: {shares}\n"
        f"  made by {escape(harmless(done.by))} from SHA-256 {done.source_sha256}",
        soft_wrap=True,
    )


def _print_agreement(found: Agreement | str, console: Console) -> None:
    if isinstance(found, str):
        console.print(f"  not checked: {escape(harmless(found))}", soft_wrap=True)
        return
    low, high = found.share_ci95
    console.print(
        f"  same next token as its source: {found.agreed} of {found.positions}, {100 * found.share:.1f} % "
        f"(95 %: {100 * low:.1f}–{100 * high:.1f}), by {found.by}",
        soft_wrap=True,
    )
    reach = found.difference_ci95
    interval = f" (95 %: {reach[0]:+.3f} to {reach[1]:+.3f})" if reach is not None else ""
    change = f"{found.difference:+.3f} nats per token{interval}" if found.difference is not None else "not finite"
    console.print(
        f"  perplexity there: {fmt.number(found.source_perplexity)} → {fmt.number(found.result_perplexity)}; "
        f"log-likelihood {change}",
        soft_wrap=True,
    )
    if found.doubtful:
        console.print(
            "[yellow]warning[/]  a good 2-bit model agrees more often: use a larger --type, or check the source for "
            "damage",
            soft_wrap=True,
        )
