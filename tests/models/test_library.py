import fcntl
import hashlib
from pathlib import Path

import msgspec
import pytest

from promptai.errors import LibraryError, ModelChecksumError, ModelError, ModelNotFoundError
from promptai.models.library import Library, Sidecar, StoredModel, disk_errors, readable_size, resolve, sidecar_path
from support_hub import RecordingReporter

CONTENT = b"GGUF and weights"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "models")


def put(
    library: Library, folder: str, file: str, *, content: bytes = CONTENT, catalog: str | None = None
) -> StoredModel:
    """Store a model as a pull does."""
    final = library.path_for(folder, file)
    final.parent.mkdir(parents=True, exist_ok=True)
    sidecar = Sidecar(
        source=f"hub:{folder.replace('--', '/')}:{file}",
        file=file,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        fetched_at="2026-11-01T00:00:00+00:00",
        verified_at="2026-11-01T00:00:00+00:00",
        catalog=catalog,
    )
    with final.with_name(f"{file}.abc.part").open("wb") as part:
        part.write(content)
        return library.store(part, final, sidecar)


def test_the_directory_need_not_exist(library: Library) -> None:
    assert (library.models(), library.leftovers(), library.find("tiny"), library.clean()) == ([], [], None, (0, []))
    assert library.free_bytes() > 0
    assert not library.root.exists()


def test_a_stored_model_has_only_its_sidecar_beside_it(library: Library) -> None:
    stored = put(library, "people--tiny", "tiny-Q4_0.gguf")

    assert library.models() == [stored]
    assert sorted(path.name for path in stored.path.parent.iterdir()) == ["tiny-Q4_0.gguf", "tiny-Q4_0.gguf.json"]
    assert msgspec.json.decode(sidecar_path(stored.path).read_bytes(), type=Sidecar) == stored.sidecar


@pytest.mark.parametrize(
    "name",
    [
        *("tiny-Q4_0", "tiny-q4_0.gguf", "people--tiny/tiny-Q4_0.gguf"),
        *("hub:people/tiny:tiny-Q4_0.gguf", "tiny-1b", "TINY-1B"),
    ],
)
def test_finds_a_model_by_each_of_its_names(library: Library, name: str) -> None:
    stored = put(library, "people--tiny", "tiny-Q4_0.gguf", catalog="tiny-1b")
    put(library, "people--other", "other.gguf")

    assert library.find(name) == stored


def test_rejects_an_ambiguous_name(library: Library) -> None:
    put(library, "people--tiny", "tiny-Q4_0.gguf", catalog="tiny")
    put(library, "people--tiny", "tiny-Q8_0.gguf", catalog="tiny")

    with pytest.raises(
        ModelError, match=r"matches several models: people--tiny/tiny-Q4_0.gguf, people--tiny/tiny-Q8_0.gguf"
    ):
        library.find("tiny")


@pytest.mark.parametrize(
    "sidecar", [None, b"", b"{", b"\xff", b"[]", b'{"source": 5}'], ids=["none", "empty", "cut", "binary", "list", "5"]
)
def test_files_without_a_valid_sidecar_are_unverified(library: Library, sidecar: bytes | None) -> None:
    folder = library.root / "downloads"
    (folder / "directory.gguf").mkdir(parents=True)
    (folder / "gone.gguf").symlink_to("nowhere")
    (library.root / "notes.txt").write_text("mine")
    (folder / "own.gguf").write_bytes(b"x")
    if sidecar is not None:
        sidecar_path(folder / "own.gguf").write_bytes(sidecar)

    assert library.models() == [StoredModel(folder / "own.gguf", 1, None)]
    assert library.find("own") == library.models()[0]


def test_partial_files_are_not_models(library: Library) -> None:
    (library.root / "people--tiny").mkdir(parents=True)
    names = ["a.gguf.0123456789ab.part", "b.gguf.wrong-checksum", ".c.gguf.json.part"]
    for name in names:
        (library.root / "people--tiny" / name).write_bytes(b"12345")

    assert library.models() == []
    assert sorted(path.name for path in library.leftovers()) == sorted(names)


