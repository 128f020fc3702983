import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from promptai.device.firmware import find_throttled, parse_throttled, run_command

WriteTree = Callable[[dict[str, str]], Path]


def no_command(_argv: Sequence[str]) -> None:
    """A machine without vcgencmd."""


@pytest.mark.parametrize("text", [None, "", "\n", 'error=1 error_msg="Command not registered"', "throttled=?"])
def test_anything_but_flags_is_none(text: str | None) -> None:
    """An error of the firmware is no "all is well"."""
    assert parse_throttled(text) is None


def test_both_notations_are_hexadecimal() -> None:
    """Only vcgencmd writes 0x."""
    assert parse_throttled("throttled=0x50005\n") == 0x50005
    assert parse_throttled(b"50005\n") == 0x50005


def test_a_machine_without_firmware_flags_has_no_reader(tmp_path: Path) -> None:
    """None, so that the field stays null."""
    assert find_throttled(tmp_path, no_command) is None


def test_a_firmware_that_does_not_answer_once_is_none_once(tmp_path: Path) -> None:
    """A mailbox that is busy for a moment must not end the telemetry."""
    answers = iter(["throttled=0x0", None, "throttled=0x4"])
    read = find_throttled(tmp_path, lambda _: next(answers))

    assert read is not None
    assert [read(), read()] == [None, 0x4]


def test_a_sticky_bit_stays_though_the_firmware_forgets_it(tmp_path: Path) -> None:
    """The kernel's voltage monitor clears the firmware's memory every two seconds."""
    answers = iter(["throttled=0x0", "throttled=0x50005", "throttled=0x0"])
    read = find_throttled(tmp_path, lambda _: next(answers))

    assert read is not None
    assert [read(), read()] == [0x50005, 0x50000]


@pytest.mark.parametrize(
    "path",
    [
        "sys/devices/platform/soc/soc:firmware/get_throttled",
        "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled",
    ],
)
def test_a_file_is_preferred_to_a_command(write_tree: WriteTree, path: str) -> None:
    """A file costs a thousandth of a process."""
    read = find_throttled(write_tree({path: "80008\n"}), no_command)

    assert read is not None
    assert read() == 0x80008


def test_a_command_that_is_not_installed_is_none() -> None:
    """The usual case: no Pi."""
    assert run_command(["promptai-no-such-command"]) is None


def test_a_command_that_fails_is_none() -> None:
    """Whatever it printed before is not an answer."""
    assert run_command([sys.executable, "-S", "-c", "print('throttled=0x0'); raise SystemExit(1)"]) is None


def test_a_command_s_output_is_given() -> None:
    """Its standard output, as text."""
    assert run_command(["echo", "throttled=0x0"]) == "throttled=0x0\n"
