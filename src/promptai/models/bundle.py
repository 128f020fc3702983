"""Carry models to boards without a network: bundles (a USB stick with a manifest), and plain GGUF files.

A stick that was pulled out too early holds half a model that looks like a complete one.
So a bundle's manifest lists the SHA-256 of each file, and both export and import hash
every file while copying it. A plain .gguf has no checksum to compare: its header must
be valid, and the checksum of the copy is recorded.

Names in a manifest are untrusted and checked like names from a hub.
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
_CHUNK_BYTES = 1 << 20
_RENAME = "rename the file, or remove the stored one first: promptai models remove"


class BundleEntry(msgspec.Struct, frozen=True):
    """
    One file of a bundle.

    Attributes:
        folder: Folder in the bundle, and in a library.
        file: File name in that folder.
        sidecar: Source and SHA-256.
    """

    folder: str
    file: str
    sidecar: Sidecar


class BundleManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The list of files in a bundle."""

    created: str
    models: tuple[BundleEntry, ...]
    schema: int = 1


def export(models: Sequence[StoredModel], directory: Path, progress: ProgressReporter) -> BundleManifest:
    """
    Copy models into a new or existing bundle; the manifest only ever lists complete files.

    Raises:
        ModelChecksumError: A model no longer matches its sidecar.
        ModelError: A file that is not part of the bundle has a model's name.
        LibraryError: Too little space, or the disk fails.
    """
    target = Library(directory)
    existing = read_manifest(directory)
    done = list(existing.models) if existing is not None else []
    manifest = BundleManifest(datetime.now(UTC).isoformat(timespec="seconds"), tuple(done))
    target.check_space(sum(model.bytes for model in models))
    for model in models:
        folder = model.path.parent.name
        final = target.path_for(folder, model.path.name)
        if final.exists() and (folder, model.path.name) not in {(entry.folder, entry.file) for entry in done}:
            raise ModelError(f"{final} already exists", hint="move it elsewhere, or export to another directory")
        expected = model.sidecar.sha256 if model.sidecar is not None else None
        sidecar = _copy(model.path, target, final, progress, model.sidecar, expected)
        done = [entry for entry in done if (entry.folder, entry.file) != (folder, model.path.name)]
        done.append(BundleEntry(folder, model.path.name, sidecar))
        manifest = msgspec.structs.replace(manifest, models=tuple(done))
        write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path) -> BundleManifest | None:
    """
    Read a bundle's manifest; ``None`` when the directory is not a bundle.

    Raises:
        ModelError: The manifest cannot be read, or is malformed.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=BundleManifest)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="check the stick") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a valid bundle manifest: {error}", hint="export it again") from None


def import_path(path: Path, library: Library, progress: ProgressReporter) -> Iterator[StoredModel]:
    """
    Import a bundle, every .gguf file below a directory, or one file.

    A damaged file does not stop the import; the error is raised after the others are done.

    Raises:
        ModelError: Files were rejected, or there are none.
        LibraryError: Too little space, or the disk fails.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    tasks: list[Callable[[], StoredModel]]
    if manifest is not None:
        tasks = [partial(_import_bundled, path, entry, library, progress) for entry in manifest.models]
    else:
        tasks = [partial(import_file, file, library, progress) for file in _gguf_files(path)]
    rejected: list[ModelError] = []
    for task in tasks:
        try:
            yield task()
        except LibraryError:
            raise
        except ModelError as error:
            rejected.append(error)
            if len(tasks) > 1:
                progress.notify(f"rejected: {error}")
    if rejected and len(tasks) == 1:
        raise rejected[0]
    if rejected:
        raise ModelError(f"{len(rejected)} of {len(tasks)} files in {path} were rejected", hint="see the reasons above")


def _import_bundled(directory: Path, entry: BundleEntry, library: Library, progress: ProgressReporter) -> StoredModel:
    """Import one file of a bundle, checking it against the manifest."""
    source = Library(directory).path_for(entry.folder, entry.file)
    final = library.path_for(entry.folder, entry.file)
    existing = _stored_at(final, library)
    if existing is not None:
        same = (entry.sidecar.sha256, entry.sidecar.bytes)
        if existing.sidecar is None or (existing.sidecar.sha256, existing.bytes) != same:
            raise ModelError(f"another model is stored as {existing.name}", hint=_RENAME)
        return existing
    read_header(source)
    library.check_space(entry.sidecar.bytes)
    sidecar = _copy(source, library, final, progress, entry.sidecar, entry.sidecar.sha256)
    return StoredModel(final, sidecar.bytes, sidecar)


def import_file(path: Path, library: Library, progress: ProgressReporter) -> StoredModel:
    """
    Copy a model file into the library; a file that is already in it only gets a sidecar.

    Raises:
        ModelError: The file is not a complete GGUF, or another model has its name.
        LibraryError: Too little space, or the disk fails.
    """
    size = read_header(path).file_bytes
    existing = _stored_at(path, library)
    final = library.path_for("imported", path.name) if existing is None else path
    existing = existing or _stored_at(final, library)
    if existing is None:
        library.check_space(size)
        _copy(path, library, final, progress, None, None)
    else:
        progress.begin(f"checking {path.name}", size)
        with disk_errors(path), path.open("rb") as file:
            found = hash_into(hashlib.sha256(), file, progress)
        if existing.sidecar is None and final == path:
            library.write_sidecar(existing.path, _plain_sidecar(path, found, size))
        elif existing.sidecar is None or existing.sidecar.sha256 != found:
            raise ModelError(f"another model is stored as {existing.name}", hint=_RENAME)
    stored = _stored_at(final, library)
    assert stored is not None  # noqa: S101  copied or found just above
    return stored


def _stored_at(path: Path, library: Library) -> StoredModel | None:
    return next((model for model in library.models() if model.path.resolve() == path.resolve()), None)


def _gguf_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*.gguf") if file.is_file())
    if not found:
        raise ModelNotFoundError(f"no .gguf files in {path}", hint="give the directory that contains them")
    return found


def _copy(
    source: Path,
    target: Library,
    final: Path,
    progress: ProgressReporter,
    sidecar: Sidecar | None,
    expected: str | None,
) -> Sidecar:
    """Copy, hash and check a file before it gets its final name; a failed copy is deleted."""
    part_path = final.with_name(f"{final.name}.{os.getpid()}{PART}")  # unique: two imports may run at once
    digest = hashlib.sha256()
    with disk_errors(part_path):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with source.open("rb") as file, part_path.open("wb") as part:
                fcntl.flock(part, fcntl.LOCK_EX)  # Library.clean() skips locked files
                progress.begin(f"copying {final.name}", os.fstat(file.fileno()).st_size)
                while chunk := file.read(_CHUNK_BYTES):
                    part.write(chunk)
                    digest.update(chunk)
                    progress.advance(len(chunk))
                found = digest.hexdigest()
                if expected is not None and found != expected:
                    raise ModelChecksumError(
                        f"{source} is damaged: SHA-256 {found[:12]}…, expected {expected[:12]}…",
                        hint="copy it again from its source",
                    )
                written = (
                    msgspec.structs.replace(sidecar, bytes=part.tell(), verified_at=now())
                    if sidecar is not None
                    else _plain_sidecar(source, found, part.tell())
                )
                target.store(part, final, written)
        finally:
            part_path.unlink(missing_ok=True)
    return written


def _plain_sidecar(path: Path, sha256: str, size: int) -> Sidecar:
    return Sidecar(
        source="import", file=path.name, bytes=size, sha256=sha256, fetched_at=now(), verified_at=now(), promised=False
    )
