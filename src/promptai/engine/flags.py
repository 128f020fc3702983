"""Every flag that an engine is started with, explicit and recorded.

llama-server's defaults are made for a workstation: 8 GiB of prompt cache, four
slots, the model's whole context. On a board they decide whether it swaps, and a
measurement that does not name them cannot be repeated. So no flag that matters
is left to a default: this value goes into the command line, and the same value
into the run's manifest.

Builds come and go with their options: ``--fit`` (2026) changes context and slots
behind our back unless told not to, and a build of 2024 ends at its mere mention;
``--no-mmap`` has gone the other way. So ``newer_switches`` reads in a build's own
help what it must be told beyond the flags that all ages understand.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

#: What a build is told if its help names the option: the same for every model.
_NEWER = (
    ("--fit", ("--fit", "off")),
    ("--no-context-shift", ("--no-context-shift",)),
    ("--load-mode", ("--load-mode", "mmap")),
)


#: Of a KV cache, by its type; q8_0 holds 32 numbers and an f16 scale in 34 bytes.
BYTES_PER_VALUE = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


def newer_switches(help_text: str) -> tuple[str, ...]:
    """The switches that this build needs and that others would not know, from what its ``--help`` prints."""
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text))
    return tuple(word for option, words in _NEWER if option in known for word in words)


class EngineFlags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    What one engine is started with.

    Attributes:
        port: TCP port on 127.0.0.1.
        threads: CPU threads for decode and prefill alike.
        context: Tokens of context of *all* slots together, as llama-server counts.
        slots: Conversations that can be in progress at once.
        batch: Most prompt tokens of one logical step; ``ubatch`` of one computation.
            Smaller than llama-server's 2048 so that a board's buffers stay small
            and decoding streams wait less for somebody else's prompt.
        cache_type_k, cache_type_v: Type of the KV cache's numbers.
        cache_ram_mib: Prompt cache beside the KV cache; 0 turns it off (llama-server: 8192).
        mmap: Map the file instead of reading it, so that weights are page cache.
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
        """The model's name in the API: the file's stem, never its path."""
        return Path(self.model).stem

    def to_argv(self, command: Sequence[str] = ()) -> list[str]:
        """
        The command line of a native ``llama-server``.

        ``--no-webui`` is the older spelling of ``--no-ui`` and is understood by both ages.

        Args:
            command: The program and what ``newer_switches`` says of it.
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
