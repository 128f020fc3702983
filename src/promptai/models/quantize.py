"""Quantise a GGUF: 16 or 8 bits in, 4 bits out, with the source recorded in the result's metadata.

The origin of a downloaded 4-bit file is unknown. A file quantised here records its
source (name, type, SHA-256) and the tool in the keys ``promptai.source.*`` and
``promptai.quantized_by``. llama.cpp's ``llama-quantize`` does the work if installed;
otherwise the ``gguf`` package (``models.requantize``) writes the two simple types, slower
and with larger embeddings, and K-quants are rejected.

The result gets its name only once it is complete and its header has been read back;
an error or Ctrl-C leaves nothing behind. ``bench.agreement`` measures its quality.
Callers pass the function that runs programs (``ToolRunner``); this module starts none itself.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import msgspec

from promptai import __version__
from promptai.errors import ModelError
from promptai.models.gguf import GgufHeader, read_header
from promptai.models.library import PART, ProgressReporter, disk_errors, hash_into, readable_size
from promptai.models.requantize import OFFERED, converted, rewrite

#: Supported types -> bits per weight of the main tensor type, from ggml-common.h.
TYPES = {
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q4_k_s": 4.5,
    "q4_k_m": 4.5,
    "iq4_nl": 4.5,
    "iq4_xs": 4.25,
    "q5_0": 5.5,
    "q5_k_m": 5.5,
    "q6_k": 6.5625,
    "q8_0": 8.5,
    "f16": 16.0,
}
_SOURCES = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5}
#: llama-quantize accepts 127 bytes for a string value.
_NOTE_BYTES = 120
_TAIL_LINES = 20
_SPARE_BYTES = 16 << 20
#: Mixes with better types (Q6_K among Q4_K) take up to this factor more than the main type alone.
_MIXED = 1.12
_STEP = re.compile(r"^\[ *\d+/ *\d+\] +(\S+)")


class ToolRunner(Protocol):
    """Runs a program to completion; returns its exit code."""

    def __call__(self, command: Sequence[str], *, seen: Callable[[str], None], tick: Callable[[], None]) -> int:
        """Call ``seen`` with each line of output, and ``tick`` from time to time."""


class QuantizeResult(msgspec.Struct, frozen=True):
    """
    A quantised model.

    Attributes:
        source, result: Headers of both files.
        source_sha256: Checksum of the source file.
        by: Name and version of the tool.
    """

    source: GgufHeader
    result: GgufHeader
    source_sha256: str
    by: str


class Origin(msgspec.Struct, frozen=True):
    """The source's name as recorded in the result, and its SHA-256."""

    name: str
    sha256: str


class QuantizeTool(msgspec.Struct, frozen=True):
    """
    A ``llama-quantize`` executable.

    Attributes:
        run: Runs it.
    """

    path: Path
    run: ToolRunner

    def label_for(self, source: Path, kind: str) -> str:
        """Return the tool's name and build, which a dry run prints first; "of unknown build" without that option."""
        lines: list[str] = []
        command = [str(self.path), "--dry-run", "--allow-requantize", str(source), kind.upper()]
        self.run(command, seen=lines.append, tick=lambda: None)
        found = next((line for line in lines if line.startswith("version: ")), "")
        return f"llama-quantize {found.removeprefix('version: ') or 'of unknown build'}"


def find_program(name: str, engines: Path, *, beside: Path | None = None) -> Path | None:
    """
    Find a llama.cpp program on this machine; ``None`` when there is none.

    Searches beside ``beside``, then ``engines``, then the PATH.

    Args:
        engines: Directory of the engines built by ``promptai engine build``; the newest is preferred.
        beside: The llama-server that the user configured.
    """
    built = [path for path in engines.glob(f"*/bin/{name}") if (path.parents[1] / "engine.json").is_file()]
    built.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    # Absolute, because a name without a folder would be resolved on the PATH.
    named = [beside.absolute().with_name(name)] if beside is not None else []
    found = next((path for path in (*named, *built) if os.access(path, os.X_OK)), None)
    on_path = shutil.which(name)
    return found or (Path(on_path) if on_path is not None else None)


