"""Fetch a model into the library: what a person with a slow line and a full SD card can rely on.

A download may take a night, so it survives cuts, Ctrl-C and power cuts: what has
arrived stays in a ``.part`` file whose name carries the version it is of, and the next
pull, also in another process, asks for the rest alone. The file gets its name when size
and SHA-256 are the hub's, not before; one that differs is kept aside. Space is compared
before anything is written. The lock is on the ``.part`` file itself, so that nothing is
left to clean up when a process dies, and whoever comes second waits and finds the file.

A plain URL promises no checksum: then only damage on the way to the disk is noticed.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import msgspec

from promptai.errors import HubError, HubUnreachableError, ModelChecksumError, ModelError
from promptai.models.gguf import read_header
from promptai.models.hub import open_body
from promptai.models.library import (
    PART,
    REJECTED,
    Library,
    ProgressReporter,
    StoredModel,
    disk_errors,
    hash_into,
    now,
    readable_size,
)
from promptai.models.source_selection import Download

TRIES = 5
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0


def fetch(download: Download, library: Library, progress: ProgressReporter, *, tries: int = TRIES) -> StoredModel:
    """
    Fetch an download, or find that it is here; goes on where an earlier process stopped.

    Args:
        tries: How often in a row a connection may fail without a byte partial.

    Raises:
        HubError: The source refuses, or the connection failed too often.
        ModelChecksumError: What arrived is not what was promised; it is kept aside.
        LibraryError: There is no space, or the disk refuses.
    """
    final = library.path_for(download.folder, download.name)
    kept = _existing(download, final, library, progress)
    if kept is not None:
        return kept
    part_path = _part_path(download, final)
    have = part_path.stat().st_size if part_path.exists() else 0
    library.check_space(max(0, download.sidecar.bytes - have))
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
    with _locked_part(part_path, progress) as part:
        kept = _existing(download, final, library, progress)  # somebody else may have been quicker
        if kept is not None:
            return kept
        sha256 = _receive(download, part, progress, tries)
        origin = msgspec.structs.replace(download.sidecar, bytes=part.tell(), fetched_at=now(), verified_at=now())
        if origin.sha256 and origin.sha256 != sha256:
            aside = final.with_name(final.name + REJECTED)
            with disk_errors(aside):
                part_path.replace(aside)
            raise ModelChecksumError(
                f"{download.label} arrived with SHA-256 {sha256[:12]}…, promised was {origin.sha256[:12]}…; it was refused "
                f"and lies in {aside}",
                hint="pull it again; if it happens again, the source or the disk is at fault",
            )
        try:
            read_header(part_path)
        except ModelError as error:
            if not origin.sha256:
                part_path.unlink()
                raise
            # Exactly what the source has: a newer engine may read what we do not.
            progress.notify(f"kept, although it cannot be read here: {error.message}")
        return library.store(part, final, msgspec.structs.replace(origin, sha256=sha256))


def downloaded_share(download: Download, library: Library) -> float:
    """How much of an download lies there from earlier, 0 to 1."""
    final = library.path_for(download.folder, download.name)
    part = _part_path(download, final)
    return part.stat().st_size / download.sidecar.bytes if download.sidecar.bytes and part.exists() else 0.0


def _part_path(download: Download, final: Path) -> Path:
    """Its name tells the content that it is of, so that it is never continued with another."""
    version = f"{download.url} {download.sidecar.bytes} {download.version}"
    tag = download.sidecar.sha256 or hashlib.sha256(version.encode()).hexdigest()
    return final.with_name(f"{final.name}.{tag[:12]}{PART}")


def _existing(download: Download, final: Path, library: Library, progress: ProgressReporter) -> StoredModel | None:
    """What is in the library under that name, when that will do."""
    if not final.exists():
        return None
    kept = next(kept for kept in library.models() if kept.path == final)
    if kept.sidecar is None:
        return _adopt(download, kept, library, progress)
    if kept.bytes != kept.sidecar.bytes:
        raise ModelChecksumError(f"{kept.name} is damaged", hint=f"promptai models remove {kept.name}, then pull again")
    if download.sidecar.sha256 != kept.sidecar.sha256:
        if download.sidecar.source != kept.sidecar.source:
            raise _occupied(kept, download)
        if download.sidecar.sha256:
            progress.notify(f"{kept.name} is here in another version; to get the newer one, remove it and pull again")
    elif download.sidecar.catalog not in (None, kept.sidecar.catalog):
        sidecar = msgspec.structs.replace(kept.sidecar, catalog=download.sidecar.catalog)
        library.write_sidecar(final, sidecar)
        return msgspec.structs.replace(kept, sidecar=sidecar)
    return kept


def _adopt(download: Download, kept: StoredModel, library: Library, progress: ProgressReporter) -> StoredModel:
    """A file that somebody else put there is ours if it is the same."""
    progress.begin(f"checking {kept.name}", kept.bytes)
    with disk_errors(kept.path), kept.path.open("rb") as file:
        found = hash_into(hashlib.sha256(), file, progress)
    if found != download.sidecar.sha256:
        raise _occupied(kept, download)
    sidecar = msgspec.structs.replace(download.sidecar, bytes=kept.bytes, fetched_at=now(), verified_at=now())
    library.write_sidecar(kept.path, sidecar)
    return msgspec.structs.replace(kept, sidecar=sidecar)


def _occupied(kept: StoredModel, download: Download) -> ModelError:
    return ModelError(
        f"{kept.path} is in the way and is not {download.label}", hint="move it elsewhere, then pull again"
    )


@contextlib.contextmanager
def _locked_part(path: Path, progress: ProgressReporter) -> Iterator[FileIO]:
    """The partial file, ours alone; an empty one does not stay behind."""
    while True:
        with disk_errors(path):
            part = path.open("a+b", buffering=0)
        with part:
            _lock(part, progress)
            # Whoever had it may have renamed or deleted it; then what we locked is not what that name means now.
            if not path.exists() or not os.path.samestat(os.fstat(part.fileno()), path.stat()):
                continue
            try:
                yield part
            finally:
                if path.exists() and path.stat().st_size == 0:
                    path.unlink()
            return


def _lock(part: FileIO, progress: ProgressReporter) -> None:
    with disk_errors(Path(part.name)):
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.notify("another process is fetching the same file: waiting for it")
            fcntl.flock(part, fcntl.LOCK_EX)


class _PartialFile:
    """What is there of a file that is being fetched, on disk and as a hash."""

    def __init__(self, download: Download, part: FileIO, progress: ProgressReporter) -> None:
        self._download, self._part, self._progress = download, part, progress
        self.digest = hashlib.sha256()
        self.have = part.seek(0, os.SEEK_END)
        if not download.resumable or (download.sidecar.bytes and self.have > download.sidecar.bytes):
            self.have = part.truncate(0)
        if self.have:
            progress.begin("checking what arrived earlier", self.have)
            part.seek(0)
            hash_into(self.digest, part, progress)
        progress.begin(f"fetching {download.label}", download.sidecar.bytes or None, self.have)

    def restart(self) -> None:
        """Forget everything: what comes next is the file's first byte."""
        self.have, self.digest = self._part.truncate(0), hashlib.sha256()
        self._progress.begin(f"fetching {self._download.label} from its start", self._download.sidecar.bytes or None)

    def add(self, chunk: bytes) -> None:
        """Write and hash what came."""
        view = memoryview(chunk)
        with disk_errors(Path(self._part.name), hint="free some space, then pull again: it goes on where it stopped"):
            while view:
                view = view[self._part.write(view) :]
        self.digest.update(chunk)
        self.have += len(chunk)
        self._progress.advance(len(chunk))


