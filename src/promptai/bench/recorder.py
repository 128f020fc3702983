"""A run's directory: append-only, one line per request, on disk before the next request starts.

Long measurements on a board often end in a power cut, a full SD card or Ctrl-C. So no result
exists in memory only: each trace is one line, written and fsynced before the next request. A
killed run resumes and repeats only the request that was in flight; a truncated last line is
dropped.

    runs/2026-11-20T12-00-00_yi-coder-1.5b_pi5/
      manifest.json   traces.jsonl   answers.jsonl   events.jsonl   telemetry.jsonl   summary.json   report.html

Synchronous on purpose: callers in an event loop use ``asyncio.to_thread``.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import msgspec

from promptai.bench.client import CONTEXT_EXCEEDED
from promptai.bench.events import Event
from promptai.bench.manifest import Manifest
from promptai.bench.trace import Trace, TraceKey
from promptai.device.telemetry import read_samples
from promptai.errors import EngineError, RunError
from promptai.wire.malformed import MALFORMED

T = TypeVar("T")
_FILES = ("traces.jsonl", "answers.jsonl", "events.jsonl")


class Answer(msgspec.Struct, frozen=True):
    """The text of one answer; in a file of its own, so traces can be shared."""

    key: TraceKey
    text: str


class Recorder:
    """
    Writes one run; a context manager that holds the lock of the directory.

    Args:
        directory: An existing run directory (see ``create_run``).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.traces: list[Trace] = []
        self.events: list[Event] = []
        self.answers: dict[TraceKey, str] = {}
        self._files: list[BinaryIO] = []
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        """
        Open the files for appending, and read their contents.

        Raises:
            RunError: The files cannot be written, are damaged, or another process is writing them.
        """
        try:
            self._open()
        except BlockingIOError:
            self.__exit__()
            raise RunError(
                f"another process is writing run {self.directory}", hint="wait for it to end, or stop it"
            ) from None
        except OSError as error:
            self.__exit__()
            raise self._unwritable(error) from None
        except RunError:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        for name in _FILES:
            self._files.append((self.directory / name).open("ab", buffering=0))
        fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only with the lock: a line that looks truncated may be one that another process is writing.
        for name in _FILES:
            _drop_cut_line(self.directory / name)
        self.traces = read_traces(self.directory)
        self.events = read_events(self.directory)
        answers = _read_lines(self.directory / "answers.jsonl", Answer)
        self.answers = {answer.key: answer.text for answer in answers}

    def __exit__(self, *_exc: object) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._files = []

    def append(self, trace: Trace, text: str) -> None:
        """
        Write one finished request to disk.

        The answer is written first: if a trace is on disk, so is its answer.

        Raises:
            RunError: The disk is full or failing.
        """
        traces, answers, _events = self._files
        # Concurrent conversations are recorded by several threads.
        with self._writing:
            try:
                if trace.error is None:
                    _append(answers, msgspec.json.encode(Answer(trace.key, text)))
                _append(traces, msgspec.json.encode(trace))
            except OSError as error:
                raise self._unwritable(error) from None
            self.traces.append(trace)
            self.answers[trace.key] = text

    def note(self, event: Event) -> None:
        """Write an event to disk; raises ``RunError`` if that fails."""
        try:
            _append(self._files[2], msgspec.json.encode(event))
        except OSError as error:
            raise self._unwritable(error) from None
        self.events.append(event)

    def answered(self) -> set[TraceKey]:
        """Keys of requests with an answer."""
        return {trace.key for trace in self.traces if trace.error is None}

    def hopeless(self) -> set[TraceKey]:
        """Keys of requests whose prompt exceeds the context: a retry cannot succeed."""
        return {trace.key for trace in self.traces if is_hopeless(trace)}

    def last_t(self) -> float:
        """
        Return the latest time on the run's clock; 0 for a new run.

        This includes telemetry of unanswered requests, which must not look like a later request's.

        Raises:
            RunError: The telemetry is damaged.
        """
        times = [trace.t_end for trace in self.traces] + [event.t for event in self.events]
        return max(times + [sample.t for sample in read_samples(self.directory / "telemetry.jsonl")], default=0.0)

    def _unwritable(self, error: OSError) -> RunError:
        return _unwritable(self.directory, error, then="continue with --resume")