def test_clean_deletes_leftovers_except_files_being_written(library: Library) -> None:
    stored = put(library, "people--tiny", "tiny.gguf")
    for name in ("a.gguf.0123456789ab.part", "b.gguf.wrong-checksum"):
        (stored.path.parent / name).write_bytes(b"12345")
    with (stored.path.parent / "a.gguf.0123456789ab.part").open("ab") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)

        assert library.clean() == (5, [stored.path.parent / "a.gguf.0123456789ab.part"])

    assert library.clean() == (5, [])
    assert library.models() == [stored]


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        *(("..", "a.gguf"), ("a", "../a.gguf"), ("a", "/etc/a.gguf"), ("a/b", "a.gguf"), ("a", "b\\a.gguf")),
        *(("a", ".a.gguf"), ("", "a.gguf"), ("a", ""), ("a", "\0.gguf"), ("a", "\x1b[2J.gguf"), ("a", "C:.gguf")),
        *(("a", "a" * 300 + ".gguf"), ("a", "a.sh"), ("a", "a.gguf.json")),
    ],
)
def test_rejects_unsafe_names_and_other_file_types(library: Library, folder: str, file: str) -> None:
    with pytest.raises(ModelError):
        library.path_for(folder, file)


def test_the_space_check_keeps_some_to_spare(tmp_path: Path) -> None:
    library = Library(tmp_path, free=lambda _: 10_000_000)

    library.check_space(8_900_000)
    with pytest.raises(LibraryError, match=r"has 9.5 MiB free, 47 KiB too little for 9.6 MiB") as refusal:
        library.check_space(9_000_000)
    assert "promptai models disk" in refusal.value.hint


def test_remove_deletes_the_sidecar_and_the_empty_folder(library: Library) -> None:
    stored, other = put(library, "people--tiny", "a.gguf"), put(library, "people--tiny", "b.gguf")

    library.remove(stored)
    assert library.models() == [other]
    library.remove(other)
    assert list(library.root.iterdir()) == []


def test_verify_records_the_time_for_an_intact_model(library: Library) -> None:
    stored = put(library, "people--tiny", "tiny.gguf")
    progress = RecordingReporter()

    verified = library.verify(stored, progress)

    assert verified.sidecar is not None
    assert verified.sidecar.verified_at > "2026-11-01T00:00:00+00:00"
    assert library.models() == [verified]
    assert (progress.stretches, progress.advanced) == ([("checking people--tiny/tiny.gguf", 16, 0)], 16)


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT[:-1], CONTENT + b"!"])
def test_verify_detects_a_changed_byte_or_length(library: Library, content: bytes) -> None:
    stored = put(library, "people--tiny", "tiny.gguf")
    stored.path.write_bytes(content)

    with pytest.raises(ModelChecksumError, match=r"people--tiny/tiny.gguf is damaged"):
        library.verify(library.models()[0], RecordingReporter())
    assert library.models()[0].sidecar == stored.sidecar


def test_verify_needs_a_checksum(library: Library) -> None:
    library.root.mkdir()
    (library.root / "own.gguf").write_bytes(CONTENT)

    with pytest.raises(ModelError, match="has no recorded checksum"):
        library.verify(library.models()[0], RecordingReporter())


@pytest.mark.parametrize("moment", [".json", ".gguf"])
def test_a_model_never_lacks_its_sidecar(library: Library, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail at any moment: here at the rename of the model or of its sidecar."""
    rename = Path.replace

    def power_cut(self: Path, target: Path) -> Path:
        if target.suffix == moment:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", power_cut)
    with pytest.raises(LibraryError, match="Input/output error"):
        put(library, "people--tiny", "tiny.gguf")

    assert library.models() == []
    assert [path.name for path in library.leftovers()] == ["tiny.gguf.abc.part"]


def test_an_existing_path_takes_precedence(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(library, "people--tiny", "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"mine")

    assert resolve("tiny.gguf", library) == Path("tiny.gguf")
    assert resolve("tiny", library) == library.root / "people--tiny" / "tiny.gguf"


@pytest.mark.parametrize("reference", ["nowhere.gguf", "/nowhere/at/all", "./nowhere", "sub/nowhere"])
def test_a_missing_path_is_returned_unchanged(library: Library, reference: str) -> None:
    """The reader that opens it reports the error."""
    assert resolve(reference, library) == Path(reference)


@pytest.mark.parametrize("reference", ["tinyllama-1.1b", "hub:people/tiny:Q4_0"])
def test_an_unknown_name_suggests_a_pull(library: Library, reference: str) -> None:
    with pytest.raises(ModelNotFoundError) as refusal:
        resolve(reference, library)
    assert refusal.value.hint == f"promptai models pull {reference}"


def test_disk_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"x.part: No space left on device"), disk_errors(tmp_path / "x.part"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 KiB"),
        (999_000, "976 KiB"),
        (1_460_000, "1.4 MiB"),
        (64e6, "61 MiB"),
        (4.1e9, "3.82 GiB"),
        (2e12, "1,862.65 GiB"),
    ],
)
def test_sizes_are_binary_with_two_or_three_digits(size: float, text: str) -> None:
    assert readable_size(size) == text
