import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.device.firmware import find_throttled, parse_throttled, run_command
from promptai.device.sampler import Sampler

WriteTree = Callable[[dict[str, str]], Path]


@pytest.mark.parametrize(
    "text", [None, "", "\n", 'error=1 error_msg="Command not registered"', "throttled=?", "50005", "throttled=-1"]
)
def test_anything_but_flags_is_none(text: str | None) -> None:
    """A firmware error does not mean "no throttling"."""
    assert parse_throttled(text) is None


def test_flags_are_hexadecimal() -> None:
    """As vcgencmd writes them."""
    assert parse_throttled("throttled=0x50005\n") == 0x50005


def test_a_machine_without_firmware_flags_has_no_reader() -> None:
    """The field stays null."""
    assert find_throttled(lambda _: None) is None


def test_a_single_missing_response_is_none_once() -> None:
    """A mailbox that is briefly busy must not end the telemetry."""
    answers = iter(["throttled=0x0", None, "throttled=0x4"])
    read = find_throttled(lambda _: next(answers))

    assert read is not None
    assert [read(), read()] == [None, 0x4]


def test_a_sticky_bit_stays_set_after_the_firmware_clears_it() -> None:
    """The kernel's voltage monitor makes the firmware clear its bits every two seconds."""
    answers = iter(["throttled=0x0", "throttled=0x50005", "throttled=0x0"])
    read = find_throttled(lambda _: next(answers))

    assert read is not None
    assert [read(), read()] == [0x50005, 0x50000]


def test_the_kernel_s_deprecated_file_is_not_read(pi5: Path, write_tree: WriteTree) -> None:
    """Reading it writes a backtrace to the kernel log and returns an outdated word."""
    write_tree({"sys/devices/platform/soc/soc:firmware/get_throttled": "80008\n"})

    assert Sampler(pi5, lambda _: None, cpus=frozenset({0})).sample().throttled is None


def test_a_command_that_is_not_installed_is_none() -> None:
    """The usual case: the machine is not a Pi."""
    assert run_command(["promptai-no-such-command"]) is None


def test_a_command_that_fails_is_none() -> None:
    """Its output before the failure is ignored."""
    assert run_command([sys.executable, "-S", "-c", "print('throttled=0x0'); raise SystemExit(1)"]) is None


def test_a_command_s_output_is_returned() -> None:
    """Its standard output, as text."""
    assert run_command(["echo", "throttled=0x0"]) == "throttled=0x0\n"
