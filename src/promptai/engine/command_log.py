"""Run a command that takes minutes, log its output, and pass on each line.

The output of compilers and downloads is the only source of their progress, and of the reason when they fail. Ctrl-C
must end the command with every process that it started, and give it time to remove half-written files (make deletes
the object file it was writing). If this process is killed with SIGKILL, the pipe breaks, and the next line that the
command prints ends it.

``failure_lines`` finds the reason in a log, without knowing what the command does.
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
#: Marks of a failed build's reason; lines like "errors generated" only count earlier ones and do not match.
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
        log: The file that the output is appended to.
        seen: Called with each line.
        tick: Called about twice a second, and after every piece of output.
        environ: Added to this process's environment.
        keep_open: File descriptors that the command and its children inherit: a lock stays held while any of them runs.

    Returns:
        The exit code; 127 when the command cannot be run.
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
                sink.flush()  # users follow the log, and read it after kill -9
                for line in piece.decode("utf-8", "replace").splitlines():
                    seen(line)
            return process.wait()
        except BaseException:
            _end(process)
            raise


def failure_lines(log: str, most: int = 4) -> list[str]:
    """Return the last ``most`` lines of a log that name a reason, or its last lines when none does."""
    lines = [line.strip()[:300] for line in log.splitlines() if line.strip()]
    reasons = list(dict.fromkeys(line for line in lines if _REASON.search(line)))
    return (reasons or lines)[-most:]


def _output(process: "subprocess.Popen[bytes]", tick: Callable[[], None]) -> Iterator[bytes]:
    """Yield whole lines as they arrive, until the command and its children have closed the pipe."""
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
    """End the command and its children with SIGINT, then with SIGKILL."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
            return
