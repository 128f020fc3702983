import os
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.real

GUARD = (sys.executable, "-m", "promptai.engine.guard")
#: Starts a guarded program that sleeps for a minute, like engine.launch, and prints its process id.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-m", "promptai.engine.guard", "/bin/sh", "-c", "echo $$; exec sleep 60"],
    env={**os.environ, "PROMPTAI_GUARD_PARENT": str(os.getpid())},
)
child.wait()
"""


def guarded(*program: str, parent: int | None) -> subprocess.CompletedProcess[str]:
    """Run a program under the guard, as a child of the given process."""
    return subprocess.run(
        [*GUARD, *program],
        env={**os.environ, "PROMPTAI_GUARD_PARENT": str(parent or os.getpid())},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_engine_dies_with_a_killed_parent() -> None:
    """SIGKILL leaves the parent no time to stop it."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert not gone(engine)

        parent.kill()
        parent.wait()

        give_up = time.monotonic() + 20
        while not gone(engine) and time.monotonic() < give_up:
            time.sleep(0.005)
        assert gone(engine)


def test_does_not_start_after_the_parents_death() -> None:
    """The kernel sends its signal at a death, not after it."""
    no_process = 2**22 + 1  # above the largest process id that Linux gives
    done = guarded("/bin/echo", "I live", parent=no_process)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_runs_the_program_as_if_unguarded() -> None:
    """With its arguments, without the guard's variable, and with the default Ctrl-C handler."""
    program = "import os, signal, sys; print('PROMPTAI_GUARD_PARENT' in os.environ, sys.argv[1:], signal.getsignal(2))"

    done = guarded(sys.executable, "-c", program, "a b", "--x", parent=None)

    assert done.stdout.startswith("False ['a b', '--x'] <built-in function default_int_handler>")


def test_the_exit_code_is_the_programs() -> None:
    """The guard becomes the program; there is no process in between."""
    assert guarded("/bin/sh", "-c", "exit 7", parent=None).returncode == 7
