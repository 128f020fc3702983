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
    """An error of the firmware is no "all is well"."""
    assert parse_throttled(text) is None


def test_flags_are_hexadecimal() -> None:
    """As vcgencmd writes them."""
    assert parse_throttled("throttled=0x50005\n") == 0x50005


def test_a_machine_without_firmware_flags_has_no_reader() -> None:
    """None, so that the field stays null."""
    assert find_throttled(lambda _: None) is None


def test_a_firmware_that_does_not_answer_once_is_none_once() -> None:
    """A mailbox that is busy for a moment must not end the telemetry."""
    answers = iter(["throttled=0x0", None, "throttled=0x4"])
    read = find_throttled(lambda _: next(answers))

    assert read is not None
    assert [read(), read()] == [None, 0x4]


def test_a_sticky_bit_stays_though_the_firmware_forgets_it() -> None:
    """The kernel's voltage monitor clears the firmware's memory every two seconds."""
    answers = iter(["throttled=0x0", "throttled=0x50005", "throttled=0x0"])
    read = find_throttled(lambda _: next(answers))

    assert read is not None
    assert [read(), read()] == [0x50005, 0x50000]


def test_the_kernel_s_deprecated_file_is_not_touched(pi5: Path, write_tree: WriteTree) -> None:
    """Reading it writes a backtrace into the kernel log, and its word is an old one."""
    write_tree({"sys/devices/platform/soc/soc:firmware/get_throttled": "80008\n"})

    assert Sampler(pi5, lambda _: None, cpus=frozenset({0})).sample().throttled is None


def test_a_command_that_is_not_installed_is_none() -> None:
    """The usual case: no Pi."""
    assert run_command(["promptai-no-such-command"]) is None


def test_a_command_that_fails_is_none() -> None:
    """Whatever it printed before is not an answer."""
    assert run_command([sys.executable, "-S", "-c", "print('throttled=0x0'); raise SystemExit(1)"]) is None


def test_a_command_s_output_is_given() -> None:
    """Its standard output, as text."""
    assert run_command(["echo", "throttled=0x0"]) == "throttled=0x0\n"
