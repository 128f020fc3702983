"""Make a smaller model of a larger one: 16- or 8-bit GGUF in, 4-bit GGUF out, and where it came from noted in it.

A 4-bit file from a stranger may be made from anything. One that was made here says
of what (name, type, SHA-256) and by what, in the keys ``promptai.source.*`` and
``promptai.quantized_by``. The work is llama.cpp's ``llama-quantize`` where there is
one; without, the two simple types come from the ``gguf`` package
(``models.requantize``), slower and with larger embeddings, and K-quants are refused.

The result appears under its name only when it is whole and its header was read
again; an error or Ctrl-C leaves nothing. How good it is, is not known here:
``bench.agreement``. Programs are run by whoever is given (``ToolRunner``), so that this
module starts nothing itself.
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

#: What may be asked for -> bits a weight of its main type, from ggml-common.h.
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
#: llama-quantize takes 127 bytes for a text.
_NOTE_BYTES = 120
_LAST_WORDS = 20
_SPARE_BYTES = 16 << 20
#: The better of mixed types (Q6_K among Q4_K) take up to this much more than the main one.
_MIXED = 1.12
_STEP = re.compile(r"^\[ *\d+/ *\d+\] +(\S+)")


class ToolRunner(Protocol):
    """Runs a program to its end; gives its exit code."""

    def __call__(self, command: Sequence[str], *, seen: Callable[[str], None], tick: Callable[[], None]) -> int:
        """Tell ``seen`` every line of its output, and call ``tick`` now and then."""


class QuantizeResult(msgspec.Struct, frozen=True):
    """
    A model that was made smaller.

    Attributes:
        source, result: Their headers.
        source_sha256: Of the source's file.
        by: What did it.
    """

    source: GgufHeader
    result: GgufHeader
    source_sha256: str
    by: str


class Origin(msgspec.Struct, frozen=True):
    """What a source is called in its result, and its SHA-256."""

    name: str
    sha256: str


class QuantizeTool(msgspec.Struct, frozen=True):
    """
    A ``llama-quantize``.

    Attributes:
        label: Its own word for its version; ``of unknown build`` when it does not say.
        run: How to run it.
    """

    path: Path
    run: ToolRunner

    def label_for(self, source: Path, kind: str) -> str:
        """Its name with its build, as it prints it at the start of a dry run; older builds know no dry run."""
        lines: list[str] = []
        command = [str(self.path), "--dry-run", "--allow-requantize", str(source), kind.upper()]
        self.run(command, seen=lines.append, tick=lambda: None)
        found = next((line for line in lines if line.startswith("version: ")), "")
        return f"llama-quantize {found.removeprefix('version: ') or 'of unknown build'}"


def find_program(name: str, engines: Path, *, beside: Path | None = None) -> Path | None:
    """
    A program of llama.cpp on this machine; ``None`` when there is none.

    Args:
        engines: Where ``promptai engine build`` keeps what it built; the newest comes first.
        beside: A llama-server that the user named; what lies beside it comes before that.
    """
    built = [path for path in engines.glob(f"*/bin/{name}") if (path.parents[1] / "engine.json").is_file()]
    built.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    # A name without a folder would be looked for on the PATH when it is run.
    named = [beside.absolute().with_name(name)] if beside is not None else []
    found = next((path for path in (*named, *built) if os.access(path, os.X_OK)), None)
    on_path = shutil.which(name)
    return found or (Path(on_path) if on_path is not None else None)


def check_source(header: GgufHeader, kind: str) -> None:
    """
    Refuse what would be spoilt.

    Raises:
        ModelError: It is one part of several, or has fewer bits already.
    """
    if header.split is not None:
        raise ModelError(
            f"{header.path} is part {header.split[0] + 1} of {header.split[1]}",
            hint="join the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    types = {tensor.quantization for tensor in header.tensors if converted(tensor)}
    already = sorted(types - _SOURCES.keys())
    if already:
        raise ModelError(
            f"{header.path} is quantised already ({', '.join(already)}); again would lose more than it saves",
            hint="start from its F16, BF16, F32 or Q8_0 file",
        )
    if TYPES[kind] > _SOURCES.get(header.quantization, 32.0):
        raise ModelError(
            f"{header.path} is {header.quantization}: {kind} would be larger and no better",
            hint="choose a smaller --type",
        )


def expected_bytes(header: GgufHeader, kind: str) -> int:
    """About what the result takes, rather more than less: for the check of free space."""
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
    Write ``target``, a ``kind`` of ``source``.

    Args:
        kind: One of ``TYPES``.
        tool: The llama-quantize to use; ``None``: the ``gguf`` package.
        origin: What the result says that it was made of; absent: the source's file.

    Raises:
        ModelError: The source is unfit, the type needs a llama-quantize, the disk is full, or the tool fails.
    """
    header = read_header(source)
    check_source(header, kind)
    if tool is None and kind not in OFFERED:
        raise ModelError(
            f"{kind} needs llama.cpp's llama-quantize, and there is none on this machine",
            hint=f"promptai engine build; without it there are {', '.join(OFFERED)}",
        )
    if any(path.exists() and path.samefile(source) for path in (target, _part(target))):
        raise ModelError(f"{target} would replace its own source", hint="choose another name with -o")
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
            raise ModelError(f"{by} left out tensors or notes", hint="use a newer llama.cpp: promptai engine build")
    return QuantizeResult(header, read_header(target), origin.sha256, by)


