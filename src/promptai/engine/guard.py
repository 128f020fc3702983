"""Run a program that must not outlive its parent: ``python -m promptai.engine.guard PROGRAM ARG …``.

A benchmark that is killed with SIGKILL cannot stop its engine, and an orphaned engine keeps gigabytes and a port on a
board that has neither to spare. The kernel can stop it: PR_SET_PDEATHSIG survives ``execve`` (prctl(2)), so this
process requests SIGKILL for the death of its parent and then becomes the program.

A ``preexec_fn`` would do the same but is unsafe in a parent with threads.

Children of the program do not inherit the signal. A wrapper script around an engine should therefore end in
``exec llama-server "$@"``: without ``exec`` the engine is a child of the script, and outlives a parent that was killed
with SIGKILL. (A parent that is still running, ``engine.launch``, ends the whole process group.)
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the program named in the arguments."""
    parent = int(os.environ.pop("PROMPTAI_GUARD_PARENT", "0"))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        sys.exit(0)  # the parent died before the line above: no signal will come
    try:
        os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606  becoming the program is the point
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[1]}: {error.strerror}")


if __name__ == "__main__":
    main()
