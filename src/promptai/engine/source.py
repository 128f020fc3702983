"""Fetch and unpack the source of llama.cpp, through pip.

A board that can reach a package mirror often reaches nothing else. So the source comes through pip, with the user's
own mirrors, proxies and certificates: the source package of ``llama-cpp-python`` contains all of llama.cpp. Its version
and SHA-256 are pinned here, and pip refuses any other file before opening it.

Fetching runs no code of the archive. pip needs a package's metadata even for a download, and would install and run the
package's build system to get it; instead it gets a build backend of ours, which knows name and version (``_BACKEND``).

Only the parts that a build needs are unpacked: no models, tests or images, and no link or path out of the folder.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import msgspec

from promptai.engine.command_log import failure_lines, run_logged
from promptai.errors import EngineError

#: Called with the finished share, 0 to 1, and a detail for the user.
Share = Callable[[float, str], None]


class Release(msgspec.Struct, frozen=True):
    """The SHA-256 and size of a source package that was reviewed."""

    sha256: str
    archive_bytes: int


#: The release that is built by default.
PINNED = "0.3.36"
RELEASES = {
    PINNED: Release("832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e", 76_589_250),
}
#: Peak size of the archive, pip's copy of it, and the files that pip unpacks.
FETCH_BYTES = 400_000_000

_PACKAGE = "llama-cpp-python"
#: Large parts of llama.cpp that neither its build nor its converter reads.
_UNNEEDED = ("models", "docs", "media", "benches", "examples", "tests", "pocs", "ci", ".github", ".git")
#: Kept with a finished engine: the converter and the licences.
CONVERTER = ("conversion", "gguf-py", "requirements", "licenses", "LICENSE")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_BACKEND = """\
from pathlib import Path


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder, "llama_cpp_python-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {version}\\n")
    return info.name
"""


def fetch(version: str, sha256: str, folder: Path, *, log: Path, share: Share, keep_open: tuple[int, ...]) -> Path:
    """
    Download a release's source package into ``folder``.

    Args:
        share: Called with the downloaded share.

    Raises:
        EngineError: pip could not fetch it, or its SHA-256 is wrong.
    """
    scratch = folder / "pip"
    shutil.rmtree(scratch, ignore_errors=True)
    backend = scratch / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build.py").write_text(_BACKEND.format(version=version))
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{_PACKAGE}=={version} --hash=sha256:{sha256}\n")
    expected = RELEASES[version].archive_bytes if version in RELEASES else None

    def look() -> None:
        here = 0
        with contextlib.suppress(FileNotFoundError):  # pip may remove its folders meanwhile
            here = max((path.stat().st_size for path in scratch.glob("pip-*/*.tar.gz")), default=0)
        if expected and here:
            share(min(1.0, here / expected), f"{here / 2**20:.0f} of {expected / 2**20:.0f} MiB")

    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
        *("--disable-pip-version-check", "--progress-bar", "off", "--no-binary", _PACKAGE),
        *("--dest", str(scratch / "got"), "--requirement", str(wanted)),
    ]
    # pip's temporary folder is on the disk whose space was checked: /tmp is memory on many boards.
    environ = {"PYTHONPATH": str(backend.parent), "TMPDIR": str(scratch)}
    code = run_logged(command, log=log, seen=lambda _: None, tick=look, environ=environ, keep_open=keep_open)
    got = list((scratch / "got").glob("*.tar.gz"))
    if code != 0 or len(got) != 1:
        raise _unfetched(version, log)
    archive = got[0].replace(folder / got[0].name)
    shutil.rmtree(scratch)
    verify(archive, sha256)
    return archive


def verify(archive: Path, sha256: str | None) -> str:
    """
    Return the SHA-256 of an archive.

    Raises:
        EngineError: The archive cannot be read, or its SHA-256 is not ``sha256``.
    """
    try:
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"cannot read archive {archive}: {error.strerror}", hint="check the path") from None
    if sha256 is not None and found != sha256:
        raise EngineError(
            f"archive {archive} has SHA-256 {found} instead of {sha256}",
            hint="do not use it: it is another release, or was damaged or altered on the way; fetch it again",
        )
    return found


def release_of(archive: Path) -> str | None:
    """Return the llama-cpp-python version in an archive's name; ``None`` for other sources of llama.cpp."""
    match = re.fullmatch(r"llama_cpp_python-([0-9][0-9A-Za-z.]*)\.tar\.gz", archive.name)
    return match[1] if match else None


def unpack(archive: Path, folder: Path, share: Share) -> str | None:
    """
    Unpack llama.cpp from an archive into ``folder``, which appears only when it is complete.

    Args:
        archive: A source package of llama-cpp-python, or an archive of llama.cpp itself.

    Returns:
        The commit of llama.cpp; ``None``: not recorded in the archive.

    Raises:
        EngineError: The archive is damaged, or does not contain llama.cpp.
    """
    if not hasattr(tarfile, "data_filter"):
        raise EngineError("this Python cannot unpack archives safely", hint="use Python 3.11.4 or newer")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    commit = None
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
            total = os.fstat(raw.fileno()).st_size
            for member, inside in _members(tar):
                if inside is None:
                    commit = _commit(tar, member) or commit
                else:
                    tar.extract(member.replace(name=inside, deep=False), part, set_attrs=True, filter="data")
                share(min(1.0, raw.tell() / total), "")
    except (tarfile.TarError, zlib.error, EOFError, KeyError, ValueError) as error:
        raise EngineError(f"archive {archive} is damaged: {error}", hint="fetch it again") from None
    except OSError as error:
        # zlib and lzma report damaged data as an OSError without a number.
        reason = error.strerror or f"it is damaged: {error}"
        raise EngineError(f"cannot unpack archive {archive}: {reason}", hint="check the free disk space") from None
    if not (part / "tools" / "server" / "CMakeLists.txt").is_file():
        raise EngineError(
            f"archive {archive} does not contain llama.cpp with its server",
            hint=f"use the source package of {_PACKAGE} or an archive of llama.cpp",
        )
    part.replace(folder)
    return commit


def keep_converter(source: Path, folder: Path) -> None:
    """Copy the converter and the licences into ``folder``, which appears only when it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in [*source.glob("convert_*.py"), *(source / name for name in CONVERTER)]:
        if path.is_dir():
            shutil.copytree(path, part / path.name)
        elif path.exists():
            shutil.copy2(path, part / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Yield the members to unpack with their path inside llama.cpp; ``None`` for the file that names the commit."""
    for member in tar:
        top, *rest = PurePosixPath(member.name).parts or ("",)
        if top.startswith("llama_cpp_python-"):
            if rest[:4] == [".git", "modules", "vendor", "llama.cpp"] and rest[4:] == ["HEAD"]:
                yield member, None
            if rest[:2] != ["vendor", "llama.cpp"]:
                continue
            rest = rest[2:]
        if rest and rest[0] not in _UNNEEDED:
            yield member, "/".join(rest)


def _commit(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    file = tar.extractfile(member)
    text = file.read(100).decode("ascii", "replace").strip() if file is not None else ""
    return text if _COMMIT.match(text) else None


def _unfetched(version: str, log: Path) -> EngineError:
    reasons = failure_lines(log.read_text(errors="replace"))
    reason = reasons[-1] if reasons else "no output"
    if "No module named pip" in reason:
        return EngineError(
            "cannot fetch the source: this Python has no pip", hint="run python -m ensurepip, or use --from"
        )
    return EngineError(
        f"pip could not fetch {_PACKAGE} {version}: {reason}",
        hint=f"see {log}; without a network, copy the file here and use --from",
    )