def provenance(origin: Origin, quantization: str, by: str) -> dict[str, str]:
    """The keys that say where a result came from; texts are cut to what every tool takes."""
    notes = {
        "promptai.source.sha256": origin.sha256,
        "promptai.source.name": origin.name,
        "promptai.source.quantization": quantization,
        "promptai.quantized_by": by,
    }
    return {key: _short(text) for key, text in notes.items()}


def check_space(target: Path, needed: int) -> None:
    """
    Refuse to begin what would not fit on the disk.

    Raises:
        ModelError: With what is needed and what is free.
    """
    folder = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise ModelError(
            f"{folder} has {readable_size(free)} free, {target.name} needs about {readable_size(needed + _SPARE_BYTES)}",
            hint="make room, or choose another place with -o",
        )


@contextlib.contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """
    Give the name under which a file is written; at the end of the block it gets its own, or goes.

    Raises:
        ModelError: Another process writes it right now, or the disk refuses.
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
    Have a file for ourselves and empty, on the way to ``target``; an error or Ctrl-C in the block deletes it.

    Raises:
        ModelError: Another process has it, or the disk refuses.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = part.open("ab")
    with lock:
        with disk_errors(target):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it may have renamed or deleted it; then what we locked is not what that name means now.
                ours = part.exists() and os.path.samestat(os.fstat(lock.fileno()), part.stat())
            except BlockingIOError:
                ours = False
        if not ours:
            raise ModelError(f"{target} is being written by another process", hint="wait for it")
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
    words: deque[str] = deque(maxlen=_LAST_WORDS)

    def seen(line: str) -> None:
        words.append(line)
        step = _STEP.match(line)
        if step is not None:
            progress.advance(sizes.get(step[1], 0))

    progress.begin(f"quantising to {kind}", header.tensor_bytes)
    overrides = [word for key, text in notes.items() for word in ("--override-kv", f"{key}=str:{text}")]
    command = [str(tool.path), "--allow-requantize", *overrides, header.path, str(part), kind.upper(), str(threads)]
    code = tool.run(command, seen=seen, tick=lambda: None)
    if code != 0:
        reason = next((line.strip() for line in reversed(words) if line.strip()), "it printed nothing")
        raise ModelError(
            f"llama-quantize failed with exit code {code}: {reason[:300]}", hint="see promptai models inspect"
        )


def _short(text: str) -> str:
    """On one line, and as long as llama-quantize takes."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain.encode()[:_NOTE_BYTES].decode(errors="ignore")
