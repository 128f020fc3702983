"""Read throttling flags from a Raspberry Pi's firmware, which Linux does not report.

On a Pi the firmware, not the kernel, lowers the clock when the board is hot or its
supply voltage drops, and ``scaling_cur_freq`` still shows the frequency that the kernel
requested. A benchmark that misses this blames the model for a bad USB cable. The
firmware reports one word of flags: ``vcgencmd get_throttled``.

Older kernels also have a sysfs file ``get_throttled``. It is not used: its driver calls
it deprecated, writes a backtrace to the kernel log on the first read, returns a stored
word instead of the firmware's current one, and was removed in March 2025
(raspberrypi/linux pull request 6697).

Bits (Raspberry Pi documentation, vcgencmd): 0 under-voltage, 1 ARM frequency
capped, 2 throttled, 3 soft temperature limit, each *now*; 16 to 19 the same
"has occurred since boot". Compare 16 to 19 before and after a run.

Containers have no ``vcgencmd`` unless it is provided together with /dev/vcio. The
kernel's voltage monitor (hwmon ``rpi_volt``) is no substitute: it reports under-voltage
only, and zeros for the other bits would be invented good news.
"""

import re
import subprocess
from collections.abc import Callable, Sequence

#: Runs a command; returns its standard output, or ``None`` when it cannot run, fails or times out.
RunCommand = Callable[[Sequence[str]], str | None]
#: Reads the flags; ``None`` when the firmware did not respond this time.
ReadThrottled = Callable[[], int | None]

#: The slowest response, the power chip's, is reported to take 0.1 s; a hanging mailbox must not block the sampler.
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
    Parse the flags in ``throttled=0x50005``.

    Returns:
        ``None`` for anything else, such as the firmware's ``error=1 ...``.
    """
    found = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)", (text or "").strip())
    return None if found is None else int(found[1], 16)


def find_throttled(run: RunCommand = run_command) -> ReadThrottled | None:
    """
    Return a reader of the flags; ``None`` on machines without such firmware.

    A sticky bit seen once stays set in all later readings, because the kernel's voltage
    monitor makes the firmware clear them every 2 s.
    """

    def read() -> int | None:
        return parse_throttled(run(("vcgencmd", "get_throttled")))

    if read() is None:
        return None
    seen = 0

    def read_sticky() -> int | None:
        nonlocal seen
        flags = read()
        if flags is None:
            return None
        seen |= flags & _STICKY_BITS
        return flags | seen

    return read_sticky
