"""Everything that comes from the Hugging Face hub, or another server of files; the only module that talks to them.

``huggingface_hub`` brings the session, so that HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN,
HF_HUB_DOWNLOAD_TIMEOUT and proxies hold for every request here. Its many exceptions
become one line each. Small files (data sets) it fetches itself; models it does not:
since version 1.18 a download that is cut is thrown away with its process (its pull
request 4306), and no checksum is compared. So bytes come from ``open_body``, and ``models.pull`` keeps them.

Nothing is tried twice here: who waits 24 s for "cannot be reached" types it again.
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

#: A person waits for this much of a header, also on a slow line; the whole of it, not a read of it.
RANGE_LIMIT_S = 120.0
_API_TIMEOUT_S = 15.0
_REDIRECTS = 10
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class RepositoryFacts(msgspec.Struct, frozen=True):
    """
    What the hub says of a model repository.

    Attributes:
        repository: ``owner/name``.
        gated: Its files need a licence that was accepted, and a token.
        license: As its card says, e.g. ``apache-2.0``.
        files: Name (with folders) -> bytes; ``None`` where the hub does not say.
        revision: The commit that ``main`` is at.
        sha256: Name -> checksum, for files in large-file storage.
    """

    repository: str
    gated: bool
    license: str | None
    files: dict[str, int | None]
    revision: str
    sha256: dict[str, str] = {}


class ResponseBody(NamedTuple):
    """
    An answer whose bytes are still coming.

    Attributes:
        start: Which byte of the file comes first: 0 when the server gives no parts.
        total: Bytes of the whole file, when the server says.
        version: Something that changes with the content (ETag, date), when the server says.
        chunks: The bytes, as they come.
    """

    start: int
    total: int | None
    version: str | None
    chunks: Iterator[bytes]


def fetch_dataset_file(repository: str, filename: str) -> Path:
    """
    The local path of one file of a data set; what was fetched once is not asked for again.

    Raises:
        HubError: The hub cannot be reached, or refuses, or has no such file.
    """
    label = f"{filename} of data set {repository}"
    try:
        with _translated_errors(label):
            # Imported here: half a second and 30 MB that only those who fetch should pay.
            from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: PLC0415
            from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

            with suppress(LocalEntryNotFoundError):
                return Path(hf_hub_download(repository, filename, repo_type="dataset", local_files_only=True))
            # Where this fails at once, the download would try for 24 s.
            facts = get_hf_file_metadata(hf_hub_url(repository, filename, repo_type="dataset"), timeout=_API_TIMEOUT_S)
            if facts.commit_hash is None:
                raise _not_a_hub(label)
            return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except HubUnreachableError as error:
        raise HubUnreachableError(
            f"{error.message}, and it is not on this machine",
            hint=f"connect, or fetch {filename} elsewhere and give its path",
        ) from None
    except OSError as error:
        raise HubError(
            f"fetching {label} failed: {one_line(error)}",
            hint="check the connection and the free space, then try again",
        ) from None


def repository_facts(repository: str, *, revision: str | None = None) -> RepositoryFacts:
    """
    What the hub says of a model repository, in one request.

    Raises:
        HubError: There is none of that name, or it is private, or the hub cannot be reached.
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
    """Up to a hundred repositories of an owner that share the name's first word; none when that cannot be told."""
    word = name.split("-", maxsplit=1)[0]
    path, parameters = f"{_endpoint()}/api/models", {"author": owner, "search": word, "limit": "100"}
    try:
        with _translated_errors(f"repositories of {owner}"):
            answer = _session().get(path, params=parameters, headers=_headers(path), timeout=_API_TIMEOUT_S)
            return [str(entry["id"]) for entry in answer.json()] if answer.is_success else []
    except (HubError, TypeError, KeyError, JSONDecodeError):
        return []


