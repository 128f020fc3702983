"""The HTTP client for the Hugging Face hub and other file servers; no other module connects to them.

``huggingface_hub`` provides the session, so HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN,
HF_HUB_DOWNLOAD_TIMEOUT and proxies apply to every request, and its many exceptions are
translated to one line each. It downloads small files (data sets) itself, but not models:
since version 1.18 it discards an interrupted download when the process ends (its pull
request 4306), and it compares no checksum. Model bytes come from ``open_body``, and
``models.pull`` stores them.

This module never retries: users who wait 24 s for "cannot be reached" retry on their own.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from promptai.errors import HubError, HubGatedError, HubNotFoundError, HubUnreachableError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

#: Limit for one whole range request, not for a single read: a user waits for a header, also on a slow line.
RANGE_LIMIT_S = 120.0
_API_TIMEOUT_S = 15.0
_REDIRECTS = 10
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class RepositoryFacts(msgspec.Struct, frozen=True):
    """
    The hub's metadata of a model repository.

    Attributes:
        repository: ``owner/name``.
        gated: Downloads require an accepted licence and a token.
        license: Declared in the model card, e.g. ``apache-2.0``; ``None`` when it declares none.
        files: Name (with folders) -> bytes; ``None`` when the hub does not report the size.
        revision: The current commit of the requested revision.
        sha256: Name -> checksum, for files in large-file storage only.
    """

    repository: str
    gated: bool
    license: str | None
    files: dict[str, int | None]
    revision: str
    sha256: dict[str, str] = {}


class ResponseBody(NamedTuple):
    """
    A response whose body is still being received.

    Attributes:
        start: File offset of the first byte; 0 when the server ignores range requests.
        total: Size of the whole file; ``None`` when the server does not report it.
        version: Validator that changes with the content (strong ETag, else date); ``None`` when not sent.
        chunks: The body, as it arrives.
    """

    start: int
    total: int | None
    version: str | None
    chunks: Iterator[bytes]


def fetch_dataset_file(repository: str, filename: str) -> Path:
    """
    Return the local path of a data set's file; downloads it unless it is cached.

    Raises:
        HubError: The hub cannot be reached, refuses the request, or has no such file.
    """
    label = f"{filename} in data set {repository}"
    try:
        with _translated_errors(label):
            # Imported here: takes half a second and 30 MB, which only downloads need.
            from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: PLC0415
            from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

            with suppress(LocalEntryNotFoundError):
                return Path(hf_hub_download(repository, filename, repo_type="dataset", local_files_only=True))
            # This fails at once where hf_hub_download would retry for 24 s.
            facts = get_hf_file_metadata(hf_hub_url(repository, filename, repo_type="dataset"), timeout=_API_TIMEOUT_S)
            if facts.commit_hash is None:
                raise _not_a_hub(label)
            return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except HubUnreachableError as error:
        raise HubUnreachableError(
            f"{error.message}, and the file is not on this machine",
            hint=f"connect, or download {filename} elsewhere and give its path",
        ) from None
    except OSError as error:
        raise HubError(
            f"downloading {label} failed: {one_line(error)}",
            hint="check the connection and the free space, then try again",
        ) from None


def repository_facts(repository: str, *, revision: str | None = None) -> RepositoryFacts:
    """
    Request a model repository's metadata from the hub, in one request.

    Raises:
        HubError: The repository does not exist or is private, or the hub cannot be reached.
    """
    label = f"model repository {repository}"
    with _translated_errors(label):
        from huggingface_hub import HfApi  # noqa: PLC0415

        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_API_TIMEOUT_S)
        except (TypeError, KeyError, AttributeError, JSONDecodeError):
            raise _not_a_hub(label) from None
        siblings = info.siblings or []
        return RepositoryFacts(
            repository=repository,
            gated=bool(info.gated),
            license=_license(info.card_data),
            files={sibling.rfilename: sibling.size for sibling in siblings},
            revision=str(info.sha or revision or "main"),
            sha256={sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs},
        )


def repositories_like(owner: str, name: str) -> list[str]:
    """Return up to 100 of an owner's repositories with the name's first word; an empty list on any error."""
    word = name.split("-", maxsplit=1)[0]
    path, parameters = f"{_endpoint()}/api/models", {"author": owner, "search": word, "limit": "100"}
    try:
        with _translated_errors(f"repositories of {owner}"):
            response = _session().get(path, params=parameters, headers=_headers(path), timeout=_API_TIMEOUT_S)
            return [str(entry["id"]) for entry in response.json()] if response.is_success else []
    except (HubError, TypeError, KeyError, JSONDecodeError):
        return []


def file_size(repository: str, file: str, *, revision: str = "main") -> int:
    """
    Return the size of a file in a model repository.

    Raises:
        HubError: The file does not exist, access is denied, or the hub cannot be reached.
    """
    label = f"{file} in {repository}"
    with _translated_errors(label):
        from huggingface_hub import get_hf_file_metadata  # noqa: PLC0415

        facts = get_hf_file_metadata(hub_url(repository, file, revision), timeout=_API_TIMEOUT_S)
        if facts.commit_hash is None or facts.size is None:
            raise _not_a_hub(label)
        return facts.size


def read_range(
    repository: str, file: str, start: int, length: int, *, revision: str = "main", limit_s: float = RANGE_LIMIT_S
) -> bytes:
    """
    Request ``length`` bytes from byte ``start`` of a file in a model repository; fewer where the file ends.

    Reads no more than that, even if the server sends the whole file.

    Raises:
        HubError: The file or range does not exist, access is denied, or it took longer than ``limit_s``.
    """
    label = f"{file} in {repository}"
    deadline = time.monotonic() + limit_s
    received = bytearray()
    with open_body(hub_url(repository, file, revision), label=label, start=start, length=length) as body:
        if body.start != start:
            raise HubError(
                f"the server of {label} does not support range requests",
                hint="promptai models pull downloads the whole file",
            )
        for chunk in body.chunks:
            received += chunk[: length - len(received)]
            if len(received) >= length:
                break
            if time.monotonic() > deadline:
                raise HubUnreachableError(
                    f"{label}: received {len(received):,} of {length:,} bytes in {limit_s:.0f} s",
                    hint="try again on a faster connection",
                )
    return bytes(received)


def hub_url(repository: str, file: str, revision: str) -> str:
    """Return the hub's URL of a file in a model repository."""
    with _translated_errors(f"{file} in {repository}"):
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        return hf_hub_url(repository, file, revision=revision)


