"""What a request wants, and where it is: plain values that go with it on its way."""

from typing import Any

import msgspec

from promptai.wire.inference import InferenceRequest


class ClientRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    What is to be done.

    Attributes:
        path: Of the engine's API.
        body: As it came, after names were resolved; goes to the engine with a few fields of ours.
        request: What was read of it.
        text: The prompt as one text.
        attempts: How often it may be sent, whatever happens.
        stall_s: Silence beyond what computing explains.
    """

    path: str
    body: dict[str, Any]
    request: InferenceRequest
    text: str
    attempts: int = 4
    stall_s: float = 15.0

    @property
    def chat(self) -> bool:
        """Whether it is a chat."""
        return self.request.messages is not None


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """
    Where a request is, for whoever waits.

    Attributes:
        stage: ``queued``, ``loading``, ``prefill`` or ``decode``.
        place: How many are before it in the queue.
        share: Of loading or prefill that is done, 0 to 1.
        left_s: Seconds to the first token, as it looks.
    """

    stage: str
    place: int | None = None
    share: float | None = None
    left_s: float | None = None
