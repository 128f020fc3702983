"""Start one engine, wait until it answers, stop it, and explain in one sentence why it ended.

An engine that dies gives its reason in a log of hundreds of lines, or none at all (the out-of-memory killer leaves only
the exit code -9), but the user needs one sentence. So the log goes to a file, the exit code is watched while waiting,
and ``explain_exit`` makes the sentence from both.

Each engine has its own process group and listens on loopback only. A ``llama-server`` is often a script that starts the
real one, so the whole group is ended, not only the process that was started. ``engine.guard`` ties it to this process,
so it ends even when this process is killed.

The environment is passed on without ``LLAMA_...`` and without our own API key: llama-server reads ``LLAMA_ARG_...`` as
options, which no manifest would record, and ``LLAMA_API_KEY`` would lock us out. Files in the user's folder cannot
replace the modules of our own processes.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from promptai.engine.client import EngineClient
from promptai.engine.embedded import EXIT_NO_WHEEL
from promptai.engine.flags import EngineFlags
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineDiedError, EngineError, EngineStartError

_LOG = logging.getLogger("promptai.engine")
_POLL_S = 0.05
_STOP_S = 5.0
# A process that waits in the kernel for a disk that does not answer cannot be killed.
_KILL_S = 10.0
_REAP_S = 1.0
# Loading reads the file once. 10 MB/s is a slow SD card; below that something is broken.
_SLOWEST_DISK_BYTES_PER_S = 10_000_000
_START_BASE_S = 60.0


class RunningEngine:
    """
    A running engine: an async context manager, ready inside its block.

    Args:
        api_key: The key that the engine requires for every request but its health; ``None``: no key.

    Attributes:
        load_s: Seconds from its start until it answered; ``None`` before that.
    """

    def __init__(self, binary: EngineBinary, flags: EngineFlags, *, log: Path, api_key: str | None = None) -> None:
        self.binary = binary
        self.flags = flags
        self.log = log
        self.load_s: float | None = None
        self._api_key = api_key
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def base_url(self) -> str:
        """URL of its HTTP API."""
        return f"http://127.0.0.1:{self.flags.port}"

    @property
    def pid(self) -> int | None:
        """Process id; ``None``: not started."""
        return self._process.pid if self._process is not None else None

    async def __aenter__(self) -> Self:
        """
        Start the engine and wait until it answers.

        Raises:
            EngineStartError: It ended, or did not answer in the time that loading its file should take.
        """
        if port_taken(self.flags.port):
            raise EngineStartError(
                f"port {self.flags.port} on 127.0.0.1 is taken by another program",
                hint="choose another with --port, or omit --port to use a free one",
            )
        try:
            file_bytes = Path(self.flags.model).stat().st_size
        except OSError as error:
            _LOG.info("model %s cannot be read: %s", self.flags.model, error.strerror)
            raise EngineStartError(
                f"cannot read the model {self._file}: {error.strerror}", hint="check that the file still exists"
            ) from None
        allowed_s = _START_BASE_S + file_bytes / _SLOWEST_DISK_BYTES_PER_S
        started = time.monotonic()
        try:
            with self.log.open("ab") as sink:
                self._log_start = sink.tell()
                self._process = subprocess.Popen(  # noqa: S603  the located engine, no shell
                    [sys.executable, "-P", "-m", "promptai.engine.guard", *self.binary.arguments(self.flags)],
                    stdin=subprocess.DEVNULL,
                    # A terminal's Ctrl-C reaches its whole process group, but the parent decides when the engine stops.
                    start_new_session=True,
                    stdout=sink,
                    stderr=sink,
                    env=_environment(self.binary, self._api_key),
                )
        except OSError as error:
            _LOG.info("%s could not be started: %s", self.flags.alias, error)
            raise EngineStartError(f"cannot start the engine: {error.strerror}", hint="see promptai doctor") from None
        try:
            await self._until_ready(started, allowed_s)
        except GeneratorExit:  # no event loop runs this coroutine any more
            self.stop()
            raise
        except BaseException:
            await self._end()
            raise
        self.load_s = time.monotonic() - started
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stop the engine."""
        await self._end()

    async def _end(self) -> None:
        """Stop the engine in a thread; a cancellation is raised only after it has ended."""
        # Not a task: a closing loop cancels every task, and would not wait for this one.
        ending = asyncio.get_running_loop().run_in_executor(None, self.stop)
        cancelled: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.wait([ending])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        ending.result()

    def death(self) -> EngineDiedError | None:
        """
        Return why the engine has ended; ``None`` while it runs.

        Callers use it after a broken connection, which the kernel reports up to a second before the process can be
        reaped. So it waits up to that long for the end.
        """
        code = self._code(_REAP_S)
        if code is None:
            return None
        reason, hint = explain_exit(code, self._log_tail())
        return EngineDiedError(f"the engine of {self.flags.alias} died: {reason}", hint=hint)

    def log_bytes(self) -> int:
        """Size of the log; 0 when it cannot be read."""
        try:
            return self.log.stat().st_size
        except OSError:
            return 0

    def put_log_aside(self) -> None:
        """
        Move the log's content to ``.log.old`` and empty the log.

        The engine opened its log for appending, so it continues at the new beginning.
        """
        with contextlib.suppress(OSError):  # on a full disk the old log is lost, which frees space
            shutil.copyfile(self.log, self.log.with_suffix(".log.old"))
        with contextlib.suppress(OSError):
            os.truncate(self.log, 0)

    def stop(self) -> None:
        """End the process group with SIGTERM, then SIGKILL; return when it has ended or cannot be ended."""
        if self._process is None or self._code(0) is not None:
            return
        _signal_group(self._process.pid, signal.SIGTERM)
        if self._code(_STOP_S) is None:
            _signal_group(self._process.pid, signal.SIGKILL)
            if self._code(_KILL_S) is None:
                _LOG.warning("cannot end process %d of %s", self._process.pid, self.flags.alias)

    def _code(self, within_s: float) -> int | None:
        """Wait for the exit code, and kill what the engine left behind; ``None``: still running after ``within_s``."""
        process = self._process
        if process is None or process.returncode is not None:
            return None if process is None else process.returncode
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        # Only now: later, the kernel may have given the group's number to another process.
        give_up = time.monotonic() + _REAP_S
        while _signal_group(process.pid, signal.SIGKILL) and time.monotonic() < give_up:
            time.sleep(_POLL_S / 10)
        return code

    async def _until_ready(self, started: float, allowed: float) -> None:
        async with EngineClient(self.base_url) as client:
            while time.monotonic() - started < allowed:
                code = self._code(0)
                if code is not None:
                    reason, hint = explain_exit(code, self._log_tail())
                    _LOG.info("the engine could not load %s: %s", self.flags.model, reason)
                    raise EngineStartError(f"the engine could not load {self._file}: {reason}", hint=hint)
                with contextlib.suppress(EngineError):
                    if await client.healthy():
                        return
                await asyncio.sleep(_POLL_S)
        raise EngineStartError(
            f"the engine did not answer within {allowed:.0f} s of its start; last log line: "
            f"{_last_line(self._log_tail())}",
            hint="check whether the disk is very slow, or the model is on a network share",
        )

    @property
    def _file(self) -> str:
        return Path(self.flags.model).name

    def _public(self, words: str) -> str:
        """Return ``words`` without the model's folder: clients receive them as the reason for a 503."""
        folder = Path(self.flags.model).parent
        if not folder.is_absolute():
            return words
        files = rf"{re.escape(self._file)}|[^/\n]*\.gguf"  # the other parts of a split model
        return re.sub(rf"(?<![\w.-]){re.escape(str(folder))}/(?={files})", "", words)

    def _log_tail(self) -> str:
        try:
            with self.log.open("rb") as log:
                size = self.log.stat().st_size
                start = self._log_start if self._log_start <= size else 0  # the log was emptied meanwhile
                log.seek(max(start, size - 16_384))
                return self._public(log.read().decode("utf-8", "replace"))
        except OSError:
            return ""


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to all processes of a group; False when there are none, or none of this user's."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _environment(binary: EngineBinary, api_key: str | None) -> dict[str, str]:
    """Return the environment of an engine; ``guard`` removes its own variable."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    ours.pop("PROMPTAI_API_KEY", None)
    # The embedded engine is a module of ours, and the guard's -P does not apply to the program it becomes.
    added = {"PROMPTAI_GUARD_PARENT": str(os.getpid())}
    if binary.embedded:
        added["PYTHONSAFEPATH"] = "1"
    if api_key is not None:
        added["LLAMA_API_KEY"] = api_key  # not on the command line, which every user of the machine can read
    return ours | added


def free_port() -> int:
    """Return a TCP port on loopback that is free right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int) -> bool:
    """Whether a program listens on that loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def explain_exit(code: int, log: str) -> tuple[str, str]:
    """
    Return the reason and a hint, from an engine's exit code and the end of its log.

    Args:
        code: As in ``subprocess``: a negative code is the number of the signal that killed it.
        log: The end of its log.
    """
    for pattern, reason, hint in _KNOWN_ENDS:
        match = re.search(pattern, log)
        if match:
            return reason.format(*match.groups()), hint
    if code == EXIT_NO_WHEEL:
        return f"cannot import the embedded engine: {_last_line(log)}", "install promptai again"
    if code == -signal.SIGKILL:
        return (
            "killed by signal 9 (SIGKILL), which the kernel sends when memory is full",
            "use a smaller model, quantisation or --context, or close other programs",
        )
    if code < 0:
        return (
            f"killed by signal {-code} ({_signal_name(-code)}); last log line: {_last_line(log)}",
            _CRASH_HINT,
        )
    return f"exit code {code}; last log line: {_last_line(log)}", "see promptai doctor"


_CRASH_HINT = "if it happens again, try another engine: promptai engine list"
_FETCH_HINT = "fetch the file again, or check it against its SHA-256"

#: Pattern in the log, reason and hint. The first match wins: causes before consequences.
_KNOWN_ENDS = (
    (
        r"libgomp\.so\.1: cannot open shared object",
        "the system library libgomp.so.1 is missing",
        "install it: apt-get install libgomp1 (Debian, Ubuntu, Raspberry Pi OS), dnf install libgomp (Fedora)",
    ),
    (r"cannot run (?:\S*/)?(\S+): ([^\n]+)", "cannot run {0}: {1}", "see promptai engine list"),
    (r"(GGML_ASSERT\([^\n]*\) failed)", "{0}", "use another engine or another model; see promptai engine list"),
    (r"couldn't bind HTTP server socket.*port: (\d+)", "port {0} is taken", "choose another with --port"),
    (
        r"error: invalid argument: (\S+)",
        "this llama-server does not support {0}",
        "use a newer one, for example from promptai engine build",
    ),
    (
        r"(std::bad_alloc|failed to allocate|Cannot allocate memory)",
        "not enough memory ({0})",
        "use a smaller model or --context",
    ),
    (
        r"exceeds remaining file size|failed to read key-value pairs|failed to read tensor info",
        "the file is cut short or damaged",
        _FETCH_HINT,
    ),
    (r"not within the file bounds", "the file is cut short or damaged", _FETCH_HINT),
    (r"invalid magic characters", "the file is not a GGUF", _FETCH_HINT),
    (
        r"unknown model architecture: '([^']+)'",
        "this engine does not support the architecture {0}",
        "use a newer engine",
    ),
    (r"error loading model: ([^\n]+)", "{0}", _FETCH_HINT),
)


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "none"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
