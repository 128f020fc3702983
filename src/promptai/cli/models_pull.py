"""``promptai models pull``: fetch a model into the library."""

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
  promptai models pull hub:owner/name:Q8_0            another quantisation, or a file's name
  promptai models pull https://example.org/model.gguf --sha256 9f86d0...
"""
)
@click.argument("name")
@click.option("--sha256", help="Checksum that the file must have; the hub tells its own.")
@click.option(
    "--tries",
    type=click.IntRange(min=1),
    default=TRIES,
    show_default=True,
    help="How often in a row a connection may fail without a byte partial.",
)
@click.option("--json", "as_json", is_flag=True, help="Print where it is kept and where it came from, as JSON.")
def pull(name: str, *, sha256: str | None, tries: int, as_json: bool) -> None:
    """
    Fetch a model into the library, or find that it is there.

    NAME is from the catalogue, from the hub, or a URL.
    A download that was cut goes on where it stopped, also after Ctrl-C or a
    power cut. HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and proxies are honoured.
    """
    if sha256 is not None and (len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef")):
        raise SettingsError(f"{sha256[:80]} is no SHA-256", hint="give its 64 hexadecimal digits")
    library = Library(models_directory(load_settings()))
    with Transfer() as progress:
        kept = pull_into(
            library, parse_reference(name), progress, sha256=sha256.lower() if sha256 else None, tries=tries
        )
    if as_json:
        click.echo(msgspec.json.encode(kept, enc_hook=str))
    else:
        click.echo(f"{kept.path}: {_described(kept)}")


def pull_into(
    library: Library, reference: ModelReference, progress: Transfer, *, sha256: str | None, tries: int
) -> StoredModel:
    """Fetch what is reference; when its source cannot be asked, what is in the library will do."""
    try:
        download = resolve_download(reference, sha256=sha256)
    except HubUnreachableError as error:
        kept = find_stored(reference, library)
        if kept is None:
            raise
        progress.notify(f"{error.message}; taking what is here")
        return kept
    if not download.sidecar.sha256:
        progress.notify(
            f"{download.label}: its source gives no checksum, so only later damage can be noticed; see --sha256"
        )
    try:
        return fetch(download, library, progress, tries=tries)
    except KeyboardInterrupt:
        share = downloaded_share(download, library)
        progress.notify(f"{share:.0%} of {download.label} is kept; go on with: promptai models pull {reference.name}")
        raise


def _described(kept: StoredModel) -> str:
    sidecar = kept.sidecar
    if sidecar is None:
        return readable_size(kept.bytes)
    proof = "SHA-256 as its source says" if sidecar.promised else f"SHA-256 {sidecar.sha256[:12]}…, promised by nobody"
    return f"{readable_size(kept.bytes)}, {proof}, licence {sidecar.licence or 'not said'}"