@contextmanager
def open_body(
    url: str, *, label: str, start: int = 0, length: int | None = None, version: str | None = None
) -> Iterator[ResponseBody]:
    """
    Request a file, from byte ``start`` if the server supports ranges; sends the token to the hub only.

    Args:
        label: The file's name in error messages.
        length: Number of bytes; ``None`` for all up to the end.
        version: Request the range only if the file still has this version; otherwise the server sends all of it.

    Raises:
        HubUnreachableError: No connection, or the connection was lost (also while chunks are read).
        HubError: The server refuses the request.
    """
    timeout_s = _constants().HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # noqa: PLC0415

    headers = _headers(url)
    if start or length is not None:
        headers["Range"] = f"bytes={start}-{'' if length is None else start + max(length, 1) - 1}"
        if version is not None:
            headers["If-Range"] = version
    with _translated_errors(label), closing(_get(url, headers, timeout_s, label)) as response:
        hf_raise_for_status(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(
                f"the server of {label} compresses it, against the request's Accept-Encoding", hint="use another mirror"
            )
        content_range = response.headers.get("Content-Range", "") if response.status_code == 206 else ""
        size = content_range.rpartition("/")[2] if content_range else response.headers.get("Content-Length", "")
        yield ResponseBody(
            start=int(content_range.removeprefix("bytes ").partition("-")[0]) if content_range else 0,
            total=int(size) if size.isdecimal() else None,
            version=_strong_etag(response.headers.get("ETag")) or response.headers.get("Last-Modified"),
            chunks=response.iter_raw(),
        )


def _get(url: str, headers: dict[str, str], timeout_s: float, label: str) -> Any:
    """Return a response with its body unread; checks each redirect before following it."""
    session = _session()
    request = session.build_request("GET", url, headers=headers, timeout=timeout_s)
    for _ in range(_REDIRECTS):
        check_url(str(request.url), f"{label}: ")
        response = session.send(request, stream=True, follow_redirects=False)
        if response.next_request is None:
            return response
        response.close()
        request = response.next_request  # httpx drops the token when the origin changes
    raise HubError(f"{label}: more than {_REDIRECTS} redirects", hint="check the address")


def check_url(url: str, prefix: str = "") -> None:
    """
    Check that a URL is encrypted, on this machine, or at the user's own HF_ENDPOINT.

    Raises:
        HubError: The URL is malformed, or none of these.
    """
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    except ValueError:
        scheme, host = "", None
    if not host or scheme not in ("http", "https"):
        raise HubError(f"{prefix}'{url}' is not an http(s) URL", hint="give one that begins with https://")
    mirror = urlsplit(_endpoint())
    if scheme == "http" and host not in _LOOPBACK and (scheme, host) != (mirror.scheme, mirror.hostname):
        raise HubError(f"{prefix}{url} is not encrypted", hint="use https:// for other machines")


def one_line(error: BaseException | None) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split())


