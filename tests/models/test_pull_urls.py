"""Downloads from any web server, which provides no checksum and may change the file."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptai.errors import HubUnreachableError, ModelChecksumError, ModelError, ModelFormatError
from promptai.models.library import Library, StoredModel
from promptai.models.pull import fetch
from promptai.models.source_selection import parse_reference, resolve_download
from support_hub import Faults, Hub, RecordingReporter, hub_with, point_at


@pytest.fixture
def weights(small_model: Path) -> bytes:
    return small_model.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_with() as hub:
        point_at(hub.url, tmp_path, monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the pauses between tries
        yield hub


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "models")


def get(library: Library, hub: Hub, name: str, *, sha256: str | None = None) -> StoredModel:
    return fetch(
        resolve_download(parse_reference(f"{hub.url}/plain/{name}"), sha256=sha256), library, RecordingReporter()
    )


def test_stores_a_url_under_its_server_and_resumes_it(hub: Hub, library: Library, weights: bytes) -> None:
    hub.plain["own.gguf"] = weights
    hub.faults = Faults(cut_at=0.5, cut_first=9)
    with pytest.raises(HubUnreachableError):
        get(library, hub, "own.gguf")
    hub.seen.clear()
    hub.faults = Faults()

    stored = get(library, hub, "own.gguf")

    assert stored.path == library.root / "url--127.0.0.1" / "own.gguf"
    assert stored.sidecar is not None
    assert (stored.sidecar.sha256, stored.sidecar.promised) == (hashlib.sha256(weights).hexdigest(), False)
    half = len(weights) // 2
    assert [seen.range for seen in hub.bodies()] == ["bytes=0-0", f"bytes={half}-"]
    assert hub.bodies()[1].bytes == len(weights) - half


def test_never_resumes_a_url_without_a_version(hub: Hub, library: Library, weights: bytes) -> None:
    """The second half might be of another file; gives up on a server that always closes the connection."""
    hub.plain["own.gguf"] = weights
    hub.faults = Faults(no_etag=True, cut_at=0.5, cut_first=2)
    stored = get(library, hub, "own.gguf")

    assert stored.path.read_bytes() == weights
    assert [(seen.range, seen.bytes) for seen in hub.bodies()[1:]] == [
        (None, len(weights) // 2),
        (None, len(weights)),
    ]

    library.remove(stored)
    hub.faults.cut_first = 99
    with pytest.raises(HubUnreachableError, match="connection lost"):
        get(library, hub, "own.gguf")


def test_starts_again_when_the_content_changes_during_the_download(hub: Hub, library: Library, weights: bytes) -> None:
    newer = weights[:-500] + bytes(500)  # begins in what has arrived, and in no part of the header
    hub.plain["own.gguf"] = weights
    download = resolve_download(parse_reference(f"{hub.url}/plain/own.gguf"))
    hub.faults = Faults(cut_at=1 - 200 / len(weights), cut_first=9)
    with pytest.raises(HubUnreachableError):
        fetch(download, library, RecordingReporter())
    hub.plain["own.gguf"] = newer
    hub.faults = Faults()

    assert fetch(download, library, RecordingReporter()).path.read_bytes() == newer


def test_compares_a_url_with_the_given_checksum(hub: Hub, library: Library, weights: bytes) -> None:
    hub.plain["own.gguf"] = weights

    with pytest.raises(ModelChecksumError):
        get(library, hub, "own.gguf", sha256="0" * 64)
    stored = get(library, hub, "own.gguf", sha256=hashlib.sha256(weights).hexdigest())

    assert stored.sidecar is not None
    assert stored.sidecar.promised


def test_does_not_store_a_web_page(hub: Hub, library: Library) -> None:
    hub.plain["own.gguf"] = b"<html>This link has expired</html>"

    with pytest.raises(ModelFormatError, match="not a GGUF"):
        get(library, hub, "own.gguf")
    assert [path for path in library.root.rglob("*") if path.is_file()] == []


def test_does_not_confuse_two_urls_with_the_same_file_name(hub: Hub, library: Library, weights: bytes) -> None:
    hub.plain |= {"own.gguf": weights, "b/own.gguf": weights}
    get(library, hub, "own.gguf")

    with pytest.raises(ModelError, match="already exists"):
        get(library, hub, "b/own.gguf")
