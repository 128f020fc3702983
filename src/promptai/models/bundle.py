"""Models for boards without a link: a directory (a USB stick) with a manifest, and plain files from anywhere.

A stick that was pulled out too early holds half a model that looks like a whole one.
So a bundle says of each file what its SHA-256 is, and nothing is kept, here or there,
that was not hashed on its way. A plain .gguf has no checksum to be held against; its
header must be whole, and what arrived is noted.

Names in a manifest are a stranger's text: each is checked as if it came from a hub.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from promptai.errors import LibraryError, ModelChecksumError, ModelError, ModelNotFoundError
from promptai.models.gguf import read_header
from promptai.models.library import (
    PART,
    Library,
    ProgressReporter,
    Sidecar,
    StoredModel,
    disk_errors,
    hash_into,
    now,
    write_json,
)

MANIFEST = "promptai-bundle.json"
_PIECE_BYTES = 1 << 20
_RENAME = "rename the file, or remove that one first: promptai models remove"


class BundleEntry(msgspec.Struct, frozen=True):
    """
    One file of a bundle.

    Attributes:
        folder: Its folder in the bundle and in a library.
        file: Its name there.
        sidecar: Where it came from, and its SHA-256.
    """

    folder: str
    file: str
    sidecar: Sidecar


class BundleManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds."""

    created: str
    models: tuple[BundleEntry, ...]
    schema: int = 1


def export(models: Sequence[StoredModel], directory: Path, progress: ProgressReporter) -> BundleManifest:
    """
    Copy models into a bundle, or add them to the one that is there; the manifest names only what is whole.

    Raises:
        ModelChecksumError: A model is no longer what its sidecar says.
        LibraryError: There is no space, or the disk refuses.
    """
    target = Library(directory)
    there = read_manifest(directory)
    done = list(there.models) if there is not None else []
    manifest = BundleManifest(datetime.now(UTC).isoformat(timespec="seconds"), tuple(done))
    target.check_space(sum(kept.bytes for kept in models))
    for kept in models:
        folder = kept.path.parent.name
        final = target.path_for(folder, kept.path.name)
        if final.exists() and (folder, kept.path.name) not in {(one.folder, one.file) for one in done}:
            raise ModelError(f"{final} is in the way", hint="move it elsewhere, or export to another directory")
        promised = kept.sidecar.sha256 if kept.sidecar is not None else None
        sidecar = _copy(kept.path, target, final, progress, kept.sidecar, promised)
        done = [one for one in done if (one.folder, one.file) != (folder, kept.path.name)]
        done.append(BundleEntry(folder, kept.path.name, sidecar))
        manifest = msgspec.structs.replace(manifest, models=tuple(done))
        write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path) -> BundleManifest | None:
    """
    What a directory says it holds; ``None``: it is no bundle.

    Raises:
        ModelError: It says something that cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=BundleManifest)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="check the stick") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no manifest of a bundle: {error}", hint="export it again") from None


def import_path(path: Path, library: Library, progress: ProgressReporter) -> Iterator[StoredModel]:
    """
    Keep what a path means: a bundle, every .gguf in a directory and its folders, or one file.

    One damaged file does not hold up the others; it is told of when they are done.

    Raises:
        ModelError: Files were refused, or there were none.
        LibraryError: There is no space, or the disk refuses.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    tasks: list[Callable[[], StoredModel]]
    if manifest is not None:
        tasks = [partial(_import_bundled, path, one, library, progress) for one in manifest.models]
    else:
        tasks = [partial(import_file, file, library, progress) for file in _gguf_files(path)]
    refused: list[ModelError] = []
    for task in tasks:
        try:
            yield task()
        except LibraryError:
            raise
        except ModelError as error:
            refused.append(error)
            if len(tasks) > 1:
                progress.notify(f"refused: {error}")
    if refused and len(tasks) == 1:
        raise refused[0]
    if refused:
        raise ModelError(f"{len(refused)} of {len(tasks)} files in {path} were refused", hint="it says above why")


