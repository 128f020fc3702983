"""Shared by the tests of quantising: the bundled model in 16 bits, a fake tool and a progress reporter."""

from collections.abc import Callable, Sequence
from pathlib import Path

from promptai.models.bundled import bundled_model
from promptai.models.gguf import read_header
from promptai.models.requantize import rewrite


def write_half(path: Path) -> Path:
    """Write the bundled model in 16 bits: a real model to quantise."""
    rewrite(bundled_model(), read_header(bundled_model()), path, "f16", {}, lambda _: None)
    return path


class Quiet:
    """A ``ProgressReporter`` that records the work, and interrupts it on demand."""

    def __init__(self, *, interrupt_at: int | None = None) -> None:
        self.begun: list[tuple[str, int | None]] = []
        self.done = 0
        self.interrupt_at = interrupt_at

    def begin(self, what: str, total: int | None, done: int = 0) -> None:
        """Record the start of a step."""
        self.begun.append((what, total))
        self.done = done

    def advance(self, size: int) -> None:
        """Record progress; raise ``KeyboardInterrupt`` in the second step if asked for."""
        self.done += size
        if self.interrupt_at is not None and len(self.begun) == 2 and self.done >= self.interrupt_at:
            raise KeyboardInterrupt

    def notify(self, line: str) -> None:
        """Fail: quantising prints nothing."""
        raise AssertionError(line)


class FakeTool:
    """A llama-quantize that writes a given file and records its command lines."""

    def __init__(self, result: Path | None, *, lines: Sequence[str] = (), code: int = 0, notes: bool = True) -> None:
        self.result, self.lines, self.code, self.notes = result, lines, code, notes
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], *, seen: Callable[[str], None], tick: Callable[[], None]) -> int:
        """Record the command, print the lines and write the result."""
        self.commands.append(list(command))
        tick()
        if "--dry-run" in command:
            seen("version: 1.2 (build 7, commit abc)")
            return 0
        for line in self.lines:
            seen(line)
        if self.result is not None:
            words = [words.split("=str:") for words in command if "=str:" in words] if self.notes else []
            rewrite(self.result, read_header(self.result), Path(command[-3]), "q8_0", dict(words), lambda _: None)
        return self.code
