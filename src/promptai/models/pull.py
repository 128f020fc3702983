"""Download a model into the library; resumes after lost connections, Ctrl-C and power cuts.

A download may take a night. Received bytes stay in a ``.part`` file whose name
identifies the version of the content, and the next pull, in any process, sends a range
request for the rest. The file gets its final name only once size and SHA-256 match the
hub's; a file that does not match is set aside. Free space is checked before anything
is written. The lock is on the ``.part`` file itself: a process that dies leaves
no lock behind, and a second process waits, then finds the finished file.

A plain URL provides no checksum; without one, only damage on the way to the disk is detected.
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
    Download a file, or return the stored one; resumes a partial download.

    Args:
        tries: Consecutive connections that may fail without delivering a byte.

    Raises:
        HubError: The source refuses the request, or the connection failed too often.
        ModelChecksumError: The checksum differs from the source's (the file is set aside), or the stored
            file is damaged.
        ModelError: Another file has this name, or a file without a checksum is not a valid GGUF.
        LibraryError: Too little space, or the disk fails.
    """
    final = library.path_for(download.folder, download.name)
    model = _existing(download, final, library, progress)
    if model is not None:
        return model
    part_path = _part_path(download, final)
    received = part_path.stat().st_size if part_path.exists() else 0
    library.check_space(max(0, download.sidecar.bytes - received))
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
    with _locked_part(part_path, progress) as part:
        model = _existing(download, final, library, progress)  # another process may have finished it meanwhile
        if model is not None:
            return model
        sha256 = _receive(download, part, progress, tries)
        sidecar = msgspec.structs.replace(download.sidecar, bytes=part.tell(), fetched_at=now(), verified_at=now())
        if sidecar.sha256 and sidecar.sha256 != sha256:
            aside = final.with_name(final.name + REJECTED)
            with disk_errors(aside):
                part_path.replace(aside)
            raise ModelChecksumError(
                f"{download.label} was rejected: SHA-256 {sha256[:12]}…, expected {sidecar.sha256[:12]}…; "
                f"the file was set aside as {aside}",
                hint="pull it again; if it happens again, the source or the disk is at fault",
            )
        try:
            read_header(part_path)
        except ModelError as error:
            if not sidecar.sha256:
                part_path.unlink()
                raise
            # The checksum matches, so the file is intact: a newer engine may support a format that we do not.
            progress.notify(f"stored, although PromptAI cannot read it: {error.message}")
        return library.store(part, final, msgspec.structs.replace(sidecar, sha256=sha256))


def downloaded_share(download: Download, library: Library) -> float:
    """Return the fraction of a file that earlier attempts have downloaded, 0 to 1."""
    final = library.path_for(download.folder, download.name)
    part = _part_path(download, final)
    return part.stat().st_size / download.sidecar.bytes if download.sidecar.bytes and part.exists() else 0.0


def _part_path(download: Download, final: Path) -> Path:
    """Return the partial file's path; its name identifies the content, so other content never resumes it."""
    version = f"{download.url} {download.sidecar.bytes} {download.version}"
    tag = download.sidecar.sha256 or hashlib.sha256(version.encode()).hexdigest()
    return final.with_name(f"{final.name}.{tag[:12]}{PART}")


def _existing(download: Download, final: Path, library: Library, progress: ProgressReporter) -> StoredModel | None:
    """Return the stored model of that name if it comes from the same source or has the same checksum."""
    if not final.exists():
        return None
    model = next(model for model in library.models() if model.path == final)
    if model.sidecar is None:
        return _adopt(download, model, library, progress)
    if model.bytes != model.sidecar.bytes:
        raise ModelChecksumError(
            f"{model.name} is damaged", hint=f"promptai models remove {model.name}, then pull again"
        )
    if download.sidecar.sha256 != model.sidecar.sha256:
        if download.sidecar.source != model.sidecar.source:
            raise _occupied(model, download)
        if download.sidecar.sha256:
            progress.notify(
                f"the library has another version of {model.name}; to get the newer one, remove it and pull again"
            )
    elif download.sidecar.catalog not in (None, model.sidecar.catalog):
        sidecar = msgspec.structs.replace(model.sidecar, catalog=download.sidecar.catalog)
        library.write_sidecar(final, sidecar)
        return msgspec.structs.replace(model, sidecar=sidecar)
    return model


