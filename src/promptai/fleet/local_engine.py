"""The interface of an engine on this machine for ``fleet.local``; ``fleet.launcher`` implements it."""

from typing import Protocol, Self

from promptai.errors import EngineDiedError


class LocalEngine(Protocol):
    """An engine of this machine: ready inside its ``async with`` block and gone after it, even when cancelled."""

    @property
    def base_url(self) -> str:
        """URL of its API, inside the block."""

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` before the process exists."""

    def resident_bytes(self) -> int | None:
        """Resident memory, also while it loads; ``None`` when unknown."""

    async def death(self) -> EngineDiedError | None:
        """Return why it died or hangs, ``None`` while it is healthy; may take seconds."""

    async def __aenter__(self) -> Self:
        """Start the engine; raises ``PromptAIError`` or ``OSError`` on failure."""

    async def __aexit__(self, *_exc: object) -> None:
        """End the engine."""
