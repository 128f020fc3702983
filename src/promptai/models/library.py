"""Models that are kept on this machine: one directory, and beside each file where it came from.

``LIBRARY/OWNER--NAME/FILE.gguf`` has a sidecar ``FILE.gguf.json`` with source and
SHA-256. A name ends in ``.gguf`` only when the file is whole and checked: everything on
its way has another name, so that a power cut leaves a leftover and never half a model.
Files that somebody else put there are listed as unverified and left alone.

Names from a hub or a bundle are text of strangers: ``Library.place`` is the one way
from a name to a path, and no path of its leads out of the library.
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
WRONG = ".wrong-checksum"
_PIECE_BYTES = 1 << 20
#: Sidecars and directories want a little too; a file system that is full to the last byte helps nobody.
_SPARE_BYTES = 1 << 20
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\:]")


class Sidecar(msgspec.Struct, frozen=True):
    """
    Where a kept model came from; a JSON file beside it.

    Attributes:
        source: What it was asked for as: ``hub:owner/name:file``, a URL, or ``import``.
        file: Its name at the source.
        bytes: Its size.
        sha256: Its checksum: the source's where it gave one, else what arrived.
        fetched_at: When it was kept, UTC.
        verified_at: When its bytes were last compared with ``sha256``, UTC.
        promised: Whether the source gave the checksum, so that it proves more than "unchanged since".
        repository: ``owner/name`` on the hub.
        revision: The hub's commit.
        licence: As the repository says.
        catalog: Its id in the catalogue.
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


class Kept(msgspec.Struct, frozen=True):
    """
    A model file in the library.

    Attributes:
        path: Where it lies.
        bytes: Its size on disk.
        sidecar: Where it came from; ``None``: a stranger's file, unverified.
    """

    path: Path
    bytes: int
    sidecar: Sidecar | None

    @property
    def name(self) -> str:
        """Folder and file, as it is told apart from every other."""
        return f"{self.path.parent.name}/{self.path.name}"


class Watch(Protocol):
    """Who is told how a long copy goes."""

    def begin(self, what: str, total: int | None, done: int = 0) -> None:
        """A stretch of work begins; ``total`` bytes, ``done`` of them already there."""

    def advance(self, size: int) -> None:
        """``size`` more bytes are done."""

    def say(self, line: str) -> None:
        """Something that a person wants to know."""