def _session() -> Any:
    """Return the library's HTTP client, an httpx client (untyped: the import name depends on its version)."""
    from huggingface_hub import get_session  # noqa: PLC0415

    return get_session()


def _constants() -> Any:
    """Return the library's settings, which it reads from the environment on import."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415
    except ValueError as error:
        raise HubError(
            f"malformed hub settings in the environment: {one_line(error)}",
            hint="check HF_ENDPOINT and the other variables that begin with HF_",
        ) from None
    return constants


def _endpoint() -> str:
    return str(_constants().ENDPOINT)


def _headers(url: str) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    ours = url.startswith(f"{_endpoint()}/")
    headers: dict[str, str] = build_hf_headers(token=None if ours else False, library_name="promptai")
    return headers | {"Accept-Encoding": "identity"}


def _strong_etag(etag: str | None) -> str | None:
    """Return a strong ETag, ``None`` for a weak one: only strong ETags guarantee identical bytes."""
    return None if etag is None or etag.startswith("W/") else etag


def _license(card: Any) -> str | None:
    found = card.get("license") if card is not None else None
    return ", ".join(map(str, found)) if isinstance(found, list) else None if found is None else str(found)


@contextmanager
def _translated_errors(label: str) -> Iterator[None]:
    """Translate exceptions of the library and its HTTP client into ``HubError``."""
    _constants()
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of httpx or httpx2, depending on the library's version
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HfHubHTTPError as error:
        raise _status_error(label, error) from None
    except OfflineModeIsEnabled:
        raise HubUnreachableError(f"{label}: offline mode is set", hint="unset HF_HUB_OFFLINE to connect") from None
    except HTTPError as error:
        kind = type(error).__name__
        cut = kind in ("RemoteProtocolError", "ReadError", "ReadTimeout")
        reason = "connection lost" if cut else f"no connection: {one_line(error) or kind}"
        raise HubUnreachableError(f"{label}: {reason}", hint="check the network, HF_ENDPOINT and the proxy") from None
    except HFValidationError as error:
        raise HubNotFoundError(f"{label}: {one_line(error)}", hint="use a name of the form owner/name") from None


def _not_a_hub(label: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"{label}: the server is not a model hub", hint="check HF_ENDPOINT and the network's sign-in page"
    )


def _status_error(label: str, error: "HfHubHTTPError") -> HubError:
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415

    status, code = error.response.status_code, error.response.headers.get("X-Error-Code", "")
    if isinstance(error, GatedRepoError) or (status in (401, 403) and code != "RepoNotFound"):
        return HubGatedError(
            f"{label}: access denied by the hub (HTTP {status})",
            hint="accept the licence on the repository's page, and set HF_TOKEN to a token with read access",
        )
    if status in (401, 404):
        return HubNotFoundError(
            f"{label}: not found on the hub (HTTP {status})",
            hint="check the name; private repositories need HF_TOKEN",
        )
    if status == 416:
        return HubError(f"{label}: the file ends before the requested range", hint="check the file's size")
    if status in (408, 429) or status >= 500:
        return HubUnreachableError(f"{label}: the server is busy or failing (HTTP {status})", hint="try again later")
    return HubError(f"{label}: the server refused the request (HTTP {status})", hint="check the name")
