"""Resolve a model name to exactly one file at its source, with its address, size and checksum.

A name is a catalogue id, ``hub:owner/name[:file-or-quant]`` or a URL. One request to the hub returns its
files with sizes and checksums. An ambiguous name is an error, never a guess: a wrong guess costs
gigabytes on a slow line. Nothing is downloaded or written here.
"""

import contextlib
import difflib
import re
from urllib.parse import unquote, urlsplit

import msgspec

from promptai.errors import HubError, HubNotFoundError, ModelChecksumError, ModelError
from promptai.models.hub import RepositoryFacts, check_url, hub_url, open_body, repositories_like, repository_facts
from promptai.models.library import Library, Sidecar, StoredModel

#: Quantisations suited to the paper's kind of board, in order of preference.
DEFAULT_QUANTS = ("Q4_K_M", "Q4_0")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/([^?#]+)")


class ModelReference(msgspec.Struct, frozen=True):
    """
    A model name, parsed but not yet resolved.

    Attributes:
        name: As the user typed it.
        url: A file on any web server; ``None`` for a model on the hub.
        repository: ``owner/name`` on the hub.
        choice: A file name or a quantisation; ``None`` for the first of ``DEFAULT_QUANTS`` that exists.
        revision: A commit or branch; ``None`` for the main branch.
        catalog: Catalogue id; ``None`` when the name is not from the catalogue.
        licence: According to the catalogue; the hub's value takes precedence.
    """

    name: str
    url: str | None = None
    repository: str = ""
    choice: str | None = None
    revision: str | None = None
    catalog: str | None = None
    licence: str | None = None


class Download(msgspec.Struct, frozen=True):
    """
    One file to fetch, and its place in the library.

    Attributes:
        label: The file's name in messages.
        url: Address to fetch from.
        folder: Folder below the library's root.
        name: File name in that folder.
        sidecar: The future sidecar; its checksum is empty when the source gives none.
        version: The server's validator of the content (ETag or date); ``None`` when a checksum or commit
            identifies it.
        resumable: Whether bytes from an earlier attempt are known to belong to the same content.
    """

    label: str
    url: str
    folder: str
    name: str
    sidecar: Sidecar
    version: str | None = None
    resumable: bool = True


def parse_reference(name: str) -> ModelReference:
    """
    Parse a catalogue ``id[:quant]``, ``hub:owner/name[:file-or-quant]``, or a URL (hub pages included).

    Raises:
        ModelError: The name has none of these forms, or the catalogue lacks it.
        HubError: The URL is malformed, or not encrypted.
    """
    page = _HUB_PAGE.fullmatch(name.partition("?")[0])
    if page is not None:
        return ModelReference(name, repository=page[1], revision=unquote(page[2]), choice=unquote(page[3]))
    if "://" in name:
        check_url(name)
        return ModelReference(name, url=name)
    if not name.startswith("hub:") and "/" not in name:
        return _from_catalog(name)
    repository, _, choice = name.removeprefix("hub:").partition(":")
    if repository.count("/") != 1 or not name.startswith("hub:"):
        raise ModelError(f"'{name}' is not a model name", hint="for example hub:owner/name:Q4_K_M, or an https:// URL")
    return ModelReference(name, repository=repository, choice=choice or None)


def resolve_download(reference: ModelReference, *, sha256: str | None = None) -> Download:
    """
    Request the file's metadata from its source; writes nothing.

    Args:
        sha256: Checksum that the user expects.

    Raises:
        HubError: The source cannot be reached, or has no such file.
        ModelError: The file is one part of a split model, or the source lists another checksum.
    """
    if reference.url is not None:
        return _resolve_url(reference.url, sha256)
    facts = _facts(reference)
    file = choose_file(facts, reference.choice)
    promised = facts.sha256.get(file)
    if sha256 is not None and promised is not None and sha256 != promised:
        raise ModelChecksumError(
            f"{file} in {facts.repository} has SHA-256 {promised[:12]}… on the hub, not {sha256[:12]}…",
            hint="check the checksum and the file name",
        )
    sidecar = Sidecar(
        source=f"hub:{facts.repository}:{file}",
        file=file,
        bytes=facts.files[file] or 0,
        sha256=promised or sha256 or "",
        fetched_at="",
        verified_at="",
        promised=bool(promised or sha256),
        repository=facts.repository,
        revision=facts.revision,
        licence=facts.license or reference.licence,
        catalog=reference.catalog,
    )
    return Download(
        label=f"{file} in {facts.repository}",
        url=hub_url(facts.repository, file, facts.revision),
        folder=facts.repository.replace("/", "--"),
        name=file.replace("/", "--"),
        sidecar=sidecar,
    )


def choose_file(facts: RepositoryFacts, choice: str | None) -> str:
    """
    Return the one GGUF file of a repository that matches a file name or quantisation.

    Raises:
        HubNotFoundError: No file matches, or several do; lists the candidates.
        ModelError: Only parts of a split model match.
    """
    files = sorted(file for file in facts.files if file.lower().endswith(".gguf"))
    contents = f"{facts.repository} contains {', '.join(files) or 'no .gguf files'}"
    if choice is not None and choice.lower().endswith(".gguf"):
        found = [file for file in files if file == choice] or [f for f in files if f.lower() == choice.lower()]
        near = difflib.get_close_matches(choice, files, n=3) or files
    else:
        quants = DEFAULT_QUANTS if choice is None else (choice,)
        found = next(filter(None, ([f for f in files if _is_quant(f, quant)] for quant in quants)), [])
        if choice is None and not found:
            found = [file for file in files if not _SPLIT.search(file)]
        near = files
    if found and all(_SPLIT.search(file) for file in found):
        raise ModelError(
            f"{found[0]} is one part of a split model",
            hint="choose a model in a single file; split models are not supported here",
        )
    found = [file for file in found if not _SPLIT.search(file)]
    if len(found) == 1:
        return found[0]
    requested = choice or " or ".join(DEFAULT_QUANTS)
    if found:
        raise HubNotFoundError(
            f"{requested} matches several files in {facts.repository}: {', '.join(found)}",
            hint="give the file name after the colon",
        )
    raise HubNotFoundError(
        f"{facts.repository} has no {requested}",
        hint=f"did you mean {', '.join(near)}?" if near != files else contents,
    )


def find_stored(reference: ModelReference, library: Library) -> StoredModel | None:
    """Return a model of the library that matches a reference; the fallback when its source cannot be reached."""
    for kept in library.models():
        sidecar = kept.sidecar
        if sidecar is None:
            continue
        if reference.url is not None:
            if sidecar.source == _without_secrets(reference.url):
                return kept
        elif sidecar.repository == reference.repository:
            files: dict[str, int | None] = {sidecar.file: sidecar.bytes}
            with contextlib.suppress(HubError, ModelError):
                choose_file(RepositoryFacts(reference.repository, False, None, files, ""), reference.choice)
                return kept
    return None


def _from_catalog(name: str) -> ModelReference:
    from promptai.models.catalog import load_catalog  # noqa: PLC0415  loads the shapes of all models

    entry_id, _, quant = name.partition(":")
    entry = load_catalog().find(entry_id)
    files = {known.upper(): file for known, file in entry.files.items()}
    first = next((files[default] for default in DEFAULT_QUANTS if default in files), None)
    choice = files.get(quant.upper(), quant) if quant else first
    return ModelReference(name, repository=entry.gguf, choice=choice, catalog=entry.id, licence=entry.licence)


def _facts(reference: ModelReference) -> RepositoryFacts:
    try:
        return repository_facts(reference.repository, revision=reference.revision)
    except HubNotFoundError as error:
        near = difflib.get_close_matches(reference.repository, repositories_like(*reference.repository.split("/")), n=3)
        if not near:
            raise
        raise HubNotFoundError(error.message, hint=f"did you mean {', '.join(f'hub:{n}' for n in near)}?") from None


def _resolve_url(url: str, sha256: str | None) -> Download:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    label = name or url
    with open_body(url, label=label, length=1) as body:
        total, version = body.total, body.version
    sidecar = Sidecar(
        source=_without_secrets(url),
        file=name,
        bytes=total or 0,
        sha256=sha256 or "",
        fetched_at="",
        verified_at="",
        promised=bool(sha256),
    )
    folder = f"url--{urlsplit(url).hostname}".replace(":", "-")  # a colon: IPv6
    resumable = total is not None and (version is not None or sha256 is not None)
    return Download(label, url, folder, name, sidecar, version=version, resumable=resumable)


def _without_secrets(url: str) -> str:
    """Strip user name, password and signature from a URL, so that no secret is stored."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_quant(file: str, quant: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", file, re.IGNORECASE) is not None