def file_size(repository: str, file: str, *, revision: str = "main") -> int:
    """
    Bytes of one file of a model repository.

    Raises:
        HubError: There is no such file, or no leave to fetch it, or the hub cannot be reached.
    """
    label = f"{file} of {repository}"
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
    ``length`` bytes of one file of a model repository from byte ``start``; fewer where the file ends.

    No more than that is read, whatever the server sends.

    Raises:
        HubError: There is no such file or part, or no leave, or it took longer than ``limit_s``.
    """
    label = f"{file} of {repository}"
    deadline = time.monotonic() + limit_s
    got = bytearray()
    with open_body(hub_url(repository, file, revision), label=label, start=start, length=length) as body:
        if body.start != start:
            raise HubError(
                f"the server of {label} gives no parts of files", hint="promptai models pull fetches it whole"
            )
        for chunk in body.chunks:
            got += chunk[: length - len(got)]
            if len(got) >= length:
                break
            if time.monotonic() > deadline:
                raise HubUnreachableError(
                    f"{label}: {len(got):,} of {length:,} bytes came in {limit_s:.0f} s", hint="try on a faster line"
                )
    return bytes(got)


def hub_url(repository: str, file: str, revision: str) -> str:
    """Where the hub serves a file of a model repository."""
    with _translated_errors(f"{file} of {repository}"):
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        return hf_hub_url(repository, file, revision=revision)


@contextmanager
def open_body(
    url: str, *, label: str, start: int = 0, length: int | None = None, version: str | None = None
) -> Iterator[ResponseBody]:
    """
    Begin to fetch a file, from a byte on if the server gives parts; a token goes to the hub alone.

    Args:
        what: The file's name in error messages.
        version: Take the part only if the file is still this version; else it comes whole.

    Raises:
        HubUnreachableError: No connection, or it was cut: also while the chunks are read.
        HubError: The server refuses.
    """
    timeout_s = _constants().HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # noqa: PLC0415

    headers = _headers(url)
    if start or length is not None:
        headers["Range"] = f"bytes={start}-{'' if length is None else start + max(length, 1) - 1}"
        if version is not None:
            headers["If-Range"] = version
    with _translated_errors(label), closing(_get(url, headers, timeout_s, label)) as answer:
        hf_raise_for_status(answer)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"the server of {label} compresses it although asked not to", hint="use another mirror")
        parts = answer.headers.get("Content-Range", "") if answer.status_code == 206 else ""
        size = parts.rpartition("/")[2] if parts else answer.headers.get("Content-Length", "")
        yield ResponseBody(
            start=int(parts.removeprefix("bytes ").partition("-")[0]) if parts else 0,
            total=int(size) if size.isdecimal() else None,
            version=_strong_etag(answer.headers.get("ETag")) or answer.headers.get("Last-Modified"),
            chunks=answer.iter_raw(),
        )


def _get(url: str, headers: dict[str, str], timeout_s: float, label: str) -> Any:
    """An answer whose body was not read; each redirect is checked before it is followed."""
    session = _session()
    request = session.build_request("GET", url, headers=headers, timeout=timeout_s)
    for _ in range(_REDIRECTS):
        check_url(str(request.url), f"{label}: ")
        answer = session.send(request, stream=True, follow_redirects=False)
        if answer.next_request is None:
            return answer
        answer.close()
        request = answer.next_request  # made by httpx, which takes the token out when the origin changes
    raise HubError(f"{label}: redirected more than {_REDIRECTS} times", hint="check the address")


def check_url(url: str, prefix: str = "") -> None:
    """
    Refuse what is not encrypted, except on this machine and at an endpoint that the user set.

    Raises:
        HubError: It is neither.
    """
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    except ValueError:
        scheme, host = "", None
    if not host or scheme not in ("http", "https"):
        raise HubError(f"{prefix}{url} is not a web address", hint="give one that begins with https://")
    mirror = urlsplit(_endpoint())
    if scheme == "http" and host not in _LOOPBACK and (scheme, host) != (mirror.scheme, mirror.hostname):
        raise HubError(f"{prefix}{url} is not encrypted", hint="only https is fetched from other machines")


def one_line(error: BaseException | None) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(str(error).split())


def _session() -> Any:
    """The library's HTTP client: httpx, under whichever name the library brings it."""
    from huggingface_hub import get_session  # noqa: PLC0415

    return get_session()


def _constants() -> Any:
    """What the library made of the environment."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415
    except ValueError as error:
        raise HubError(
            f"the hub's settings in the environment are malformed: {one_line(error)}",
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
    """Only a strong ETag promises the same bytes."""
    return None if etag is None or etag.startswith("W/") else etag


def _license(card: Any) -> str | None:
    found = card.get("license") if card is not None else None
    return ", ".join(map(str, found)) if isinstance(found, list) else None if found is None else str(found)


@contextmanager
def _translated_errors(label: str) -> Iterator[None]:
    """Turn what the library and its HTTP client raise into errors of ours."""
    _constants()
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # httpx's or httpx2's, as the library's version has it
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HfHubHTTPError as error:
        raise _status_error(label, error) from None
    except OfflineModeIsEnabled:
        raise HubUnreachableError(f"{label}: told to stay offline", hint="unset HF_HUB_OFFLINE to connect") from None
    except HTTPError as error:
        kind = type(error).__name__
        cut = kind in ("RemoteProtocolError", "ReadError", "ReadTimeout")
        reason = "the connection was cut" if cut else f"no connection: {one_line(error) or kind}"
        raise HubUnreachableError(f"{label}: {reason}", hint="check the network, HF_ENDPOINT and the proxy") from None
    except HFValidationError as error:
        raise HubNotFoundError(f"{label}: {one_line(error)}", hint="repositories are named owner/name") from None


def _not_a_hub(label: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"{label}: what answered is not a hub", hint="check HF_ENDPOINT and the network's sign-in page"
    )


def _status_error(label: str, error: "HfHubHTTPError") -> HubError:
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415

    status, code = error.response.status_code, error.response.headers.get("X-Error-Code", "")
    if isinstance(error, GatedRepoError) or (status in (401, 403) and code != "RepoNotFound"):
        return HubGatedError(
            f"{label}: the hub asks for leave (HTTP {status})",
            hint="accept the licence on its page there, and set HF_TOKEN to a token that may read it",
        )
    if status in (401, 404):
        return HubNotFoundError(
            f"{label}: there is no such thing on the hub (HTTP {status})",
            hint="check the name; a private one needs HF_TOKEN",
        )
    if status == 416:
        return HubError(f"{label}: the file ends before the part that was asked for", hint="check the file's size")
    if status in (408, 429) or status >= 500:
        return HubUnreachableError(f"{label}: the server is busy or broken (HTTP {status})", hint="try again later")
    return HubError(f"{label}: the server refuses (HTTP {status})", hint="check the name")
