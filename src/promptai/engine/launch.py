"""Start one engine, know when it can answer, stop it, and say plainly why it ended.

An engine that dies says so in a log of hundreds of lines, or not at all (the
out-of-memory killer leaves only an exit code of -9). Whoever started it wants
one sentence. So the log goes to a file, the exit code is watched while waiting,
and ``explain_exit`` turns both into that sentence.

One engine, one process group, loopback only. A ``llama-server`` is often a script
that starts the real one; so the group is ended, not only the process that was
started. It is tied to this process (``engine.guard``), so that it goes away even
when this one is killed.

The environment is passed on without ``LLAMA_...`` and without our own API key:
llama-server reads ``LLAMA_ARG_...`` as options, which no manifest would know, and
``LLAMA_API_KEY`` would lock us out. Files in the user's folder are no modules
for our own processes.
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
# What the kernel itself holds, by a disk that does not answer, cannot even be killed.
_KILL_S = 10.0
_REAP_S = 1.0
# Loading reads the file once. 10 MB/s is a slow SD card; below that something is wrong.
_SLOWEST_DISK_BYTES_PER_S = 10_000_000
_START_BASE_S = 60.0


class RunningEngine:
    """
    A started engine: an async context manager that is ready inside its block.

    Args:
        api_key: What it demands of whoever asks it for more than its health; ``None``: nothing.

    Attributes:
        load_s: Seconds from its start until it could answer; ``None`` before that.
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
        """Where its HTTP API is."""
        return f"http://127.0.0.1:{self.flags.port}"

    @property
    def pid(self) -> int | None:
        """Its process id while it has one."""
        return self._process.pid if self._process is not None else None

    async def __aenter__(self) -> Self:
        """
        Start it and wait until it answers.

        Raises:
            EngineStartError: It ended, or did not answer in the time its file should take to load.
        """
        if port_taken(self.flags.port):
            raise EngineStartError(
                f"port {self.flags.port} on 127.0.0.1 is taken by another program",
                hint="choose another with --port, or leave it out to get a free one",
            )
        try:
            file_bytes = Path(self.flags.model).stat().st_size
        except OSError as error:
            _LOG.info("model %s cannot be read: %s", self.flags.model, error.strerror)
            raise EngineStartError(
                f"model {self._file} cannot be read: {error.strerror}", hint="is it still there?"
            ) from None
        allowed_s = _START_BASE_S + file_bytes / _SLOWEST_DISK_BYTES_PER_S
        started = time.monotonic()
        try:
            with self.log.open("ab") as sink:
                self._log_start = sink.tell()
                self._process = subprocess.Popen(  # noqa: S603  the located engine, no shell
                    [sys.executable, "-P", "-m", "promptai.engine.guard", *self.binary.arguments(self.flags)],
                    stdin=subprocess.DEVNULL,
                    # A terminal's Ctrl-C goes to the whole process group; the parent decides when it stops,
                    # and then stops this group.
                    start_new_session=True,
                    stdout=sink,
                    stderr=sink,
                    env=_environment(self.binary, self._api_key),
                )
        except OSError as error:
            _LOG.info("%s could not be started: %s", self.flags.alias, error)
            raise EngineStartError(
                f"the engine could not be started: {error.strerror}", hint="see promptai doctor"
            ) from None
        try:
            await self._until_ready(started, allowed_s)
        except GeneratorExit:  # no loop drives it any longer
            self.stop()
            raise
        except BaseException:
            await self._end()
            raise
        self.load_s = time.monotonic() - started
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stop it."""
        await self._end()

    async def _end(self) -> None:
        """Stop it in a thread, so that nothing else stands still; cancelled, tell so only when it is gone."""
        # No task: when a loop closes it cancels every task, and would not wait for this one.
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
        Why it is gone; ``None`` while it lives.

        Asked after a broken connection, which the kernel reports up to a second
        before the process can be reaped: so it waits that long for the end.
        """
        code = self._code(_REAP_S)
        if code is None:
            return None
        reason, hint = explain_exit(code, self._log_tail())
        return EngineDiedError(f"the engine of {self.flags.alias} died: {reason}", hint=hint)

    def log_bytes(self) -> int:
        """How long its log is."""
        try:
            return self.log.stat().st_size
        except OSError:
            return 0

    def put_log_aside(self) -> None:
        """
        Begin its log anew; what stood there is kept beside it.

        The engine goes on writing: to a file that is opened for appending, as its log is, that is the new beginning.
        """
        with contextlib.suppress(OSError):  # where there is no room to keep it, room is what is needed
            shutil.copyfile(self.log, self.log.with_suffix(".log.old"))
        with contextlib.suppress(OSError):
            os.truncate(self.log, 0)

    def stop(self) -> None:
        """End it and whatever it started: politely, then not; returns when it is gone or cannot be ended."""
        if self._process is None or self._code(0) is not None:
            return
        _signal_group(self._process.pid, signal.SIGTERM)
        if self._code(_STOP_S) is None:
            _signal_group(self._process.pid, signal.SIGKILL)
            if self._code(_KILL_S) is None:
                _LOG.warning("process %d of %s cannot be ended", self._process.pid, self.flags.alias)

    def _code(self, within_s: float) -> int | None:
        """Its exit code once it has ended, with what it left behind killed; ``None`` when it has not in that time."""
        process = self._process
        if process is None or process.returncode is not None:
            return None if process is None else process.returncode
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        # Now, and never again: later, its number may be somebody else's.
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
            f"the engine did not answer within {allowed:.0f} s of its start; its last words: "
            f"{_last_line(self._log_tail())}",
            hint="is the disk very slow, or the model on a network share?",
        )

    @property
    def _file(self) -> str:
        return Path(self.flags.model).name

    def _public(self, words: str) -> str:
        """Its own words without the folder of its model: clients read them, as the reason of a 503."""
        folder = Path(self.flags.model).parent
        if not folder.is_absolute():
            return words
        files = rf"{re.escape(self._file)}|[^/\n]*\.gguf"  # others are the further parts of one that was split
        return re.sub(rf"(?<![\w.-]){re.escape(str(folder))}/(?={files})", "", words)

    def _log_tail(self) -> str:
        try:
            with self.log.open("rb") as log:
                size = self.log.stat().st_size
                start = self._log_start if self._log_start <= size else 0  # it was put aside, by whomever
                log.seek(max(start, size - 16_384))
                return self._public(log.read().decode("utf-8", "replace"))
        except OSError:
            return ""


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to all processes of a group; False when there are none, or none of ours."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _environment(binary: EngineBinary, api_key: str | None) -> dict[str, str]:
    """What an engine finds in its environment; ``guard`` takes its own word out of it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    ours.pop("PROMPTAI_API_KEY", None)
    # The embedded engine is a module of ours: -P, which stands on the guard's command line, ends there.
    added = {"PROMPTAI_GUARD_PARENT": str(os.getpid())}
    if binary.embedded:
        added["PYTHONSAFEPATH"] = "1"
    if api_key is not None:
        added["LLAMA_API_KEY"] = api_key  # not on the command line, which everybody may read
    return ours | added


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int) -> bool:
    """Whether somebody listens on that loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def explain_exit(code: int, log: str) -> tuple[str, str]:
    """
    Why an engine ended, and what to do: from its exit code and the end of its log.

    Args:
        code: As in ``subprocess``: negative is the number of the signal that killed it.
        log: The last lines that it printed.
    """
    for pattern, reason, hint in _KNOWN_ENDS:
        match = re.search(pattern, log)
        if match:
            return reason.format(*match.groups()), hint
    if code == EXIT_NO_WHEEL:
        return f"the embedded engine cannot be imported: {_last_line(log)}", "install promptai again"
    if code == -signal.SIGKILL:
        return (
            "killed by signal 9 (SIGKILL), which is what the kernel sends when memory is full",
            "use a smaller model, quantisation or --context, or close other programs",
        )
    if code < 0:
        return (
            f"killed by signal {-code} ({_signal_name(-code)}); its last words: {_last_line(log)}",
            _CRASH_HINT,
        )
    return f"exit code {code}; its last words: {_last_line(log)}", "see promptai doctor"


_CRASH_HINT = "if it happens again, try another engine: promptai engine list"
_FETCH_HINT = "fetch the file again, or check it against its SHA-256"

#: Sentence in the log -> reason and hint. The first that matches wins: causes before consequences.
_KNOWN_ENDS = (
    (
        r"libgomp\.so\.1: cannot open shared object",
        "the system library libgomp.so.1 is missing",
        "install it: apt-get install libgomp1 (Debian, Ubuntu, Raspberry Pi OS), dnf install libgomp (Fedora)",
    ),
    (r"cannot run (?:\S*/)?(\S+): ([^\n]+)", "{0} cannot be run: {1}", "see promptai engine list"),
    (r"(GGML_ASSERT\([^\n]*\) failed)", "{0}", "use another engine or another model; see promptai engine list"),
    (r"couldn't bind HTTP server socket.*port: (\d+)", "port {0} is taken", "choose another with --port"),
    (
        r"error: invalid argument: (\S+)",
        "this llama-server does not know {0}",
        "use a newer one, or the one that promptai engine build makes",
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
        "this engine does not know the architecture {0}",
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