def check_source(header: GgufHeader, kind: str) -> None:
    """
    Check that quantising a model is worthwhile.

    Raises:
        ModelError: The model is split, already quantised, or smaller than the result would be.
    """
    if header.split is not None:
        raise ModelError(
            f"{header.path} is part {header.split[0] + 1} of {header.split[1]} of a split model",
            hint="join the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    types = {tensor.quantization for tensor in header.tensors if converted(tensor)}
    already = sorted(types - _SOURCES.keys())
    if already:
        raise ModelError(
            f"{header.path} is already quantised ({', '.join(already)}); quantising it again loses more than it saves",
            hint="start from the model's F16, BF16, F32 or Q8_0 file",
        )
    if TYPES[kind] > _SOURCES.get(header.quantization, 32.0):
        raise ModelError(
            f"{header.path} is {header.quantization}; {kind} would be larger and no better",
            hint="choose a smaller --type",
        )


def expected_bytes(header: GgufHeader, kind: str) -> int:
    """Estimate the result's size for the check of free space; errs on the high side."""
    bits = 0.0
    for tensor in header.tensors:
        weights = 8 * tensor.size_bytes / _SOURCES.get(tensor.quantization, 32.0)
        if not converted(tensor):
            bits += 8 * tensor.size_bytes
        elif tensor.shape[0] % 256 or tensor.name in ("output.weight", "token_embd.weight"):
            bits += weights * max(TYPES[kind], 8.5)
        else:
            bits += weights * TYPES[kind] * _MIXED
    return int(bits / 8) + header.data_offset


def quantize(
    source: Path,
    target: Path,
    kind: str,
    *,
    tool: QuantizeTool | None,
    progress: ProgressReporter,
    threads: int,
    origin: Origin | None = None,
) -> QuantizeResult:
    """
    Quantise ``source`` to ``kind``, into ``target``.

    Args:
        kind: One of ``TYPES``.
        tool: The llama-quantize to use; ``None`` for the ``gguf`` package.
        origin: Source to record in the result; ``None`` for the source file itself.

    Raises:
        ModelError: The source is unsuitable, the type needs llama-quantize, the disk is full, or the tool failed.
    """
    header = read_header(source)
    check_source(header, kind)
    if tool is None and kind not in OFFERED:
        raise ModelError(
            f"{kind} needs llama.cpp's llama-quantize, which is not on this machine",
            hint=f"install it with promptai engine build, or choose {', '.join(OFFERED)}",
        )
    if any(path.exists() and path.samefile(source) for path in (target, _part(target))):
        raise ModelError(f"{target} would overwrite its own source", hint="choose another name with -o")
    check_space(target, expected_bytes(header, kind))
    with atomic_output(target) as part:
        origin = origin or Origin(source.name, _hashed(source, progress))
        by = tool.label_for(source, kind) if tool is not None else f"promptai {__version__} with gguf {version('gguf')}"
        notes = provenance(origin, header.quantization, by)
        if tool is None:
            progress.begin(f"quantising to {kind}", header.tensor_bytes)
            with disk_errors(target):
                rewrite(source, header, part, kind, notes, progress.advance)
        else:
            _run_tool(tool, header, part, kind, notes, progress, threads)
        result = read_header(part)
        noted = all(result.metadata.get(key) == text for key, text in notes.items())
        if not noted or len(result.tensors) != len(header.tensors):
            raise ModelError(f"{by} dropped tensors or metadata", hint="use a newer llama.cpp: promptai engine build")
    return QuantizeResult(header, read_header(target), origin.sha256, by)


def provenance(origin: Origin, quantization: str, by: str) -> dict[str, str]:
    """Return the metadata keys that record a result's source; values are cut to a length that every tool accepts."""
    notes = {
        "promptai.source.sha256": origin.sha256,
        "promptai.source.name": origin.name,
        "promptai.source.quantization": quantization,
        "promptai.quantized_by": by,
    }
    return {key: _short(text) for key, text in notes.items()}


def check_space(target: Path, needed: int) -> None:
    """
    Check that ``needed`` bytes fit on the target's disk, with some to spare.

    Raises:
        ModelError: Too little space is free; gives both figures.
    """
    folder = next(path for path in target.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(folder).free, needed + _SPARE_BYTES
    if needed > free:
        raise ModelError(
            f"{folder} has {readable_size(free)} free, {target.name} needs about {readable_size(needed)}",
            hint="free some space, or choose another directory with -o",
        )


@contextlib.contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """
    Yield a temporary path to write; the file is renamed to ``target`` at the end of the block, or deleted on error.

    Raises:
        ModelError: Another process is writing the file, or the disk fails.
    """
    part = _part(target)
    with locked_part_file(part, target):
        yield part
        with disk_errors(target), part.open("rb") as written:
            os.fsync(written.fileno())
            part.replace(target)


@contextlib.contextmanager
def locked_part_file(part: Path, target: Path) -> Iterator[None]:
    """
    Lock and empty a partial file of ``target``; an error or Ctrl-C in the block deletes it.

    Raises:
        ModelError: Another process holds the lock, or the disk fails.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = part.open("ab")
    with lock:
        with disk_errors(target):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Race: the previous holder may have renamed or deleted the file, and we hold the old inode's lock.
                ours = part.exists() and os.path.samestat(os.fstat(lock.fileno()), part.stat())
            except BlockingIOError:
                ours = False
        if not ours:
            raise ModelError(f"another process is writing {target}", hint="wait for it to finish")
        try:
            lock.truncate(0)
            yield
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _part(target: Path) -> Path:
    return target.with_name(target.name + PART)


def _hashed(source: Path, progress: ProgressReporter) -> str:
    progress.begin(f"hashing {source.name}", source.stat().st_size)
    with disk_errors(source), source.open("rb") as file:
        return hash_into(hashlib.sha256(), file, progress)


def _run_tool(
    tool: QuantizeTool,
    header: GgufHeader,
    part: Path,
    kind: str,
    notes: Mapping[str, str],
    progress: ProgressReporter,
    threads: int,
) -> None:
    sizes = {tensor.name: tensor.size_bytes for tensor in header.tensors}
    tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def seen(line: str) -> None:
        tail.append(line)
        step = _STEP.match(line)
        if step is not None:
            progress.advance(sizes.get(step[1], 0))

    progress.begin(f"quantising to {kind}", header.tensor_bytes)
    overrides = [argument for key, text in notes.items() for argument in ("--override-kv", f"{key}=str:{text}")]
    command = [str(tool.path), "--allow-requantize", *overrides, header.path, str(part), kind.upper(), str(threads)]
    code = tool.run(command, seen=seen, tick=lambda: None)
    if code != 0:
        reason = next((line.strip() for line in reversed(tail) if line.strip()), "it printed nothing")
        raise ModelError(
            f"llama-quantize failed with exit code {code}: {reason[:300]}",
            hint="check the source with promptai models inspect",
        )


def _short(text: str) -> str:
    """Put a string on one line, cut to the length that llama-quantize accepts."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain.encode()[:_NOTE_BYTES].decode(errors="ignore")
