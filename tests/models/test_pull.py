"""Downloads from a misbehaving hub, in this process; tests/cli/test_models_pull.py does the same across processes."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from promptai.errors import (
    HubError,
    HubGatedError,
    HubUnreachableError,
    LibraryError,
    ModelChecksumError,
    ModelError,
)
from promptai.models.library import Library, Sidecar, StoredModel
from promptai.models.pull import downloaded_share, fetch
from promptai.models.source_selection import find_stored, parse_reference, resolve_download
from support_hub import COMMIT, TOKEN, Faults, Hub, RecordingReporter, hub_with, point_at

NAME = "hub:people/tiny-GGUF"
FILE = "tiny-Q4_K_M.gguf"


@pytest.fixture
def weights(small_model: Path) -> bytes:
    return small_model.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_with(people__tiny_GGUF={FILE: weights}) as hub:
        point_at(hub.url, tmp_path, monkeypatch)
        yield hub


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "models")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, recorded instead of waited for."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def get(
    library: Library, name: str = NAME, *, sha256: str | None = None, progress: RecordingReporter | None = None
) -> StoredModel:
    return fetch(resolve_download(parse_reference(name), sha256=sha256), library, progress or RecordingReporter())


def names(library: Library) -> list[str]:
    """The names of all files in the library."""
    return sorted(path.name for path in library.root.rglob("*") if path.is_file())


def test_stores_a_model_with_its_source(hub: Hub, library: Library, weights: bytes) -> None:
    stored = get(library)

    assert stored.path == library.root / "people--tiny-GGUF" / FILE
    assert stored.path.read_bytes() == weights
    assert stored.sidecar is not None
    assert msgspec.structs.replace(stored.sidecar, fetched_at="", verified_at="") == Sidecar(
        source=f"{NAME}:{FILE}",
        file=FILE,
        bytes=len(weights),
        sha256=hashlib.sha256(weights).hexdigest(),
        fetched_at="",
        verified_at="",
        promised=True,
        repository="people/tiny-GGUF",
        revision=COMMIT,
        licence="apache-2.0",
    )
    assert names(library) == [FILE, f"{FILE}.json"]
    assert [seen.bytes for seen in hub.bodies()] == [len(weights)]


def test_does_not_download_a_stored_model_again(hub: Hub, library: Library) -> None:
    assert get(library) == get(library)
    assert len(hub.bodies()) == 1


def test_resumes_at_once_after_a_lost_connection(
    hub: Hub, library: Library, weights: bytes, pauses: list[float]
) -> None:
    hub.faults = Faults(cut_at=0.3, cut_first=1)
    progress = RecordingReporter()

    stored = get(library, progress=progress)

    cut = int(len(weights) * 0.3)
    assert stored.path.read_bytes() == weights
    assert [(seen.range, seen.bytes) for seen in hub.bodies()] == [
        (None, cut),
        (f"bytes={cut}-", len(weights) - cut),
    ]
    assert progress.lines == [f"{FILE} in people/tiny-GGUF: connection lost; retrying"]
    assert progress.advanced == len(weights)
    assert sum(pauses) < 1


def test_gives_up_when_no_bytes_arrive_and_keeps_the_partial_file(
    hub: Hub, library: Library, weights: bytes, pauses: list[float]
) -> None:
    """After half a minute of growing pauses the user decides when to resume."""
    hub.faults = Faults(cut_at=0.5, cut_first=99)

    with pytest.raises(HubUnreachableError, match=r"connection lost; 5\d KiB of \d+ KiB received") as refusal:
        get(library)

    assert "to resume" in refusal.value.hint
    assert [path.stat().st_size for path in library.leftovers()] == [len(weights) // 2]
    assert pauses[1:] == [1, 3, 7, 15]
    assert library.models() == []


def test_the_next_pull_checks_the_partial_file_and_requests_the_rest(
    hub: Hub, library: Library, weights: bytes
) -> None:
    hub.faults = Faults(cut_at=0.9, cut_first=99)
    with pytest.raises(HubUnreachableError):
        get(library)
    hub.seen.clear()
    hub.faults = Faults()
    progress = RecordingReporter()
    download = resolve_download(parse_reference(NAME))
    assert downloaded_share(download, library) == pytest.approx(0.9, abs=0.001)

    fetch(download, library, progress)

    have = int(len(weights) * 0.9)
    assert [(seen.range, seen.bytes) for seen in hub.bodies()] == [(f"bytes={have}-", len(weights) - have)]
    assert [done for _, _, done in progress.stretches] == [0, have]
    assert progress.advanced == len(weights)


def test_a_complete_partial_file_is_only_renamed(hub: Hub, library: Library, weights: bytes) -> None:
    """Power failed between the last byte and the rename."""
    part = library.root / "people--tiny-GGUF" / f"{FILE}.{hashlib.sha256(weights).hexdigest()[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights)

    assert get(library).path.read_bytes() == weights
    assert hub.bodies() == []


def test_a_server_without_range_requests_starts_from_the_beginning(hub: Hub, library: Library, weights: bytes) -> None:
    hub.faults = Faults(cut_at=0.5, cut_first=1, no_ranges=True)

    assert get(library).path.read_bytes() == weights
    assert [seen.bytes for seen in hub.bodies()] == [len(weights) // 2, len(weights)]


def test_does_not_resume_another_version(hub: Hub, library: Library, weights: bytes) -> None:
    hub.faults = Faults(cut_at=0.5, cut_first=99)
    with pytest.raises(HubUnreachableError):
        get(library)
    newer = weights[:-1] + b"!"
    hub.repositories["people/tiny-GGUF"].files[FILE] = newer
    hub.faults = Faults()

    assert get(library).path.read_bytes() == newer


@pytest.mark.usefixtures("hub")
def test_starts_again_when_the_awaited_partial_file_was_deleted(library: Library, weights: bytes) -> None:
    """After a cleaning or a rejected checksum, the locked file is no longer the one of that name."""
    part = library.root / "people--tiny-GGUF" / f"{FILE}.{hashlib.sha256(weights).hexdigest()[:12]}.part"
    part.parent.mkdir(parents=True)
    progress, download = RecordingReporter(), resolve_download(parse_reference(NAME))
    with ThreadPoolExecutor() as beside:
        with part.open("wb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            waiting = beside.submit(fetch, download, library, progress)
            while not progress.lines:
                assert not waiting.done()
            part.unlink()
        stored = waiting.result()

    assert progress.lines == ["waiting for another process that is downloading the same file"]
    assert stored.path.read_bytes() == weights
    assert names(library) == [FILE, f"{FILE}.json"]


def test_sets_a_file_with_a_wrong_checksum_aside(hub: Hub, library: Library, weights: bytes) -> None:
    hub.faults.flip_byte = len(weights) - 1

    with pytest.raises(ModelChecksumError, match="expected") as refusal:
        get(library)

    assert names(library) == [f"{FILE}.wrong-checksum"]
    assert f"{FILE}.wrong-checksum" in refusal.value.message
    hub.faults = Faults()
    assert get(library).path.read_bytes() == weights


@pytest.mark.parametrize("shorter_by", [1, -1], ids=["shorter", "longer"])
def test_rejects_a_file_of_another_length(hub: Hub, library: Library, weights: bytes, shorter_by: int) -> None:
    download = resolve_download(parse_reference(NAME))
    hub.repositories["people/tiny-GGUF"].files[FILE] = weights + b"!"
    hub.redirects[f"/people/tiny-GGUF/resolve/{COMMIT}/{FILE}"] = (
        f"/storage/{hashlib.sha256(weights + b'!').hexdigest()}"
    )
    hub.faults.shorter_by = 1 + shorter_by

    with pytest.raises(HubError, match="changed at its source"):
        fetch(download, library, RecordingReporter())
    assert names(library) == []


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_other", 403)])
def test_a_gated_model_needs_a_licence_and_a_token_and_leaves_no_file(
    hub: Hub, library: Library, token: str | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["people/tiny-GGUF"].gated = True
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(HubGatedError, match=f"HTTP {status}") as refusal:
        get(library)

    assert "accept the licence" in refusal.value.hint
    assert "HF_TOKEN" in refusal.value.hint
    assert names(library) == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert get(library).sidecar is not None


def test_writes_nothing_without_enough_space(hub: Hub, tmp_path: Path, weights: bytes) -> None:
    library = Library(tmp_path / "models", free=lambda _: len(weights))

    with pytest.raises(LibraryError, match=r"has \d+ KiB free, 1.0 MiB too little for 1.\d MiB"):
        get(library)

    assert not library.root.exists()
    assert hub.bodies() == []


def test_bytes_already_received_need_no_space(hub: Hub, tmp_path: Path, weights: bytes) -> None:
    spare = 1 << 20
    hub.faults = Faults(cut_at=0.5, cut_first=99)
    with pytest.raises(HubUnreachableError):
        get(Library(tmp_path / "models"))
    hub.faults = Faults()

    assert get(Library(tmp_path / "models", free=lambda _: spare + len(weights) // 2 + 1)).bytes == len(weights)


@pytest.mark.parametrize("name", ["../../evil-Q4_0.gguf", ".bashrc-Q4_0.gguf", "a\\b-Q4_0.gguf", "a\n-Q4_0.gguf"])
def test_rejects_a_hub_name_that_leaves_the_library(
    hub: Hub, library: Library, tmp_path: Path, weights: bytes, name: str
) -> None:
    hub.repositories["people/tiny-GGUF"].files = {name: weights}

    with pytest.raises(ModelError, match="not a safe file name"):
        get(library)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_adopts_an_identical_file_that_the_user_put_there(hub: Hub, library: Library, weights: bytes) -> None:
    path = library.root / "people--tiny-GGUF" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(weights)

    assert get(library).sidecar is not None
    assert library.models()[0].sidecar is not None
    assert hub.bodies() == []


def test_leaves_a_different_file_in_its_place(hub: Hub, library: Library) -> None:
    path = library.root / "people--tiny-GGUF" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"my own")

    with pytest.raises(ModelError, match="already exists"):
        get(library)

    assert path.read_bytes() == b"my own"
    assert hub.bodies() == []


def test_a_newer_version_does_not_replace_the_stored_one(hub: Hub, library: Library, weights: bytes) -> None:
    get(library)
    hub.repositories["people/tiny-GGUF"].files[FILE] = weights[:-1] + b"!"
    progress = RecordingReporter()

    assert get(library, progress=progress).path.read_bytes() == weights
    assert "another version" in progress.lines[0]


def test_rejects_a_damaged_stored_model(hub: Hub, library: Library) -> None:
    os.truncate(get(library).path, 100)

    with pytest.raises(ModelChecksumError, match="is damaged"):
        get(library)
    assert len(hub.bodies()) == 1


def test_stores_an_intact_file_that_it_cannot_read(hub: Hub, library: Library) -> None:
    """A night's download of a model newer than this reader is not discarded."""
    hub.repositories["people/tiny-GGUF"].files[FILE] = b"GGUF" + (99).to_bytes(4, "little") + bytes(100)
    progress = RecordingReporter()

    assert get(library, progress=progress).bytes == 108
    assert "stored, although PromptAI cannot read it" in progress.lines[-1]


def test_a_catalogue_name_finds_a_model_pulled_from_the_hub(hub: Hub, library: Library) -> None:
    get(library)
    reference = msgspec.structs.replace(parse_reference(NAME), catalog="tiny")

    fetch(resolve_download(reference), library, RecordingReporter())

    assert library.find("tiny") == library.models()[0]
    assert len(hub.bodies()) == 1


def test_finds_stored_models_without_a_connection(hub: Hub, library: Library, weights: bytes) -> None:
    hub.plain["own.gguf"] = weights
    stored = get(library)
    own = get(library, f"{hub.url}/plain/own.gguf")

    assert find_stored(parse_reference(NAME), library) == stored
    assert find_stored(parse_reference(f"{NAME}:q4_k_m"), library) == stored
    assert find_stored(parse_reference(f"{NAME}:q8_0"), library) is None
    assert find_stored(parse_reference("hub:people/other"), library) is None
    assert find_stored(parse_reference(f"{hub.url}/plain/own.gguf"), library) == own
    assert find_stored(parse_reference(f"{hub.url}/plain/other.gguf"), library) is None
