"""``promptai models import | export | remove | verify | disk``: manage the library of downloaded models."""

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
    Add a model file, every .gguf file in a directory, or a bundle to the library.

    Each file of a bundle (promptai models export) is compared with the bundle's manifest.
    """
    library = _library()
    with Transfer() as progress:
        for model in bundle.import_path(path, library, progress):
            click.echo(f"{model.path}: {readable_size(model.bytes)}")


@click.command(epilog="\b\nExample:\n  promptai models export tinyllama-1.1b yi-coder-1.5b /media/usb")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def export(names: tuple[str, ...], directory: Path) -> None:
    """Copy models, and a manifest with their checksums, into DIRECTORY, for boards without a network."""
    library = _library()
    models = [_find(library, name) for name in names]
    with Transfer() as progress:
        bundle.export(models, directory, progress)
    click.echo(f"{directory}: {len(models)} models; on the board: promptai models import {directory}")


@click.command(epilog="\b\nExample:\n  promptai models remove tinyllama-1.1b")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def remove(names: tuple[str, ...], *, yes: bool) -> None:
    """Delete models from the library."""
    library = _library()
    models = {model.path: model for model in (_find(library, name) for name in names)}
    freed = sum(model.bytes for model in models.values())
    if not yes:
        if not _is_interactive():
            raise SettingsError("cannot ask for confirmation without a terminal", hint="use --yes")
        listed = ", ".join(model.name for model in models.values())
        click.confirm(f"Delete {listed} ({readable_size(freed)})?", abort=True, err=True)
    for model in models.values():
        library.remove(model)
    click.echo(f"{readable_size(freed)} freed, {readable_size(library.free_bytes())} free now")


@click.command(epilog="\b\nExamples:\n  promptai models verify\n  promptai models verify tinyllama-1.1b")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Compare models (all, or those named) with their checksums."""
    library = _library()
    models = [_find(library, name) for name in names] or library.models()
    damaged = 0
    with Transfer() as progress:
        for model in models:
            if model.sidecar is None:
                click.echo(f"{model.name}: no checksum recorded (promptai models import {model.path} records one)")
                continue
            try:
                library.verify(model, progress)
                unconfirmed = "" if model.sidecar.promised else " since it was stored (its source gave no checksum)"
                click.echo(f"{model.name}: intact{unconfirmed}")
            except ModelChecksumError as error:
                damaged += 1
                click.echo(str(error))
    if damaged:
        raise PromptAIError(f"{damaged} of {len(models)} models are damaged", hint="remove them and pull them again")


@click.command(epilog="\b\nExamples:\n  promptai models disk\n  promptai models disk --clean-partial")
@click.option("--clean-partial", is_flag=True, help="Delete partial downloads and rejected files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def disk(*, clean_partial: bool, as_json: bool) -> None:
    """Show the stored models, their sizes and sources, and the free space."""
    library = _library()
    if clean_partial:
        freed, busy = library.clean()
        click.echo(f"{readable_size(freed)} freed", err=True)
        for path in busy:
            click.echo(f"skipped {path.name}: another process is writing it", err=True)
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
    for model in models:
        table.add_row(model.name, readable_size(model.bytes), *_source(model))
    for path in leftovers:
        table.add_row(f"{path.parent.name}/{path.name}", readable_size(path.stat().st_size), "leftover", "")
    total = sum(model.bytes for model in models) + sum(path.stat().st_size for path in leftovers)
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    console.print(
        f"{library.root}: {readable_size(total)} in use, {readable_size(library.free_bytes())} free", soft_wrap=True
    )


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _library() -> Library:
    return Library(models_directory(load_settings()))


def _find(library: Library, name: str) -> StoredModel:
    model = library.find(name)
    if model is None:
        raise ModelNotFoundError(f"no model named '{name}' in {library.root}", hint="promptai models disk lists them")
    return model


def _source(model: StoredModel) -> tuple[str, str]:
    if model.sidecar is None:
        return "unknown (unverified)", "never"
    return model.sidecar.source, model.sidecar.verified_at