def _adopt(download: Download, model: StoredModel, library: Library, progress: ProgressReporter) -> StoredModel:
    """Give a sidecar to a file that the user put there, if its checksum is the download's."""
    progress.begin(f"checking {model.name}", model.bytes)
    with disk_errors(model.path), model.path.open("rb") as file:
        found = hash_into(hashlib.sha256(), file, progress)
    if found != download.sidecar.sha256:
        raise _occupied(model, download)
    sidecar = msgspec.structs.replace(download.sidecar, bytes=model.bytes, fetched_at=now(), verified_at=now())
    library.write_sidecar(model.path, sidecar)
    return msgspec.structs.replace(model, sidecar=sidecar)


def _occupied(model: StoredModel, download: Download) -> ModelError:
    return ModelError(
        f"{model.path} already exists and is not {download.label}", hint="move it elsewhere, then pull again"
    )


@contextlib.contextmanager
def _locked_part(path: Path, progress: ProgressReporter) -> Iterator[FileIO]:
    """Open and lock the partial file; removes it at the end if it is empty."""
    while True:
        with disk_errors(path):
            part = path.open("a+b", buffering=0)
        with part:
            _lock(part, progress)
            # Race: the previous holder may have renamed or deleted the file, and we hold the lock of the old inode.
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
            progress.notify("waiting for another process that is downloading the same file")
            fcntl.flock(part, fcntl.LOCK_EX)


class _PartialFile:
    """The bytes received so far, on disk and in the running checksum."""

    def __init__(self, download: Download, part: FileIO, progress: ProgressReporter) -> None:
        self._download, self._part, self._progress = download, part, progress
        self.digest = hashlib.sha256()
        self.have = part.seek(0, os.SEEK_END)
        if not download.resumable or (download.sidecar.bytes and self.have > download.sidecar.bytes):
            self.have = part.truncate(0)
        if self.have:
            progress.begin("checking the part downloaded earlier", self.have)
            part.seek(0)
            hash_into(self.digest, part, progress)
        progress.begin(f"downloading {download.label}", download.sidecar.bytes or None, self.have)

    def restart(self) -> None:
        """Discard all bytes; the next chunk starts at the file's first byte."""
        self.have, self.digest = self._part.truncate(0), hashlib.sha256()
        self._progress.begin(f"downloading {self._download.label} from the start", self._download.sidecar.bytes or None)

    def add(self, chunk: bytes) -> None:
        """Write and hash a chunk."""
        view = memoryview(chunk)
        with disk_errors(Path(self._part.name), hint="free some space, then pull again to resume"):
            while view:
                view = view[self._part.write(view) :]
        self.digest.update(chunk)
        self.have += len(chunk)
        self._progress.advance(len(chunk))


def _receive(download: Download, part: FileIO, progress: ProgressReporter, tries: int) -> str:
    """Complete the partial file; returns its SHA-256."""
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
                received = f"{readable_size(partial.have)} of {readable_size(size)} received"
                raise HubUnreachableError(
                    f"{error.message}; {received}" if download.resumable else error.message,
                    hint="run the same command again to resume" if download.resumable else "try again later",
                ) from None
            pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, 2.0**failed - 1))
            progress.notify(f"{error.message}; retrying" + (f" in {pause_s:.0f} s" if failed else ""))
            time.sleep(pause_s)
            if not download.resumable:
                partial.restart()
    return partial.digest.hexdigest()


def _connect_once(download: Download, partial: _PartialFile) -> None:
    """Request the remaining bytes over one connection."""
    size = download.sidecar.bytes
    with open_body(download.url, label=download.label, start=partial.have, version=download.version) as body:
        if (body.total is not None and size not in (0, body.total)) or body.start not in (0, partial.have):
            raise HubError(f"{download.label} changed at its source during the download", hint="pull it again")
        if body.start != partial.have:
            partial.restart()
        for chunk in body.chunks:
            partial.add(chunk)
            if size and partial.have > size:
                raise HubError(f"{download.label} is larger than its source announced", hint="pull it again later")
