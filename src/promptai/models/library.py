"""The library: a directory of downloaded models, each with a sidecar that records its source and checksum.

``LIBRARY/OWNER--NAME/FILE.gguf`` has a sidecar ``FILE.gguf.json``. A file gets a name
ending in ``.gguf`` only once it is complete and checked; until then it has another
name, so a power cut leaves a partial file and never half a model. Files that the user
put there are listed as unverified and left untouched.

Names from a hub or a bundle are untrusted: ``Library.path_for`` is the only way from a
name to a path, and it never returns a path outside the library.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from promptai.errors import LibraryError, ModelChecksumError, ModelError, ModelNotFoundError

PART = ".part"
REJECTED = ".wrong-checksum"
_MIB, _GIB = 1 << 20, 1 << 30
_CHUNK_BYTES = 1 << 20
#: Room for sidecars and directories, so that a download never fills the file system completely.
_SPARE_BYTES = 1 << 20
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\:]")


class Sidecar(msgspec.Struct, frozen=True):
    """
    The origin of a stored model, as a JSON file beside it.

    Attributes:
        source: ``hub:owner/name:file``, a URL, or ``import``.
        file: File name at the source.
        bytes: File size.
        sha256: The source's checksum; where the source gives none, the checksum of the bytes received.
        fetched_at: When the model was stored, UTC.
        verified_at: When the file was last compared with ``sha256``, UTC.
        promised: Whether ``sha256`` comes from the source; otherwise it only proves "unchanged since".
        repository: ``owner/name`` on the hub; ``None`` for other sources.
        revision: The hub's commit; ``None`` for other sources.
        licence: As declared by the repository; ``None`` when unknown.
        catalog: Catalogue id; ``None`` when the model was not requested by it.
    """

    source: str
    file: str
    bytes: int
    sha256: str
    fetched_at: str
    verified_at: str
    promised: bool = False
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None
    catalog: str | None = None


class StoredModel(msgspec.Struct, frozen=True):
    """
    A model file in the library.

    Attributes:
        bytes: Size on disk.
        sidecar: ``None`` for an unverified file that the user put there.
    """

    path: Path
    bytes: int
    sidecar: Sidecar | None

    @property
    def name(self) -> str:
        """``folder/file``, unique in the library."""
        return f"{self.path.parent.name}/{self.path.name}"


class ProgressReporter(Protocol):
    """Receives the progress of copying, hashing and downloading."""

    def begin(self, what: str, total: int | None, done: int = 0) -> None:
        """Start a task of ``total`` bytes (``None``: unknown), ``done`` of which are complete."""

    def advance(self, size: int) -> None:
        """Count ``size`` more bytes as done."""

    def notify(self, line: str) -> None:
        """Show a message to the user."""


class Library:
    """
    A directory of models, which need not exist yet.

    Args:
        free: Returns the bytes free on a path's file system; ``None`` for the system's own figure.
    """

    def __init__(self, root: Path, *, free: Callable[[Path], int] | None = None) -> None:
        self.root = root
        self._free = free or (lambda path: shutil.disk_usage(path).free)

    def models(self) -> list[StoredModel]:
        """Return every ``.gguf`` file, sorted by path."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError):  # race: removed since it was listed
                found += [self._load(path)] if path.suffix == ".gguf" else []
        return found

    def leftovers(self) -> list[Path]:
        """Return partial downloads, and files rejected for their checksum."""
        return [path for path in self._files() if path.name.endswith((PART, REJECTED))]

    def matches(self, name: str) -> list[StoredModel]:
        """Return models by catalogue id, source, ``folder/file``, file name or stem, ignoring case."""
        wanted = name.casefold()

        def names(model: StoredModel) -> set[str]:
            found = {model.name, model.path.name, model.path.stem}
            if model.sidecar is not None:
                found |= {model.sidecar.source, model.sidecar.catalog or model.name}
            return {alias.casefold() for alias in found}

        return [model for model in self.models() if wanted in names(model)]

    def find(self, name: str) -> StoredModel | None:
        """
        Return the model with this name; ``None`` when the library has none.

        Raises:
            ModelError: Several models match.
        """
        found = self.matches(name)
        if len(found) > 1:
            raise ModelError(
                f"'{name}' matches several models: {', '.join(model.name for model in found)}",
                hint="give one of these names in full",
            )
        return found[0] if found else None

    def path_for(self, folder: str, file: str) -> Path:
        """
        Return the path of a model file in the library.

        Raises:
            ModelError: ``folder`` or ``file`` is not a safe file name, or ``file`` does not end in ``.gguf``.
        """
        for name in (folder, file):
            if not name or name.startswith(".") or _UNSAFE.search(name) or len(name.encode(errors="replace")) > 200:
                raise ModelError(f"{name[:80]!r} is not a safe file name", hint="rename it at its source")
        if not file.endswith(".gguf"):
            raise ModelError(f"{file[:80]!r} does not end in .gguf", hint="the library stores GGUF files only")
        return self.root / folder / file

    def check_space(self, needed: int) -> None:
        """
        Check that ``needed`` bytes fit on the library's file system, with some to spare.

        Raises:
            LibraryError: Too little space is free; gives both figures.
        """
        free, needed = self.free_bytes(), needed + _SPARE_BYTES
        if needed > free:
            missing = readable_size(needed - free)
            raise LibraryError(
                f"{self.root} has {readable_size(free)} free, {missing} too little for {readable_size(needed)}",
                hint="remove models (see promptai models disk), or set PROMPTAI_MODELS to a larger disk",
            )

    def free_bytes(self) -> int:
        """Return the bytes free on the library's file system."""
        return self._free(next(path for path in (self.root, *self.root.absolute().parents) if path.exists()))

    def store(self, part: BinaryIO, final: Path, sidecar: Sidecar) -> StoredModel:
        """
        Give a complete, checked file its final name; writes the sidecar first, so no model ever lacks one.

        Raises:
            LibraryError: The file cannot be synced or renamed, or its sidecar cannot be written.
        """
        with disk_errors(final):
            part.flush()
            os.fsync(part.fileno())
            self.write_sidecar(final, sidecar)
            Path(part.name).replace(final)
            _sync_directory(final.parent)
        return self._load(final)

    def write_sidecar(self, final: Path, sidecar: Sidecar) -> None:
        """Write the sidecar of the model at ``final``, atomically."""
        write_json(sidecar_path(final), sidecar)

    def remove(self, model: StoredModel) -> None:
        """Delete a model, its sidecar, and their folder if it is then empty."""
        with disk_errors(model.path):
            model.path.unlink()
            sidecar_path(model.path).unlink(missing_ok=True)
        if model.path.parent != self.root:
            with contextlib.suppress(OSError):
                model.path.parent.rmdir()

    def verify(self, model: StoredModel, progress: ProgressReporter) -> StoredModel:
        """
        Compare a model with its checksum, and record the time in its sidecar.

        Raises:
            ModelChecksumError: Size or checksum differ.
            ModelError: The model has no sidecar.
        """
        if model.sidecar is None:
            raise ModelError(f"{model.name} has no recorded checksum", hint="promptai models import records one")
        if model.bytes != model.sidecar.bytes:
            raise ModelChecksumError(
                f"{model.name} is damaged: {model.bytes:,} bytes, expected {model.sidecar.bytes:,}",
                hint="remove it and pull it again",
            )
        progress.begin(f"checking {model.name}", model.bytes)
        with disk_errors(model.path), model.path.open("rb") as file:
            # Drop the page cache: verify the SD card's content, not a copy in memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hash_into(hashlib.sha256(), file, progress)
        if found != model.sidecar.sha256:
            raise ModelChecksumError(
                f"{model.name} is damaged: SHA-256 {found[:12]}…, expected {model.sidecar.sha256[:12]}…",
                hint="remove it and pull it again; check the SD card",
            )
        self.write_sidecar(model.path, msgspec.structs.replace(model.sidecar, verified_at=now()))
        return self._load(model.path)

    def clean(self) -> tuple[int, list[Path]]:
        """Delete leftovers; returns the bytes freed, and the files skipped because a process is writing them."""
        freed, busy = 0, []
        for path in self.leftovers():
            with disk_errors(path), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    busy.append(path)
                    continue
                freed += path.stat().st_size
                path.unlink()
        return freed, busy

    def _files(self) -> Iterator[Path]:
        """Iterate over the files in the library and its folders; skips unreadable folders."""
        for folder in (self.root, *_entries(self.root, Path.is_dir)):
            yield from _entries(folder, Path.is_file)

    def _load(self, path: Path) -> StoredModel:
        try:
            sidecar = msgspec.json.decode(sidecar_path(path).read_bytes(), type=Sidecar)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            sidecar = None
        return StoredModel(path, path.stat().st_size, sidecar)


