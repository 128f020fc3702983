"""A run's directory: append-only, one line a request, on the disk before the next begins.

A night of measuring on a board ends in a power cut, a full SD card or Ctrl-C
often enough. So nothing is kept in memory that is not on the disk: each trace
is one line, written and fsynced before the next request starts. A run that was
killed resumes and repeats nothing but the request that was in flight; a last
line that was cut in the middle is dropped when reading.

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
    """The text of one answer; kept apart from traces, so that these can be shared."""

    key: TraceKey
    text: str


class Recorder:
    """
    Writes one run; a context manager that holds the directory's lock.

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
        Open the files for appending, and read what they hold.

        Raises:
            RunError: They cannot be written, are damaged, or another process is writing them.
        """
        try:
            self._open()
        except BlockingIOError:
            self.__exit__()
            raise RunError(
                f"run {self.directory} is being written by another process", hint="wait for it, or end it"
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
        # Only behind the lock: before it, what looks like a cut line may be another process's, half written.
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
        Put one finished request on the disk.

        The answer goes first: a trace on the disk means that its answer is there too.

        Raises:
            RunError: The disk is full or failing.
        """
        traces, answers, _events = self._files
        # Conversations that run side by side are recorded by several threads.
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
        """Put an event on the disk; raises ``RunError`` when it cannot be written."""
        try:
            _append(self._files[2], msgspec.json.encode(event))
        except OSError as error:
            raise self._unwritable(error) from None
        self.events.append(event)

    def answered(self) -> set[TraceKey]:
        """Requests that need not be made again."""
        return {trace.key for trace in self.traces if trace.error is None}

    def hopeless(self) -> set[TraceKey]:
        """Requests that cannot succeed, because the prompt exceeds the context."""
        return {trace.key for trace in self.traces if is_hopeless(trace)}

    def last_t(self) -> float:
        """
        The latest time on the run's clock; 0 before anything was written.

        Telemetry of a request that was never answered counts: it must not look like a later request's.

        Raises:
            RunError: The telemetry is damaged.
        """
        times = [trace.t_end for trace in self.traces] + [event.t for event in self.events]
        return max(times + [sample.t for sample in read_samples(self.directory / "telemetry.jsonl")], default=0.0)

    def _unwritable(self, error: OSError) -> RunError:
        return _unwritable(self.directory, error, then="go on with --resume")


def is_hopeless(trace: Trace) -> bool:
    """Whether making this request again cannot help: its prompt exceeds the context."""
    return (trace.error or "").startswith(CONTEXT_EXCEEDED)


def create_run(parent: Path, manifest: Manifest, *, label: str, now: datetime) -> Path:
    """
    Make a new run directory with its manifest.

    Args:
        parent: Where runs are collected, usually ``runs``.
        label: Model and board, for the name.

    Raises:
        RunError: The directory cannot be made or written.
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
    raise RunError(f"{parent} holds a hundred runs of this second", hint="choose another directory with --runs")


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
    """Put the manifest on the disk, whole or not at all."""
    write_whole(directory / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def write_whole(path: Path, data: bytes) -> None:
    """
    Write a file that appears under its name only when it is complete.

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
    The manifest of a run.

    Raises:
        RunError: There is none, or it is damaged.
    """
    path = directory / "manifest.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise RunError(
            f"{directory} is not a run: manifest.json: {error.strerror}", hint="give a directory below runs/"
        ) from None
    except MALFORMED as error:
        raise RunError(f"{path} is damaged or of another version: {error}", hint="measure again") from None


def read_traces(directory: Path) -> list[Trace]:
    """Every whole trace of a run, in the order they were written; raises ``RunError`` on damage."""
    return _read_lines(directory / "traces.jsonl", Trace)


def read_events(directory: Path) -> list[Event]:
    """Every event of a run, in order; raises ``RunError`` on damage."""
    return _read_lines(directory / "events.jsonl", Event)  # type: ignore[arg-type]  # mypy has no TypeForm yet


def _read_lines(path: Path, kind: type[T]) -> list[T]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from None
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
    """Cut off what a power cut left of a last line, so that the next one starts on its own."""
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
        os.ftruncate(file.fileno(), start)  # no half line stays behind
        raise


def _remove_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # somebody has put something there: not ours to remove


def _unwritable(
    where: Path, error: OSError, *, then: str = "try again", remedy: str = "check its permissions"
) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left to write to {where}", hint=f"free some space, then {then}")
    return RunError(f"cannot write to {where}: {error.strerror or error}", hint=remedy)
