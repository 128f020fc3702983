import os
import shutil
from pathlib import Path

import msgspec
import pytest

from promptai.errors import LibraryError, ModelChecksumError, ModelError, ModelNotFoundError
from promptai.models.bundle import MANIFEST, BundleEntry, BundleManifest, export, import_path, read_manifest
from promptai.models.library import Library, Sidecar, StoredModel
from support_hub import RecordingReporter


@pytest.fixture
def library(tmp_path: Path, small_model: Path) -> Library:
    """A library with two models imported from plain files."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(small_model, source / name)
    library = Library(tmp_path / "models")
    assert len(bring(source, library)) == 2
    return library


def bring(path: Path, library: Library, progress: RecordingReporter | None = None) -> list[StoredModel]:
    return list(import_path(path, library, progress or RecordingReporter()))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_import_copies_a_file_and_records_its_checksum(library: Library, small_model: Path) -> None:
    stored = library.find("a")

    assert stored is not None
    assert stored.sidecar is not None
    assert stored.path == library.root / "imported" / "a.gguf"
    assert stored.path.read_bytes() == small_model.read_bytes()
    assert (stored.sidecar.source, stored.sidecar.promised) == ("import", False)
    library.verify(stored, RecordingReporter())


def test_import_finds_models_on_a_stick_and_continues_after_a_damaged_one(tmp_path: Path, small_model: Path) -> None:
    stick = tmp_path / "stick"
    (stick / "deep" / "down").mkdir(parents=True)
    shutil.copy(small_model, stick / "deep" / "down" / "good.gguf")
    (stick / "cut.gguf").write_bytes(small_model.read_bytes()[:-1000])
    (stick / "page.gguf").write_text("<html>")
    library, progress = Library(tmp_path / "models"), RecordingReporter()

    with pytest.raises(ModelError, match=r"2 of 3 files in .*stick were rejected"):
        bring(stick, library, progress)

    assert [stored.path.name for stored in library.models()] == ["good.gguf"]
    assert [("cut.gguf" in line, "page.gguf" in line) for line in progress.lines] == [(True, False), (False, True)]
    assert library.leftovers() == []


def test_import_reports_a_stick_without_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no .gguf files in"):
        bring(tmp_path, Library(tmp_path / "models"))


def test_import_does_not_copy_a_stored_file_again(library: Library, tmp_path: Path) -> None:
    before = library.models()

    bring(tmp_path / "source", library)

    assert library.models() == before


def test_import_keeps_another_model_of_the_same_name(library: Library, tmp_path: Path, small_model: Path) -> None:
    changed = small_model.read_bytes()[:-1] + b"!"
    (tmp_path / "a.gguf").write_bytes(changed)

    with pytest.raises(ModelError, match=r"another model is stored as imported/a.gguf"):
        bring(tmp_path / "a.gguf", library)
    assert (library.root / "imported" / "a.gguf").read_bytes() != changed


def test_import_of_a_file_in_the_library_only_adds_a_sidecar(library: Library, small_model: Path) -> None:
    own = library.root / "own.gguf"
    shutil.copy(small_model, own)

    stored = bring(own, library)[0]

    assert (stored.path, stored.sidecar is None) == (own, False)
    assert not (library.root / "imported" / "own.gguf").exists()


def test_import_copies_nothing_without_enough_space(tmp_path: Path, small_model: Path) -> None:
    library = Library(tmp_path / "models", free=lambda _: 1_050_000)

    with pytest.raises(LibraryError, match="too little for"):
        bring(small_model, library)
    assert not library.root.exists()


def test_a_bundle_reproduces_the_library_on_another_board(library: Library, tmp_path: Path) -> None:
    """Sources and checksums included."""
    export(library.models(), tmp_path / "stick", RecordingReporter())
    board = Library(tmp_path / "board")

    stored = bring(tmp_path / "stick", board)

    assert [one.name for one in stored] == ["imported/a.gguf", "imported/b.gguf"]
    assert board.models() == stored
    for here, there in zip(library.models(), board.models(), strict=True):
        assert here.path.read_bytes() == there.path.read_bytes()
        assert here.sidecar is not None
        assert there.sidecar is not None
        assert here.sidecar.sha256 == there.sidecar.sha256
    assert bring(tmp_path / "stick", board) == stored
    assert [one.sidecar is not None for one in Library(tmp_path / "stick").models()] == [
        True,
        True,
    ]  # a bundle is itself a library


def test_a_second_export_adds_to_the_first(library: Library, tmp_path: Path) -> None:
    first, second = library.models()
    export([first], tmp_path / "stick", RecordingReporter())
    export([second], tmp_path / "stick", RecordingReporter())
    export([second], tmp_path / "stick", RecordingReporter())

    manifest = read_manifest(tmp_path / "stick")
    assert manifest is not None
    assert [one.file for one in manifest.models] == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize("damage", ["byte", "length", "gone"])
def test_import_rejects_a_damaged_file_of_a_bundle_and_stores_the_others(
    library: Library, tmp_path: Path, damage: str
) -> None:
    """The stick was pulled out too early."""
    stick = tmp_path / "stick"
    export(library.models(), stick, RecordingReporter())
    victim = stick / "imported" / "a.gguf"
    if damage == "byte":
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    elif damage == "length":
        os.truncate(victim, victim.stat().st_size - 1)
    else:
        victim.unlink()
    board, progress = Library(tmp_path / "board"), RecordingReporter()

    with pytest.raises(ModelError, match="1 of 2 files"):
        bring(stick, board, progress)

    assert files(board.root) == ["imported/b.gguf", "imported/b.gguf.json"]
    assert "a.gguf" in progress.lines[0]


def test_export_rejects_a_damaged_model(library: Library, tmp_path: Path) -> None:
    path = library.models()[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"!")

    with pytest.raises(ModelChecksumError, match="is damaged"):
        export(library.models()[:1], tmp_path / "stick", RecordingReporter())

    assert files(tmp_path / "stick") == []


def test_export_does_not_overwrite_other_files(library: Library, tmp_path: Path) -> None:
    (tmp_path / "stick" / "imported").mkdir(parents=True)
    (tmp_path / "stick" / "imported" / "a.gguf").write_text("mine")

    with pytest.raises(ModelError, match="already exists"):
        export(library.models(), tmp_path / "stick", RecordingReporter())
    assert (tmp_path / "stick" / "imported" / "a.gguf").read_text() == "mine"


def test_export_leaves_no_partial_file_on_a_full_stick(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self), None, str(target))

    monkeypatch.setattr(Path, "replace", full)

    with pytest.raises(LibraryError, match="No space left on device"):
        export(library.models(), tmp_path / "stick", RecordingReporter())
    monkeypatch.undo()
    assert files(tmp_path / "stick") == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"created": "", "models": 5}', '{"created": "", "models": [], "x": 1}']
)
def test_rejects_a_malformed_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)

    with pytest.raises(ModelError, match="is not a valid bundle manifest"):
        bring(tmp_path, Library(tmp_path / "models"))


@pytest.mark.parametrize(
    ("folder", "file"), [("..", "a.gguf"), ("x", "../../a.gguf"), ("/etc", "a.gguf"), ("x", ".profile"), ("x", "a.sh")]
)
def test_rejects_a_manifest_with_paths_outside_the_library(
    tmp_path: Path, small_model: Path, folder: str, file: str
) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    shutil.copy(small_model, tmp_path / "a.gguf")
    sidecar = Sidecar(source="import", file=file, bytes=1, sha256="0" * 64, fetched_at="", verified_at="")
    (stick / MANIFEST).write_bytes(msgspec.json.encode(BundleManifest("", (BundleEntry(folder, file, sidecar),))))
    before = files(tmp_path)

    with pytest.raises(ModelError):
        bring(stick, Library(tmp_path / "models"))
    assert files(tmp_path) == before