def is_hopeless(trace: Trace) -> bool:
    """Whether a retry cannot succeed, because the prompt exceeds the context."""
    return (trace.error or "").startswith(CONTEXT_EXCEEDED)


def create_run(parent: Path, manifest: Manifest, *, label: str, now: datetime) -> Path:
    """
    Create a run directory with its manifest.

    Args:
        parent: Directory of all runs, usually ``runs``.
        label: Model and board, for the name.

    Raises:
        RunError: The directory cannot be created or written.
    """
    slug = re.sub(r"[^a-z0-9._+-]+", "-", label.lower()).strip("-") or "run"
    stem = f"{now:%Y-%m-%dT%H-%M-%S}_{slug[:80]}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f".{number}" for number in range(2, 100))):
            directory = parent / f"{stem}{suffix}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            try:
                write_manifest(directory, manifest)
            except RunError:
                _remove_empty(directory)
                raise
            return directory
    except OSError as error:
        raise _unwritable(parent, error, remedy="choose another directory with --runs") from None
    raise RunError(
        f"{parent} already contains a hundred runs from this second", hint="choose another directory with --runs"
    )


def discard(directory: Path, error: BaseException) -> Path | None:
    """
    Remove a directory without measurements.

    Returns:
        The newest engine log in it, where an engine failed and logged something; the directory then stays.
    """
    logs = [log for log in directory.glob("*.log") if log.stat().st_size]
    if not logs or not isinstance(error, EngineError):
        shutil.rmtree(directory)
        return None
    return max(logs, key=lambda log: log.stat().st_mtime)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest to disk, completely or not at all."""
    write_whole(directory / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def write_whole(path: Path, data: bytes) -> None:
    """
    Write a file that appears under its name only once it is complete.

    Raises:
        RunError: The disk is full or the directory cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _unwritable(path.parent, error) from None


def read_manifest(directory: Path) -> Manifest:
    """
    Read the manifest of a run.

    Raises:
        RunError: It is missing or damaged.
    """
    path = directory / "manifest.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise RunError(
            f"{directory} is not a run: manifest.json: {error.strerror}", hint="use a directory below runs/"
        ) from None
    except MALFORMED as error:
        raise RunError(f"{path} is damaged or from another version: {error}", hint="measure again") from None


def read_traces(directory: Path) -> list[Trace]:
    """Read every complete trace of a run, in order of writing; raises ``RunError`` on damage."""
    return _read_lines(directory / "traces.jsonl", Trace)


def read_events(directory: Path) -> list[Event]:
    """Read every event of a run, in order; raises ``RunError`` on damage."""
    return _read_lines(directory / "events.jsonl", Event)  # type: ignore[arg-type]  # mypy has no TypeForm yet


def _read_lines(path: Path, kind: type[T]) -> list[T]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from None
    decoder = msgspec.json.Decoder(kind)
    found = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            found.append(decoder.decode(line))
        except MALFORMED as error:
            raise RunError(
                f"{path}, line {number} is damaged: {error}", hint="remove the line, or measure again"
            ) from None
    return found


def _drop_cut_line(path: Path) -> None:
    """Remove a last line that a power cut truncated, so the next one starts on a new line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _append(file: BinaryIO, line: bytes) -> None:
    data = line + b"\n"
    start = os.fstat(file.fileno()).st_size
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), start)  # leave no partial line
        raise


def _remove_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # not empty: another process has written to it


def _unwritable(
    where: Path, error: OSError, *, then: str = "try again", remedy: str = "check its permissions"
) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left to write to {where}", hint=f"free some space, then {then}")
    return RunError(f"cannot write to {where}: {error.strerror or error}", hint=remedy)
