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
    WRONG,
    Kept,
    Library,
    Watch,
    disk_errors,
    gigabytes,
    hash_into,
    now,
)
from promptai.models.order import Order

TRIES = 5
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0


def fetch(order: Order, library: Library, watch: Watch, *, tries: int = TRIES) -> Kept:
    """
    Fetch an order, or find that it is here; goes on where an earlier process stopped.

    Args:
        tries: How often in a row a connection may fail without a byte arriving.

    Raises:
        HubError: The source refuses, or the connection failed too often.
        ModelChecksumError: What arrived is not what was promised; it is kept aside.
        LibraryError: There is no space, or the disk refuses.
    """
    final = library.place(order.folder, order.name)
    kept = _already(order, final, library, watch)
    if kept is not None:
        return kept
    part_path = _part_path(order, final)
    have = part_path.stat().st_size if part_path.exists() else 0
    library.check_space(max(0, order.origin.bytes - have))
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(part_path, watch) as part:
        kept = _already(order, final, library, watch)  # somebody else may have been quicker
        if kept is not None:
            return kept
        sha256 = _receive(order, part, watch, tries)
        origin = msgspec.structs.replace(order.origin, bytes=part.tell(), fetched_at=now(), verified_at=now())
        if origin.sha256 and origin.sha256 != sha256:
            aside = final.with_name(final.name + WRONG)
            with disk_errors(aside):
                part_path.replace(aside)
            raise ModelChecksumError(
                f"{order.what} arrived with SHA-256 {sha256[:12]}…, promised was {origin.sha256[:12]}…; it was refused "
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
            watch.say(f"kept, although it cannot be read here: {error.message}")
        return library.keep(part, final, msgspec.structs.replace(origin, sha256=sha256))


def partial_share(order: Order, library: Library) -> float:
    """How much of an order lies there from earlier, 0 to 1."""
    final = library.place(order.folder, order.name)
    part = _part_path(order, final)
    return part.stat().st_size / order.origin.bytes if order.origin.bytes and part.exists() else 0.0


def _part_path(order: Order, final: Path) -> Path:
    """Its name tells the content that it is of, so that it is never continued with another."""
    version = f"{order.url} {order.origin.bytes} {order.version}"
    tag = order.origin.sha256 or hashlib.sha256(version.encode()).hexdigest()
    return final.with_name(f"{final.name}.{tag[:12]}{PART}")


def _already(order: Order, final: Path, library: Library, watch: Watch) -> Kept | None:
    """What is in the library under that name, when that will do."""
    if not final.exists():
        return None
    kept = next(kept for kept in library.models() if kept.path == final)
    if kept.sidecar is None:
        return _adopt(order, kept, library, watch)
    if kept.bytes != kept.sidecar.bytes:
        raise ModelChecksumError(f"{kept.name} is damaged", hint=f"promptai models remove {kept.name}, then pull again")
    if order.origin.sha256 != kept.sidecar.sha256:
        if order.origin.source != kept.sidecar.source:
            raise _in_the_way(kept, order)
        if order.origin.sha256:
            watch.say(f"{kept.name} is here in another version; to get the newer one, remove it and pull again")
    elif order.origin.catalog not in (None, kept.sidecar.catalog):
        sidecar = msgspec.structs.replace(kept.sidecar, catalog=order.origin.catalog)
        library.note(final, sidecar)
        return msgspec.structs.replace(kept, sidecar=sidecar)
    return kept


def _adopt(order: Order, kept: Kept, library: Library, watch: Watch) -> Kept:
    """A file that somebody else put there is ours if it is the same."""
    watch.begin(f"checking {kept.name}", kept.bytes)
    with disk_errors(kept.path), kept.path.open("rb") as file:
        found = hash_into(hashlib.sha256(), file, watch)
    if found != order.origin.sha256:
        raise _in_the_way(kept, order)
    sidecar = msgspec.structs.replace(order.origin, bytes=kept.bytes, fetched_at=now(), verified_at=now())
    library.note(kept.path, sidecar)
    return msgspec.structs.replace(kept, sidecar=sidecar)


def _in_the_way(kept: Kept, order: Order) -> ModelError:
    return ModelError(f"{kept.path} is in the way and is not {order.what}", hint="move it elsewhere, then pull again")


@contextlib.contextmanager
def _claimed(path: Path, watch: Watch) -> Iterator[FileIO]:
    """The partial file, ours alone; an empty one does not stay behind."""
    while True:
        with disk_errors(path):
            part = path.open("a+b", buffering=0)
        with part:
            _lock(part, watch)
            # Whoever had it may have renamed or deleted it; then what we locked is not what that name means now.
            if not path.exists() or not os.path.samestat(os.fstat(part.fileno()), path.stat()):
                continue
            try:
                yield part
            finally:
                if path.exists() and path.stat().st_size == 0:
                    path.unlink()
            return


def _lock(part: FileIO, watch: Watch) -> None:
    with disk_errors(Path(part.name)):
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            watch.say("another process is fetching the same file: waiting for it")
            fcntl.flock(part, fcntl.LOCK_EX)


class _Arriving:
    """What is there of a file that is being fetched, on disk and as a hash."""

    def __init__(self, order: Order, part: FileIO, watch: Watch) -> None:
        self._order, self._part, self._watch = order, part, watch
        self.digest = hashlib.sha256()
        self.have = part.seek(0, os.SEEK_END)
        if not order.resumable or (order.origin.bytes and self.have > order.origin.bytes):
            self.have = part.truncate(0)
        if self.have:
            watch.begin("checking what arrived earlier", self.have)
            part.seek(0)
            hash_into(self.digest, part, watch)
        watch.begin(f"fetching {order.what}", order.origin.bytes or None, self.have)

    def restart(self) -> None:
        """Forget everything: what comes next is the file's first byte."""
        self.have, self.digest = self._part.truncate(0), hashlib.sha256()
        self._watch.begin(f"fetching {self._order.what} from its start", self._order.origin.bytes or None)

    def add(self, chunk: bytes) -> None:
        """Write and hash what came."""
        view = memoryview(chunk)
        with disk_errors(Path(self._part.name), hint="free some space, then pull again: it goes on where it stopped"):
            while view:
                view = view[self._part.write(view) :]
        self.digest.update(chunk)
        self.have += len(chunk)
        self._watch.advance(len(chunk))


def _receive(order: Order, part: FileIO, watch: Watch, tries: int) -> str:
    """Bring the partial file to its end; gives its SHA-256."""
    arriving, size, failed = _Arriving(order, part, watch), order.origin.bytes, 0
    while not size or arriving.have < size:
        before = arriving.have
        try:
            _connect_once(order, arriving)
            if not size:
                break
        except HubUnreachableError as error:
            failed = 0 if arriving.have > before and order.resumable else failed + 1
            if failed >= tries:
                here = f"{gigabytes(arriving.have)} of {gigabytes(size)} are here"
                raise HubUnreachableError(
                    f"{error.message}; {here}" if order.resumable else error.message,
                    hint="the same command goes on from there" if order.resumable else "try again later",
                ) from None
            pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, 2.0**failed - 1))
            watch.say(f"{error.message}; trying again" + (f" in {pause_s:.0f} s" if failed else ""))
            time.sleep(pause_s)
            if not order.resumable:
                arriving.restart()
    return arriving.digest.hexdigest()


def _connect_once(order: Order, arriving: _Arriving) -> None:
    """Fetch the rest over one connection."""
    size = order.origin.bytes
    with open_body(order.url, what=order.what, start=arriving.have, version=order.version) as body:
        if (body.total is not None and size not in (0, body.total)) or body.start not in (0, arriving.have):
            raise HubError(f"{order.what} has changed at its source while it was fetched", hint="pull it again")
        if body.start != arriving.have:
            arriving.restart()
        for chunk in body.chunks:
            arriving.add(chunk)
            if size and arriving.have > size:
                raise HubError(f"{order.what} is longer than announced", hint="pull it again later")