class Library:
    """
    A directory of models; need not exist.

    Args:
        free: Bytes left on the file system of a path.
    """

    def __init__(self, root: Path, *, free: Callable[[Path], int] | None = None) -> None:
        self.root = root
        self._free = free or (lambda path: shutil.disk_usage(path).free)

    def models(self) -> list[Kept]:
        """Everything that ends in ``.gguf``, sorted by path."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError):  # removed in this moment
                found += [self._kept(path)] if path.suffix == ".gguf" else []
        return found

    def leftovers(self) -> list[Path]:
        """Partial downloads and files that were refused."""
        return [path for path in self._files() if path.name.endswith((PART, WRONG))]

    def matches(self, name: str) -> list[Kept]:
        """Every model that a name may mean: catalogue id, source, ``folder/file``, file, stem; in any capitals."""
        wanted = name.casefold()

        def names(kept: Kept) -> set[str]:
            own = {kept.name, kept.path.name, kept.path.stem}
            if kept.sidecar is not None:
                own |= {kept.sidecar.source, kept.sidecar.catalog or kept.name}
            return {one.casefold() for one in own}

        return [kept for kept in self.models() if wanted in names(kept)]

    def find(self, name: str) -> Kept | None:
        """
        The one model that a name means; ``None``: there is none.

        Raises:
            ModelError: It may mean several.
        """
        found = self.matches(name)
        if len(found) > 1:
            raise ModelError(
                f"{name} may mean {', '.join(kept.name for kept in found)}", hint="give one of these names in full"
            )
        return found[0] if found else None

    def place(self, folder: str, file: str) -> Path:
        """
        Where a model belongs.

        Raises:
            ModelError: A name is not one plain name of a file.
        """
        for name in (folder, file):
            if not name or name.startswith(".") or _UNSAFE.search(name) or len(name.encode(errors="replace")) > 200:
                raise ModelError(f"{name[:80]!r} is no safe name for a file", hint="rename it at its source")
        if not file.endswith(".gguf"):
            raise ModelError(f"{file[:80]!r} does not end in .gguf", hint="only GGUF files are kept")
        return self.root / folder / file

    def check_space(self, needed: int) -> None:
        """
        Refuse to begin what would not fit.

        Raises:
            LibraryError: With what is needed and what is free.
        """
        free, needed = self.free_bytes(), needed + _SPARE_BYTES
        if needed > free:
            missing = gigabytes(needed - free)
            raise LibraryError(
                f"{self.root} has {gigabytes(free)} free, {missing} too little for {gigabytes(needed)}",
                hint="see promptai models disk, remove something, or set PROMPTAI_MODELS to a larger disk",
            )

    def free_bytes(self) -> int:
        """Bytes left where the library is or would be."""
        return self._free(next(path for path in (self.root, *self.root.absolute().parents) if path.exists()))

    def keep(self, part: BinaryIO, final: Path, sidecar: Sidecar) -> Kept:
        """
        Give a whole, checked file its name; the sidecar comes first, so that no model is ever without.

        Raises:
            LibraryError: The disk refuses.
        """
        with disk_errors(final):
            part.flush()
            os.fsync(part.fileno())
            self.note(final, sidecar)
            Path(part.name).replace(final)
            _sync_directory(final.parent)
        return self._kept(final)

    def note(self, final: Path, sidecar: Sidecar) -> None:
        """Write a sidecar, whole."""
        write_json(sidecar_path(final), sidecar)

    def remove(self, kept: Kept) -> None:
        """Delete a model and its sidecar, and their folder when nothing else is in it."""
        with disk_errors(kept.path):
            kept.path.unlink()
            sidecar_path(kept.path).unlink(missing_ok=True)
        if kept.path.parent != self.root:
            with contextlib.suppress(OSError):
                kept.path.parent.rmdir()

    def verify(self, kept: Kept, watch: Watch) -> Kept:
        """
        Compare a model's bytes with its sidecar, and note the time.

        Raises:
            ModelChecksumError: They differ.
            ModelError: It has no sidecar to be compared with.
        """
        if kept.sidecar is None:
            raise ModelError(f"{kept.name} has no checksum beside it", hint="promptai models import notes one")
        if kept.bytes != kept.sidecar.bytes:
            raise ModelChecksumError(
                f"{kept.name} is damaged: {kept.bytes:,} bytes, should be {kept.sidecar.bytes:,}",
                hint="remove it and pull it again",
            )
        watch.begin(f"checking {kept.name}", kept.bytes)
        with disk_errors(kept.path), kept.path.open("rb") as file:
            # The question is what the card gives back, not what memory still holds.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hash_into(hashlib.sha256(), file, watch)
        if found != kept.sidecar.sha256:
            raise ModelChecksumError(
                f"{kept.name} is damaged: SHA-256 {found[:12]}…, should be {kept.sidecar.sha256[:12]}…",
                hint="remove it and pull it again; check the SD card",
            )
        self.note(kept.path, msgspec.structs.replace(kept.sidecar, verified_at=now()))
        return self._kept(kept.path)

    def clean(self) -> tuple[int, list[Path]]:
        """Delete what is left over; bytes freed, and what is being written right now and stays."""
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
        """Files in the library and its folders; what cannot be read is left out."""
        for folder in (self.root, *_entries(self.root, Path.is_dir)):
            yield from _entries(folder, Path.is_file)

    def _kept(self, path: Path) -> Kept:
        try:
            sidecar = msgspec.json.decode(sidecar_path(path).read_bytes(), type=Sidecar)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            sidecar = None
        return Kept(path, path.stat().st_size, sidecar)


def resolve(reference: str, library: Library) -> Path:
    """
    The file that a person means: a path that exists, else a model of the library.

    What looks like a path stays one, so that whoever reads it says what is wrong with it.

    Raises:
        ModelNotFoundError: It is neither.
    """
    path = Path(reference)
    if os.path.lexists(path):
        return path
    kept = library.find(reference)
    if kept is not None:
        return kept.path
    if not reference.startswith("hub:") and (path.suffix == ".gguf" or "/" in reference):
        return path
    raise ModelNotFoundError(
        f"there is no model {reference}, neither here nor in {library.root}", hint=f"promptai models pull {reference}"
    )


def write_json(path: Path, value: msgspec.Struct) -> None:
    """
    Write a JSON file that appears under its name only when it is whole.

    Raises:
        LibraryError: The disk refuses.
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
    """Where a model's sidecar lies."""
    return model.with_name(f"{model.name}.json")


def hash_into(digest: "hashlib._Hash", file: BinaryIO, watch: Watch) -> str:
    """Hash a file to its end."""
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
        watch.advance(len(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path, *, hint: str = "check the disk and its permissions") -> Iterator[None]:
    """Turn what a disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise LibraryError(f"{path}: {error.strerror or error}", hint=hint) from None


def gigabytes(size: float) -> str:
    """``1.12 GB``, ``640 MB``, ``1.5 MB``, ``12 kB``: decimal, as download pages and SD cards count."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.{0 if size >= 10e6 else 1}f} MB"
    return f"{size / 1e3:.0f} kB"


def now() -> str:
    """The time as sidecars have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _entries(folder: Path, kind: Callable[[Path], bool]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if kind(path))
    except OSError:
        return []


def _sync_directory(folder: Path) -> None:
    """A rename outlives a power cut only when the directory was written too."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
