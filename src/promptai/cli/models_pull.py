"""``promptai models pull``: download a model into the library."""

import click
import msgspec

from promptai.cli.transfer import Transfer
from promptai.errors import HubUnreachableError, SettingsError
from promptai.models.library import Library, StoredModel, readable_size
from promptai.models.pull import TRIES, downloaded_share, fetch
from promptai.models.source_selection import ModelReference, find_stored, parse_reference, resolve_download
from promptai.settings import load_settings, models_directory


@click.command(
    epilog="""\b
Examples:
  promptai models pull qwen2.5-1.5b                   from the catalogue: promptai models list
  promptai models pull hub:owner/name                 its Q4_K_M, else its Q4_0
  promptai models pull hub:owner/name:Q8_0            another quantisation, or a file name
  promptai models pull https://example.org/model.gguf --sha256 9f86d0...
"""
)
@click.argument("name")
@click.option("--sha256", help="Expected checksum; the hub provides its own.")
@click.option(
    "--tries",
    type=click.IntRange(min=1),
    default=TRIES,
    show_default=True,
    help="Consecutive connections that may fail without delivering a byte.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the model's path and source as JSON.")
def pull(name: str, *, sha256: str | None, tries: int, as_json: bool) -> None:
    """
    Download a model into the library, unless it is already there.

    NAME is a catalogue name, a model on the hub, or a URL. An interrupted download
    resumes where it stopped, also after Ctrl-C or a power cut. Respects HF_TOKEN,
    HF_ENDPOINT, HF_HUB_OFFLINE and proxy settings.
    """
    if sha256 is not None and (len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef")):
        raise SettingsError(f"invalid --sha256 '{sha256[:80]}'", hint="give 64 hexadecimal digits")
    library = Library(models_directory(load_settings()))
    with Transfer() as progress:
        model = pull_into(
            library, parse_reference(name), progress, sha256=sha256.lower() if sha256 else None, tries=tries
        )
    if as_json:
        click.echo(msgspec.json.encode(model, enc_hook=str))
    else:
        click.echo(f"{model.path}: {_described(model)}")


def pull_into(
    library: Library, reference: ModelReference, progress: Transfer, *, sha256: str | None, tries: int
) -> StoredModel:
    """Download a model; falls back to the stored one when its source cannot be reached."""
    try:
        download = resolve_download(reference, sha256=sha256)
    except HubUnreachableError as error:
        model = find_stored(reference, library)
        if model is None:
            raise
        progress.notify(f"{error.message}; using the stored model")
        return model
    if not download.sidecar.sha256:
        progress.notify(
            f"{download.label}: no checksum from its source, so only later damage can be detected (see --sha256)"
        )
    try:
        return fetch(download, library, progress, tries=tries)
    except KeyboardInterrupt:
        share = downloaded_share(download, library)
        progress.notify(
            f"{100 * share:.0f} % of {download.label} downloaded; resume with: promptai models pull {reference.name}"
        )
        raise


def _described(model: StoredModel) -> str:
    sidecar = model.sidecar
    if sidecar is None:
        return readable_size(model.bytes)
    short = f"{sidecar.sha256[:12]}…"
    proof = "SHA-256 matches its source" if sidecar.promised else f"SHA-256 {short} (its source gave no checksum)"
    return f"{readable_size(model.bytes)}, {proof}, licence {sidecar.licence or 'unknown'}"