def _import_bundled(directory: Path, one: BundleEntry, library: Library, progress: ProgressReporter) -> StoredModel:
    """Keep one file of a bundle, after it was compared with the manifest."""
    origin = Library(directory).path_for(one.folder, one.file)
    final = library.path_for(one.folder, one.file)
    there = _kept_at(final, library)
    if there is not None:
        if there.sidecar is None or there.sidecar.sha256 != one.sidecar.sha256 or there.bytes != one.sidecar.bytes:
            raise ModelError(f"another model is kept as {there.name}", hint=_RENAME)
        return there
    read_header(origin)
    library.check_space(one.sidecar.bytes)
    sidecar = _copy(origin, library, final, progress, one.sidecar, one.sidecar.sha256)
    return StoredModel(final, sidecar.bytes, sidecar)


def import_file(path: Path, library: Library, progress: ProgressReporter) -> StoredModel:
    """
    Copy a model file into the library; one that lies in it already only gets its sidecar.

    Raises:
        ModelError: It is not a whole GGUF, or another model has its name.
        LibraryError: There is no space, or the disk refuses.
    """
    size = read_header(path).file_bytes
    there = _kept_at(path, library)
    final = library.path_for("imported", path.name) if there is None else path
    there = there or _kept_at(final, library)
    if there is None:
        library.check_space(size)
        _copy(path, library, final, progress, None, None)
    else:
        progress.begin(f"checking {path.name}", size)
        with disk_errors(path), path.open("rb") as file:
            found = hash_into(hashlib.sha256(), file, progress)
        if there.sidecar is None and final == path:
            library.write_sidecar(there.path, _plain_sidecar(path, found, size))
        elif there.sidecar is None or there.sidecar.sha256 != found:
            raise ModelError(f"another model is kept as {there.name}", hint=_RENAME)
    kept = _kept_at(final, library)
    assert kept is not None  # noqa: S101  it was just put there, or found there
    return kept


def _kept_at(path: Path, library: Library) -> StoredModel | None:
    return next((kept for kept in library.models() if kept.path.resolve() == path.resolve()), None)


def _gguf_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*.gguf") if file.is_file())
    if not found:
        raise ModelNotFoundError(f"there is no .gguf file in {path}", hint="give the directory that holds them")
    return found


def _copy(
    source: Path,
    target: Library,
    final: Path,
    progress: ProgressReporter,
    sidecar: Sidecar | None,
    promised: str | None,
) -> Sidecar:
    """Copy and hash a file, compare, then give it its name; nothing stays of one that differs or fails."""
    part_path = final.with_name(f"{final.name}.{os.getpid()}{PART}")  # two imports at once do not write into one
    digest = hashlib.sha256()
    with disk_errors(part_path):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with source.open("rb") as file, part_path.open("wb") as part:
                fcntl.flock(part, fcntl.LOCK_EX)  # in use, for whoever cleans up
                progress.begin(f"copying {final.name}", os.fstat(file.fileno()).st_size)
                while piece := file.read(_PIECE_BYTES):
                    part.write(piece)
                    digest.update(piece)
                    progress.advance(len(piece))
                found = digest.hexdigest()
                if promised is not None and found != promised:
                    raise ModelChecksumError(
                        f"{source} is damaged: SHA-256 {found[:12]}…, should be {promised[:12]}…",
                        hint="copy it anew from where it came",
                    )
                noted = (
                    msgspec.structs.replace(sidecar, bytes=part.tell(), verified_at=now())
                    if sidecar is not None
                    else _plain_sidecar(source, found, part.tell())
                )
                target.store(part, final, noted)
        finally:
            part_path.unlink(missing_ok=True)
    return noted


def _plain_sidecar(path: Path, sha256: str, size: int) -> Sidecar:
    return Sidecar(
        source="import", file=path.name, bytes=size, sha256=sha256, fetched_at=now(), verified_at=now(), promised=False
    )
