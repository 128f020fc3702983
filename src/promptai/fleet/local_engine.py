"""One engine of this machine, as ``fleet.local`` sees it; the real one is in ``fleet.launcher``."""

from typing import Protocol, Self

from promptai.errors import EngineDiedError


class LocalEngine(Protocol):
    """An engine of this machine: ready inside its block, and gone after it, whatever interrupts."""

    @property
    def base_url(self) -> str:
        """Where its API is, inside the block."""

    @property
    def pid(self) -> int | None:
        """Its process, as soon as there is one."""

    def resident_bytes(self) -> int | None:
        """What it holds in memory, already while it loads; ``None`` where nobody knows."""

    async def death(self) -> EngineDiedError | None:
        """Why it is gone, or as good as; ``None`` while it is well. What it does beside that may take seconds."""

    async def __aenter__(self) -> Self:
        """Start it; raises ``PromptAIError`` or ``OSError`` when that fails."""

    async def __aexit__(self, *_exc: object) -> None:
        """End it."""
