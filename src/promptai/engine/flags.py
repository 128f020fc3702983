"""The flags that an engine is started with, explicit and recorded.

llama-server's defaults suit a workstation: 8 GiB of prompt cache, four slots, the model's whole context. On a board
they decide whether it swaps, and a measurement that does not name them cannot be repeated. So no flag that matters is
left to its default: one ``EngineFlags`` value makes the command line and is stored in the run's manifest.

Options differ between builds. ``--fit`` (2026) changes context and slots unless it is switched off, and a build of 2024
exits when it is given; ``--no-mmap`` was removed. So ``newer_switches`` reads a build's ``--help`` for the switches it
needs in addition to the flags that every build accepts.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

#: Switches for builds whose help names the option; the same for every model.
_NEWER = (
    ("--fit", ("--fit", "off")),
    ("--no-context-shift", ("--no-context-shift",)),
    ("--load-mode", ("--load-mode", "mmap")),
)


#: Bytes per number of the KV cache, by type; q8_0 stores 32 numbers and an f16 scale in 34 bytes.
BYTES_PER_VALUE = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


def newer_switches(help_text: str) -> tuple[str, ...]:
    """Return the switches that this build needs and other builds reject, from the text of its ``--help``."""
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text))
    return tuple(word for option, words in _NEWER if option in known for word in words)


class EngineFlags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    The flags of one engine.

    Attributes:
        port: TCP port on 127.0.0.1.
        threads: CPU threads for prefill and decode.
        context: Tokens of context of *all* slots together, as llama-server counts them.
        slots: Number of requests in progress at once.
        batch, ubatch: Maximum prompt tokens of one logical step, and of one computation. Smaller than llama-server's
            2048: a board's buffers stay small, and decoding streams wait less for another request's prompt.
        cache_type_k, cache_type_v: Type of the KV cache's numbers.
        cache_ram_mib: Size of the prompt cache in MiB; 0 disables it (llama-server's default: 8192).
        mmap: Map the model file instead of reading it; the weights are then page cache.
    """

    model: str
    port: int
    threads: int
    context: int
    slots: int = 1
    batch: int = 512
    ubatch: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    cache_ram_mib: int = 0
    mmap: bool = True

    @property
    def alias(self) -> str:
        """Name of the model in the API: the file's stem, never its path."""
        return Path(self.model).stem

    def to_argv(self, command: Sequence[str] = ()) -> list[str]:
        """
        Return the command line of a native ``llama-server``.

        ``--no-webui`` is the older spelling of ``--no-ui``; builds of 2024 and 2026 accept it.

        Args:
            command: The program and its ``newer_switches``.
        """
        words = list(command)
        if not self.mmap and "--load-mode" in words:
            words[words.index("--load-mode") + 1] = "none"
        elif not self.mmap:
            words.append("--no-mmap")
        return [
            *words,
            *("--model", self.model, "--alias", self.alias),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--threads", str(self.threads), "--threads-batch", str(self.threads)),
            *("--ctx-size", str(self.context), "--parallel", str(self.slots)),
            *("--batch-size", str(self.batch), "--ubatch-size", str(self.ubatch)),
            *("--cache-type-k", self.cache_type_k, "--cache-type-v", self.cache_type_v),
            *("--cache-ram", str(self.cache_ram_mib)),
            *("--metrics", "--slots", "--no-webui", "--offline"),
        ]
