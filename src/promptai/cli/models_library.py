"""``promptai models import | export | remove | verify | disk``: what is kept on this machine."""

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from promptai.cli.transfer import Transfer
from promptai.errors import (
    ModelChecksumError,
    ModelNotFoundError,
    PromptAIError,
    SettingsError,
)
from promptai.models import bundle
from promptai.models.library import Library, StoredModel, readable_size
from promptai.settings import load_settings, models_directory


@click.command(
    name="import",
    epilog="\b\nExamples:\n  promptai models import /media/usb\n  promptai models import ~/Downloads/model.gguf",
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def import_(path: Path) -> None:
    """
    Keep a model file, every .gguf in a directory, or a bundle.

    A bundle (promptai models export) is compared with its manifest file by file.
    """
    library = _library()
    with Transfer() as progress:
        for kept in bundle.import_path(path, library, progress):
            click.echo(f"{kept.path}: {readable_size(kept.bytes)}")


@click.command(epilog="\b\nExample:\n  promptai models export tinyllama-1.1b yi-coder-1.5b /media/usb")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def export(names: tuple[str, ...], directory: Path) -> None:
    """Copy models and a manifest with their checksums into DIRECTORY, for boards without a link."""
    library = _library()
    models = [_find(library, name) for name in names]
    with Transfer() as progress:
        bundle.export(models, directory, progress)
    click.echo(f"{directory}: {len(models)} models; there: promptai models import {directory}")


@click.command(epilog="\b\nExample:\n  promptai models remove tinyllama-1.1b")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(names: tuple[str, ...], *, yes: bool) -> None:
    """Delete models that are kept."""
    library = _library()
    models = {kept.path: kept for kept in (_find(library, name) for name in names)}
    freed = sum(kept.bytes for kept in models.values())
    if not yes:
        if not _somebody_is_there():
            raise SettingsError("there is nobody to ask whether to delete that", hint="give --yes")
        listed = ", ".join(kept.name for kept in models.values())
        click.confirm(f"Delete {listed} ({readable_size(freed)})?", abort=True, err=True)
    for kept in models.values():
        library.remove(kept)
    click.echo(f"{readable_size(freed)} freed, {readable_size(library.free_bytes())} are free now")


@click.command(epilog="\b\nExamples:\n  promptai models verify\n  promptai models verify tinyllama-1.1b")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Compare the bytes of models with the checksums they came with; all of them without NAME."""
    library = _library()
    models = [_find(library, name) for name in names] or library.models()
    damaged = 0
    with Transfer() as progress:
        for kept in models:
            if kept.sidecar is None:
                click.echo(f"{kept.name}: no checksum is known (promptai models import {kept.path} notes one)")
                continue
            try:
                library.verify(kept, progress)
                click.echo(f"{kept.name}: as it came" + ("" if kept.sidecar.promised else ", promised by nobody"))
            except ModelChecksumError as error:
                damaged += 1
                click.echo(str(error))
    if damaged:
        raise PromptAIError(f"{damaged} of {len(models)} models are damaged", hint="remove them and pull them again")


@click.command(epilog="\b\nExamples:\n  promptai models disk\n  promptai models disk --clean-partial")
@click.option("--clean-partial", is_flag=True, help="Delete partial downloads and files that were refused.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def disk(*, clean_partial: bool, as_json: bool) -> None:
    """Show what is kept, what takes how much, and what is free."""
    library = _library()
    if clean_partial:
        freed, busy = library.clean()
        click.echo(f"{readable_size(freed)} freed", err=True)
        for path in busy:
            click.echo(f"{path.name} is being written right now and stays", err=True)
    models, leftovers = library.models(), library.leftovers()
    if as_json:
        facts = {
            "directory": str(library.root),
            "free_bytes": library.free_bytes(),
            "models": models,
            "leftovers": {str(path): path.stat().st_size for path in leftovers},
        }
        click.echo(msgspec.json.encode(facts, enc_hook=str))
        return
    table = Table("model", "size", "source", "last verified")
    for kept in models:
        table.add_row(kept.name, readable_size(kept.bytes), *_source(kept))
    for path in leftovers:
        table.add_row(f"{path.parent.name}/{path.name}", readable_size(path.stat().st_size), "left over", "")
    total = sum(kept.bytes for kept in models) + sum(path.stat().st_size for path in leftovers)
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    console.print(
        f"{library.root}: {readable_size(total)} in use, {readable_size(library.free_bytes())} free", soft_wrap=True
    )


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()


def _library() -> Library:
    return Library(models_directory(load_settings()))


def _find(library: Library, name: str) -> StoredModel:
    kept = library.find(name)
    if kept is None:
        raise ModelNotFoundError(f"{library.root} holds no {name}", hint="promptai models disk shows what is there")
    return kept


def _source(kept: StoredModel) -> tuple[str, str]:
    if kept.sidecar is None:
        return "unverified: not from here", "never"
    return kept.sidecar.source, kept.sidecar.verified_at
