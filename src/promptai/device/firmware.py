"""Ask a Raspberry Pi's firmware what Linux does not know.

On a Pi the firmware, not the kernel, lowers the clock when the board is hot or
its supply sags, and ``scaling_cur_freq`` goes on showing what the kernel asked
for. A benchmark that misses this blames the model for a bad USB cable. The
firmware's own account is one word of flags: ``vcgencmd get_throttled``.

Older kernels also have it as a file, ``get_throttled`` in sysfs. It is not read: its
driver calls it deprecated, writes a backtrace into the kernel log at the first
read, gives a word that it keeps and not the firmware's own of now, and was removed
in March 2025 (raspberrypi/linux pull request 6697).

Bits (Raspberry Pi documentation, vcgencmd): 0 under-voltage, 1 ARM frequency
capped, 2 throttled, 3 soft temperature limit, each *now*; 16 to 19 the same
"has occurred since boot". Compare 16 to 19 before and after a run.

In a container there is no ``vcgencmd`` unless it was put there with /dev/vcio.
The kernel's voltage monitor (hwmon ``rpi_volt``) is no substitute: it knows
under-voltage alone, and to fill the other bits with zeros would be to invent
good news.
"""

import re
import subprocess
from collections.abc import Callable, Sequence

#: Runs a command; gives its standard output, or ``None`` when it cannot run, fails or takes too long.
RunCommand = Callable[[Sequence[str]], str | None]
#: Reads the flags; ``None`` when the firmware did not answer this time.
ReadThrottled = Callable[[], int | None]

#: The slowest answer, the power chip's, is reported to take 0.1 s; a mailbox that hangs must not hang us.
_COMMAND_TIMEOUT_S = 2.0
_STICKY_BITS = 0xF0000


def run_command(argv: Sequence[str]) -> str | None:
    """Run a command without a shell; see ``RunCommand``."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed words, never a user's
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_COMMAND_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def parse_throttled(text: str | None) -> int | None:
    """
    Give the flags in ``throttled=0x50005``.

    Returns:
        ``None`` for anything else, such as the firmware's ``error=1 ...``.
    """
    found = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)", (text or "").strip())
    return None if found is None else int(found[1], 16)


def find_throttled(run: RunCommand = run_command) -> ReadThrottled | None:
    """
    Give a reader of the flags; ``None`` on a machine whose firmware keeps none.

    A sticky bit that was seen once stays set in all later readings: the kernel's
    voltage monitor asks the firmware every 2 s to clear them.
    """

    def ask() -> int | None:
        return parse_throttled(run(("vcgencmd", "get_throttled")))

    if ask() is None:
        return None
    seen = 0

    def read_sticky() -> int | None:
        nonlocal seen
        flags = ask()
        if flags is None:
            return None
        seen |= flags & _STICKY_BITS
        return flags | seen

    return read_sticky