def _receive(download: Download, part: FileIO, progress: ProgressReporter, tries: int) -> str:
    """Bring the partial file to its end; gives its SHA-256."""
    partial, size, failed = _PartialFile(download, part, progress), download.sidecar.bytes, 0
    while not size or partial.have < size:
        before = partial.have
        try:
            _connect_once(download, partial)
            if not size:
                break
        except HubUnreachableError as error:
            failed = 0 if partial.have > before and download.resumable else failed + 1
            if failed >= tries:
                here = f"{readable_size(partial.have)} of {readable_size(size)} are here"
                raise HubUnreachableError(
                    f"{error.message}; {here}" if download.resumable else error.message,
                    hint="the same command goes on from there" if download.resumable else "try again later",
                ) from None
            pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, 2.0**failed - 1))
            progress.notify(f"{error.message}; trying again" + (f" in {pause_s:.0f} s" if failed else ""))
            time.sleep(pause_s)
            if not download.resumable:
                partial.restart()
    return partial.digest.hexdigest()


def _connect_once(download: Download, partial: _PartialFile) -> None:
    """Fetch the rest over one connection."""
    size = download.sidecar.bytes
    with open_body(download.url, label=download.label, start=partial.have, version=download.version) as body:
        if (body.total is not None and size not in (0, body.total)) or body.start not in (0, partial.have):
            raise HubError(f"{download.label} has changed at its source while it was fetched", hint="pull it again")
        if body.start != partial.have:
            partial.restart()
        for chunk in body.chunks:
            partial.add(chunk)
            if size and partial.have > size:
                raise HubError(f"{download.label} is longer than announced", hint="pull it again later")