def resolve(reference: str, library: Library) -> Path:
    """
    Return the file that a reference names: an existing path, else a model of the library.

    A missing file whose name looks like a path is returned as it is: the reader's error is more specific.

    Raises:
        ModelNotFoundError: Neither a path nor the library has it.
        ModelError: Several models of the library match.
    """
    path = Path(reference)
    if os.path.lexists(path):
        return path
    model = library.find(reference)
    if model is not None:
        return model.path
    if not reference.startswith("hub:") and (path.suffix == ".gguf" or "/" in reference):
        return path
    raise ModelNotFoundError(
        f"no model named '{reference}' in this directory or in {library.root}",
        hint=f"promptai models pull {reference}",
    )


def write_json(path: Path, value: msgspec.Struct) -> None:
    """
    Write a JSON file atomically: it gets its name only once it is complete.

    Raises:
        LibraryError: The file cannot be written.
    """
    part = path.with_name(f".{path.name}{PART}")
    with disk_errors(path):
        try:
            with part.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def sidecar_path(model: Path) -> Path:
    """Return the path of a model's sidecar."""
    return model.with_name(f"{model.name}.json")


def hash_into(digest: "hashlib._Hash", file: BinaryIO, progress: ProgressReporter) -> str:
    """Feed the rest of a file to ``digest``; returns the hexadecimal digest."""
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        progress.advance(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path, *, hint: str = "check the disk and its permissions") -> Iterator[None]:
    """Translate ``OSError`` into ``LibraryError``."""
    try:
        yield
    except OSError as error:
        raise LibraryError(f"{path}: {error.strerror or error}", hint=hint) from None


def readable_size(size: float) -> str:
    """Format a number of bytes as ``1.12 GiB``, ``640 MiB``, ``1.5 MiB`` or ``12 KiB``."""
    if size >= _GIB:
        return f"{size / _GIB:,.2f} GiB"
    if size >= _MIB:
        return f"{size / _MIB:.{0 if size >= 10 * _MIB else 1}f} MiB"
    return f"{size / 1024:.0f} KiB"


def now() -> str:
    """Return the current time in the sidecars' format: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _entries(folder: Path, kind: Callable[[Path], bool]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if kind(path))
    except OSError:
        return []


def _sync_directory(folder: Path) -> None:
    """Write a directory to disk: a rename survives a power cut only after that."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
