import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.engine import source
from promptai.engine.build import build
from promptai.engine.build_recipe import BuildRecipe
from promptai.errors import EngineError
from support_toolchain import (
    COMMIT,
    FILES,
    NAME,
    OBJECTS,
    TOP,
    VERSION,
    Watched,
    objects,
    write_archive,
    write_toolchain,
)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / f"{TOP}.tar.gz")


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment with the stand-in tools first on PATH."""
    found = write_toolchain(tmp_path / "tools")
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "engines"


def with_member(path: Path, member: tarfile.TarInfo, data: bytes = b"") -> Path:
    """The stand-in's archive with one more member."""
    write_archive(path)
    with tarfile.open(path, "r:gz") as tar:
        old = [(m, tar.extractfile(m)) for m in tar]
        contents = [(m, file.read() if file else b"") for m, file in old]
    member.size = len(data)
    with tarfile.open(path, "w:gz") as tar:
        for m, content in [*contents, (member, data)]:
            tar.addfile(m, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"{TOP}/vendor/llama.cpp/{name}")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "data"),
    [
        (tarfile.TarInfo(f"{TOP}/vendor/llama.cpp/../../../../evil"), b"x"),
        (tarfile.TarInfo(f"{TOP}/vendor/llama.cpp/../../evil"), b"x"),
        (link("out", "/etc/passwd"), b""),
        (link("out", "../../../evil"), b""),
        (link("out", "../../evil", tarfile.LNKTYPE), b""),
        (link("device", "", tarfile.CHRTYPE), b""),
    ],
    ids=["path", "path-out-of-source", "absolute-link", "relative-link", "hard-link", "device"],
)
def test_does_not_unpack_outside_the_folder(tmp_path: Path, member: tarfile.TarInfo, data: bytes) -> None:
    archive = with_member(tmp_path / "bad.tar.gz", member, data)

    with pytest.raises(EngineError, match="is damaged"):
        source.unpack(archive, tmp_path / "a" / "b" / "source", lambda _share, _text: None)

    assert not (tmp_path / "a" / "b" / "source").exists()
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda whole: whole[: len(whole) // 2], "damaged"),
        (lambda whole: whole[:60] + b"\0" * 40 + whole[100:], "damaged"),
        (lambda _: b"<html>404</html>", "damaged"),
        (lambda _: b"", "damaged"),
    ],
    ids=["cut", "altered", "page", "empty"],
)
def test_a_damaged_archive_leaves_nothing(
    tmp_path: Path, archive: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    archive.write_bytes(damage(archive.read_bytes()))

    with pytest.raises(EngineError, match=words):
        source.unpack(archive, tmp_path / "source", lambda _share, _text: None)

    assert not (tmp_path / "source").exists()


def test_refuses_an_archive_without_llama_cpp(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "other.tar.gz", {"numpy-2.0/setup.py": ""})

    with pytest.raises(EngineError, match="does not contain llama"):
        source.unpack(archive, tmp_path / "source", lambda _share, _text: None)


@pytest.mark.parametrize(
    ("top", "commit"),
    [(f"{TOP}/vendor/llama.cpp", COMMIT), ("llama.cpp-b1234", None)],
    ids=["python-package", "llama.cpp"],
)
def test_unpacks_only_what_a_build_needs(tmp_path: Path, top: str, commit: str | None) -> None:
    """From either kind of archive; the first also names the commit."""
    files = {name.replace(f"{TOP}/vendor/llama.cpp", top): text for name, text in FILES.items()}
    archive = write_archive(tmp_path / "a.tar.gz", files if commit else {n: t for n, t in files.items() if top in n})
    shares: list[float] = []

    found = source.unpack(archive, tmp_path / "source", lambda share, _text: shares.append(share))

    assert commit == found
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == [
        *("CMakeLists.txt", "LICENSE", "conversion", "convert_hf_to_gguf.py", "gguf-py", "tools"),
    ]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (BuildRecipe(), f"llama-cpp-python-{source.PINNED}-native"),
        (BuildRecipe(portable=True), f"llama-cpp-python-{source.PINNED}-portable"),
        (BuildRecipe(archive=Path("/d/llama_cpp_python-0.4.0.tar.gz")), "llama-cpp-python-0.4.0-native"),
        (BuildRecipe(archive=Path("/d/llama.cpp-b1234.tar.gz")), "llama.cpp-b1234-native"),
        (BuildRecipe(archive=Path("my source (new).tgz")), "my-source-new-native"),
    ],
)
def test_an_engine_is_named_after_its_source(recipe: BuildRecipe, name: str) -> None:
    assert name == recipe.name


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-in archive as the only index of pip."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return write_archive(folder / f"{TOP}.tar.gz")


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_does_not_fetch_a_file_with_another_checksum(mirror: Path, engines: Path) -> None:
    """The checksum is compared before the file is opened."""
    with pytest.raises(EngineError, match="pip could not fetch llama-cpp-python"):
        build(BuildRecipe(version=VERSION, sha256="0" * 64), engines, Watched())

    assert not list(engines.rglob(mirror.name))


@pytest.mark.real
def test_fetches_through_the_users_pip_configuration(mirror: Path, engines: Path, environ: dict[str, str]) -> None:
    """Only the one file: no build system is installed, and no code of the archive runs."""
    sha256 = hashlib.sha256(mirror.read_bytes()).hexdigest()

    built = build(BuildRecipe(version=VERSION, sha256=sha256), engines, Watched())

    assert (built.name, built.archive_sha256, built.commit) == (NAME, sha256, COMMIT)
    assert len(objects(environ)) == OBJECTS
