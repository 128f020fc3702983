"""From what a person typed to one file at one place: what is asked for, where it is, what it must be.

A name is of the catalogue, ``hub:owner/name[:file-or-quant]`` or a URL. The hub is asked once, for its
list of files with sizes and checksums; nothing is written here. A name that may mean
several files is never guessed at: gigabytes on a slow line are no place for guessing.
"""

import contextlib
import difflib
import re
from urllib.parse import unquote, urlsplit

import msgspec

from promptai.errors import HubError, HubNotFoundError, ModelChecksumError, ModelError
from promptai.models.hub import RepositoryFacts, check_url, hub_url, open_body, repositories_like, repository_facts
from promptai.models.library import Kept, Library, Sidecar

#: What the paper's kind of board runs; the next where a repository lacks it.
DEFAULT_QUANTS = ("Q4_K_M", "Q4_0")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/([^?#]+)")


class Wanted(msgspec.Struct, frozen=True):
    """
    What a person asked for.

    Attributes:
        name: As it was typed.
        url: A file on any web server; ``None``: it is on the hub.
        repository: ``owner/name`` on the hub.
        choice: A file there, or a quantisation; ``None``: the default ones.
        revision: A commit or branch; ``None``: main.
        catalog: Its id in the catalogue.
        licence: What the catalogue says; the hub knows better.
    """

    name: str
    url: str | None = None
    repository: str = ""
    choice: str | None = None
    revision: str | None = None
    catalog: str | None = None
    licence: str | None = None


class Order(msgspec.Struct, frozen=True):
    """
    What will be fetched, and where it will be kept.

    Attributes:
        what: Its name in messages.
        url: Where its bytes are.
        folder: Below the library.
        name: Of the file in that folder.
        origin: What its sidecar will say; the checksum is empty while none is promised.
        version: What the server calls this content; ``None``: the checksum or commit does.
        resumable: Whether a part that is here can be trusted to be of the same content.
    """

    what: str
    url: str
    folder: str
    name: str
    origin: Sidecar
    version: str | None = None
    resumable: bool = True


def parse(name: str) -> Wanted:
    """
    Understand ``id[:quant]`` of the catalogue, ``hub:owner/name[:file-or-quant]``, or a URL, also of a hub's page.

    Raises:
        ModelError: It is none of these.
        HubError: The URL is not one that we fetch from.
    """
    page = _HUB_PAGE.fullmatch(name.partition("?")[0])
    if page is not None:
        return Wanted(name, repository=page[1], revision=unquote(page[2]), choice=unquote(page[3]))
    if "://" in name:
        check_url(name)
        return Wanted(name, url=name)
    if not name.startswith("hub:") and "/" not in name:
        return _from_catalog(name)
    repository, _, choice = name.removeprefix("hub:").partition(":")
    if repository.count("/") != 1 or not name.startswith("hub:"):
        raise ModelError(f"{name} is no name of a model", hint="for example hub:owner/name:Q4_K_M, or an https:// URL")
    return Wanted(name, repository=repository, choice=choice or None)


def place_order(wanted: Wanted, *, sha256: str | None = None) -> Order:
    """
    Ask the source what it has; nothing is written.

    Args:
        sha256: What a person knows the checksum to be.

    Raises:
        HubError: It cannot be reached, or has no such file.
        ModelError: Its file is one of several pieces, or has another checksum.
    """
    if wanted.url is not None:
        return _order_url(wanted.url, sha256)
    facts = _facts(wanted)
    file = choose_file(facts, wanted.choice)
    promised = facts.sha256.get(file)
    if sha256 is not None and promised is not None and sha256 != promised:
        raise ModelChecksumError(
            f"{file} of {facts.repository} has SHA-256 {promised[:12]}… on the hub, not {sha256[:12]}…",
            hint="check the checksum, or the file's name",
        )
    origin = Sidecar(
        source=f"hub:{facts.repository}:{file}",
        file=file,
        bytes=facts.files[file] or 0,
        sha256=promised or sha256 or "",
        fetched_at="",
        verified_at="",
        promised=bool(promised or sha256),
        repository=facts.repository,
        revision=facts.revision,
        licence=facts.license or wanted.licence,
        catalog=wanted.catalog,
    )
    return Order(
        what=f"{file} of {facts.repository}",
        url=hub_url(facts.repository, file, facts.revision),
        folder=facts.repository.replace("/", "--"),
        name=file.replace("/", "--"),
        origin=origin,
    )


def choose_file(facts: RepositoryFacts, choice: str | None) -> str:
    """
    The file of a repository that a name or quantisation means.

    Raises:
        HubNotFoundError: None, or several; with what is there.
        ModelError: A model in several pieces.
    """
    every = sorted(file for file in facts.files if file.lower().endswith(".gguf"))
    whole = [file for file in every if not _SPLIT.search(file)]
    there = f"{facts.repository} has {', '.join(every) or 'no .gguf file at all'}"
    if choice is not None and choice.lower().endswith(".gguf"):
        found = [file for file in every if file == choice] or [f for f in every if f.lower() == choice.lower()]
        near = difflib.get_close_matches(choice, every, n=3) or every
    else:
        quants = DEFAULT_QUANTS if choice is None else (choice,)
        found = next(filter(None, ([f for f in every if _is_quant(f, quant)] for quant in quants)), [])
        if choice is None and not found:
            found = whole
        near = every
    if found and all(_SPLIT.search(file) for file in found):
        raise ModelError(
            f"{found[0]} is one piece of a model that is split",
            hint="take one in a single file: split ones are not read",
        )
    found = [file for file in found if not _SPLIT.search(file)]
    if len(found) == 1:
        return found[0]
    asked = choice or " or ".join(DEFAULT_QUANTS)
    if found:
        raise HubNotFoundError(
            f"{asked} may mean {', '.join(found)} of {facts.repository}", hint="give the file's name after the colon"
        )
    raise HubNotFoundError(
        f"{facts.repository} has no {asked}",
        hint=f"did you mean {', '.join(near)}?" if near != every else there,
    )


def kept_instead(wanted: Wanted, library: Library) -> Kept | None:
    """What is in the library of what was asked for, when the source cannot be asked."""
    for kept in library.models():
        sidecar = kept.sidecar
        if sidecar is None:
            continue
        if wanted.url is not None:
            if sidecar.source == _public(wanted.url):
                return kept
        elif sidecar.repository == wanted.repository:
            files: dict[str, int | None] = {sidecar.file: sidecar.bytes}
            with contextlib.suppress(HubError, ModelError):
                choose_file(RepositoryFacts(wanted.repository, False, None, files, ""), wanted.choice)
                return kept
    return None


def _from_catalog(name: str) -> Wanted:
    from promptai.models.catalog import load_catalog  # noqa: PLC0415  brings the shapes of all models with it

    wished, _, quant = name.partition(":")
    entry = load_catalog().find(wished)
    files = {known.upper(): file for known, file in entry.files.items()}
    first = next((files[default] for default in DEFAULT_QUANTS if default in files), None)
    choice = files.get(quant.upper(), quant) if quant else first
    return Wanted(name, repository=entry.gguf, choice=choice, catalog=entry.id, licence=entry.licence)


def _facts(wanted: Wanted) -> RepositoryFacts:
    try:
        return repository_facts(wanted.repository, revision=wanted.revision)
    except HubNotFoundError as error:
        near = difflib.get_close_matches(wanted.repository, repositories_like(*wanted.repository.split("/")), n=3)
        if not near:
            raise
        raise HubNotFoundError(error.message, hint=f"did you mean {', '.join(f'hub:{n}' for n in near)}?") from None


def _order_url(url: str, sha256: str | None) -> Order:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    what = name or url
    with open_body(url, what=what, length=1) as body:
        total, version = body.total, body.version
    origin = Sidecar(
        source=_public(url),
        file=name,
        bytes=total or 0,
        sha256=sha256 or "",
        fetched_at="",
        verified_at="",
        promised=bool(sha256),
    )
    folder = f"url--{urlsplit(url).hostname}".replace(":", "-")  # a colon: IPv6
    resumable = total is not None and (version is not None or sha256 is not None)
    return Order(what, url, folder, name, origin, version=version, resumable=resumable)


def _public(url: str) -> str:
    """A URL without what may be secret in it: name, password, signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_quant(file: str, quant: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", file, re.IGNORECASE) is not None
