"""Run a command that takes minutes: its output into a log, line by line to whoever watches.

Compilers and downloads say how far they are only in their output, and when they
fail the reason is in there too. Ctrl-C must end all that a command started, not
the command alone, and leave it the time to remove what it has half written (make
deletes the object file it was at). After our own ``kill -9`` nobody reads the pipe
any more, and the first line that the command prints ends it.

``failure_lines`` finds the reason in a log. It does not know what the command does.
"""

import contextlib
import os
import re
import selectors
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_LOOK_EVERY_S = 0.5
_END_S = 10.0
#: What a build says when it fails; "errors generated" and the like only count what was said before.
_REASON = re.compile(
    r"(?:\b(?:fatal )?error:|\bERROR:|^CMake Error|No space left on device|Killed signal|\bKilled$|undefined reference)"
)


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    seen: Callable[[str], None],
    tick: Callable[[], None],
    environ: Mapping[str, str] | None = None,
    keep_open: Sequence[int] = (),
) -> int:
    """
    Run a command to its end.

    Args:
        log: Its output is appended there.
        seen: Told every line.
        tick: Called about twice a second, and after every piece of output.
        environ: On top of this process's environment.
        keep_open: File descriptors that it, and whatever it starts, inherits: a lock stays taken while they run.

    Returns:
        Its exit code; 127 when it cannot be run.
    """
    with log.open("ab") as sink:
        sink.write(f"$ {' '.join(command)}\n".encode(errors="replace"))
        try:
            process = subprocess.Popen(  # noqa: S603  our own command line, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C", **(environ or {})},
                start_new_session=True,
                pass_fds=keep_open,
            )
        except OSError as error:
            sink.write(f"error: {command[0]}: {error.strerror}\n".encode())
            return 127
        try:
            for piece in _output(process, tick):
                sink.write(piece)
                sink.flush()  # it is followed, and read after kill -9
                for line in piece.decode("utf-8", "replace").splitlines():
                    seen(line)
            return process.wait()
        except BaseException:
            _end(process)
            raise


def failure_lines(log: str, most: int = 4) -> list[str]:
    """The lines of a log that say why it failed, the last of them; its last lines when none does."""
    lines = [line.strip()[:300] for line in log.splitlines() if line.strip()]
    telling = list(dict.fromkeys(line for line in lines if _REASON.search(line)))
    return (telling or lines)[-most:]


def _output(process: "subprocess.Popen[bytes]", tick: Callable[[], None]) -> Iterator[bytes]:
    """Whole lines as they come, until the command and all that it started have closed the pipe."""
    pipe = process.stdout
    assert pipe is not None  # noqa: S101  asked for above
    rest = b""
    with selectors.DefaultSelector() as selector, pipe:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if selector.select(_LOOK_EVERY_S):
                data = os.read(pipe.fileno(), 65_536)
                if not data:
                    break
                whole, newline, rest = (rest + data).rpartition(b"\n")
                if newline:
                    yield whole + newline
            tick()
    if rest:
        yield rest + b"\n"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the command with all that it started: politely, then not."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
            return
