"""``promptai engine build``: a llama-server for exactly this processor."""

from pathlib import Path

import click
import msgspec
from rich.console import Console

from promptai.cli.engine_progress import StepProgress
from promptai.device.cpu import read_cpu
from promptai.device.memory import read_memory
from promptai.engine.build import build
from promptai.engine.build_recipe import BuildRecipe, BuiltEngine, read_built
from promptai.engine.source import PINNED
from promptai.engine.toolchain import choose_jobs
from promptai.settings import cache_directory


@click.command(
    "build",
    epilog="""\b
Examples:
  promptai engine build
  promptai engine build --from llama_cpp_python-0.3.36.tar.gz    without a network
  promptai engine build --jobs 1                                 where memory is short
""",
)
@click.option("--release", default=PINNED, show_default=True, help="Version of the source package llama-cpp-python.")
@click.option(
    "--from",
    "archive",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Build from a local archive of llama-cpp-python or of llama.cpp itself.",
)
@click.option("--sha256", help="Expected SHA-256 of the archive.  [default: the pinned one]")
@click.option("--portable", is_flag=True, help="Build for every processor of this architecture, not only for this one.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Number of parallel compilers.  [default: as CPUs and memory allow]"
)
@click.option("--again", is_flag=True, help="Build even if the engine exists already.")
@click.option("--keep-build", is_flag=True, help="Keep source and object files (about 0.2 GiB).")
@click.option("--json", "as_json", is_flag=True, help="Print the built engine as JSON.")
def build_engine(
    *,
    release: str,
    archive: Path | None,
    sha256: str | None,
    portable: bool,
    jobs: int | None,
    again: bool,
    keep_build: bool,
    as_json: bool,
) -> None:
    """
    Build llama-server and its companions for this processor.

    Takes minutes on a PC and up to half an hour on a board, and needs cmake and a C++ compiler. After an
    interruption, the same command resumes where it stopped.
    """
    console = Console(stderr=as_json)
    cpu = read_cpu()
    recipe = BuildRecipe(
        version=release,
        archive=archive,
        sha256=sha256.lower() if sha256 else None,
        portable=portable,
        jobs=jobs or choose_jobs(cpu.usable_cpus, cpu.quota_cpus, read_memory().available_for_new_process()),
        again=again,
        keep=keep_build,
    )
    engines = cache_directory() / "engines"
    existed = read_built(engines / recipe.name) is not None and not again
    with StepProgress(console) as progress:
        built = build(recipe, engines, progress)
    if as_json:
        click.echo(msgspec.json.encode(built))
        return
    _show(console, built, engines / recipe.name, existed=existed)


def _show(console: Console, built: BuiltEngine, folder: Path, *, existed: bool) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(f"{built.name} {'exists already (rebuild it with --again)' if existed else 'is built'}: {folder / 'bin'}")
    line(f"llama.cpp {built.version or 'of unknown version'}, compiler {built.compiler or 'unknown'}")
    line(f"SIMD features: {' '.join(built.features) if built.features else 'not reported'}")
    line("next: promptai engine compare measures it against the others; promptai engine list shows which is used")
