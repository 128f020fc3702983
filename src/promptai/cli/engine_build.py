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
@click.option("--release", default=PINNED, show_default=True, help="Of the source package llama-cpp-python.")
@click.option(
    "--from",
    "archive",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Build from this archive: of llama-cpp-python, or of llama.cpp itself.",
)
@click.option("--sha256", help="What the archive must be.  [default: as pinned, for the pinned release]")
@click.option("--portable", is_flag=True, help="For any processor of this kind, not for this one alone.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at once.  [default: as CPUs and memory allow]")
@click.option("--again", is_flag=True, help="Also when it is there already.")
@click.option("--keep-build", is_flag=True, help="Leave source and objects (about 0.2 GB).")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
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

    Takes minutes on a PC and up to half an hour on a board, and needs cmake and a C++ compiler. Whatever
    ends it, the same command goes on where it stopped.
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
    there = read_built(engines / recipe.name) is not None and not again
    with StepProgress(console) as progress:
        built = build(recipe, engines, progress)
    if as_json:
        click.echo(msgspec.json.encode(built))
        return
    _tell(console, built, engines / recipe.name, there=there)


def _tell(console: Console, built: BuiltEngine, folder: Path, *, there: bool) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"{built.name} {'is there already (--again builds it anew)' if there else 'is built'}: {folder / 'bin'}")
    say(f"llama.cpp {built.version or 'of unknown version'}, compiler {built.compiler or 'unknown'}")
    say(f"it uses {' '.join(built.features) if built.features else 'no SIMD feature that it names'}")
    say("next: promptai engine compare  measures it against the others; promptai engine list  says which is used")
