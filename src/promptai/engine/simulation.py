"""The arithmetic of a pretended engine: who computes when, and what comes out.

A harness that measures engines has to be measured itself, and a router needs
four boards where there is one laptop. Both want an engine whose speed is known
because it was chosen. This is one: continuous batching as in llama-server (each
step computes some prompt tokens and one token for every decoding stream), whose
steps take exactly as long as the configured rates say.

    queued --a slot is free--> prefill --prompt computed--> decode --end--> gone
                                  (first token)     (one token a step)

Pure: no clock, no sockets, no randomness. ``engine.simulator`` gives it time and
``engine.simulated`` a network. The text is a chain of hashes of all that stands before it, so
that it is the same in every process, and the same when it is continued from
any point.
"""

import re
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from promptai.wire.llamaserver import Timings

#: At most six characters, with the white space before them; template marks are one token each.
_PIECE = re.compile(r"<\|[a-z]+\|>|\s?[^\s<]{1,6}|\s|<")
_SIMILARITY = 0.1
_WORDS = (
    *("cell", "link", "fibre", "mast", "radio", "alarm", "power", "load", "drift", "clock", "packet", "router"),
    *("sector", "backup", "signal", "uplink", "switch", "node", "queue", "frame", "reset", "check", "next"),
    *("the", "a", "is", "was", "has", "no", "and", "when", "then", "over", "under", "high", "low"),
)


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    What to pretend.

    Attributes:
        prefill_tps: Prompt tokens a second, shared by all slots.
        decode_tps: Tokens a second of a stream that is alone.
        slots: Streams at once; further requests wait in order of arrival.
        decode_slowdown: What each further stream adds to a decode step, as a share
            of the step of one. 0: batching is free; 1: it gains nothing.
        batch: Most prompt tokens of one step, so that decoding streams are not held up longer.
        context: Tokens of context of one slot.
        answer_tokens: Mean length of an answer; ``None``: it goes on to ``max_tokens``.
        host_cache: Tokens of conversations that are kept when they leave their slot (``--cache-ram``).
        load_s: Seconds after the start during which it says that it is loading.
        time_scale: 10 makes everything ten times as fast, rates and loading alike.
        model: The name it answers to.
    """

    prefill_tps: float = 60.0
    decode_tps: float = 10.0
    slots: int = 1
    decode_slowdown: float = 0.5
    batch: int = 512
    context: int = 8192
    answer_tokens: int | None = None
    host_cache: int = 0
    load_s: float = 0.0
    time_scale: float = 1.0
    model: str = "simulated"

    def __post_init__(self) -> None:
        for name in ("prefill_tps", "decode_tps", "slots", "batch", "context", "time_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")


class ChatMessage(Protocol):
    """A message of a conversation, in whichever form."""

    @property
    def role(self) -> str:
        """Who speaks."""

    @property
    def content(self) -> str:
        """What is said."""


class Request:
    """
    One prompt on its way.

    Attributes:
        max_tokens: Bounds its answer.
        id_slot: The slot that it waits for; the first that is free where there is none of that number.
        slot: The one that it got.
    """

    def __init__(self, prompt: list[int], *, max_tokens: int, use_cache: bool, id_slot: int = -1) -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.use_cache = use_cache
        self.id_slot = id_slot
        self.slot = -1
        self.cached = 0
        self.prefilled = 0
        self.generated: list[int] = []
        self.finish_reason: str | None = None
        self.t_start: float | None = None
        self.t_first: float | None = None
        self.t_last: float | None = None
        self._state = 0

    @property
    def timings(self) -> Timings:
        """The account that llama-server would give, from the simulated clock."""
        start, first, last = self.t_start or 0.0, self.t_first or 0.0, self.t_last or 0.0
        return Timings(
            cache_n=self.cached,
            prompt_n=len(self.prompt) - self.cached,
            prompt_ms=(first - start) * 1000,
            predicted_n=len(self.generated),
            predicted_ms=(last - first) * 1000,
        )

    def emit(self, now: float, answer_tokens: int | None) -> str:
        """Generate the next token at ``now``; decide whether it was the last."""
        if self.t_first is None:
            self.t_first = now
            self._state = fold(0, self.prompt)
        text = " " + _WORDS[zlib.crc32(self._state.to_bytes(4, "big")) % len(_WORDS)]
        token = piece_id(text)
        self.generated.append(token)
        self._state = fold(self._state, [token])
        self.t_last = now
        if len(self.generated) >= self.max_tokens:
            self.finish_reason = "length"
        elif answer_tokens is not None and zlib.crc32(b"end" + self._state.to_bytes(4, "big")) % answer_tokens == 0:
            self.finish_reason = "stop"
        return text


class Emission(NamedTuple):
    """A token that a step produced, and whether it ends the answer."""

    request: Request
    text: str
    last: bool
    token: int


class SimulatedSlot:
    """
    One slot.

    Attributes:
        cache: What its KV cache holds.
        request: Whom it serves.
        left: The how-manieth it was to be left, of all; -1: it was never taken.
    """

    def __init__(self) -> None:
        self.cache: list[int] = []
        self.request: Request | None = None
        self.left = -1

    def shared_prefix(self, prompt: list[int]) -> int:
        """Tokens at the start of ``prompt`` that the cache holds already."""
        return shared_prefix(self.cache, prompt)


class Scheduler:
    """
    Continuous batching over slots; ``step`` is the whole of it.

    Attributes:
        started: Requests that got a slot at the beginning of the last step.
        kept: Conversations that left their slot, the one that was there first first.
        prompted: Requests of whose prompts the last step computed a part.
    """

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.slots = [SimulatedSlot() for _ in range(config.slots)]
        self.queue: deque[Request] = deque()
        self.kept: deque[list[int]] = deque()
        self.started: list[Request] = []
        self.prompted: list[Request] = []
        self._releases = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.queue and all(slot.request is None for slot in self.slots)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.queue.append(request)

    def drop(self, request: Request) -> None:
        """Forget a request whose caller has gone; its slot is free from the next step on."""
        if request in self.queue:
            self.queue.remove(request)
        for slot in self.slots:
            if slot.request is request:
                self._release(slot)

    def step(self, now: float) -> tuple[float, list[Emission]]:
        """
        Compute one batch that starts at ``now`` (seconds).

        Returns:
            The seconds it takes, and the tokens that are there when it is done.
        """
        self._assign(now)
        busy = [slot.request for slot in self.slots if slot.request is not None]
        decoding = [request for request in busy if request.t_first is not None]
        room, prompt_tokens = self.config.batch, 0
        self.prompted = []
        for request in busy:
            take = min(room, len(request.prompt) - request.prefilled) if request.t_first is None else 0
            if take:
                request.prefilled += take
                room -= take
                prompt_tokens += take
                self.prompted.append(request)
        duration = prompt_tokens / self.config.prefill_tps
        if decoding:
            duration += (1 + self.config.decode_slowdown * (len(decoding) - 1)) / self.config.decode_tps
        duration /= self.config.time_scale
        ready = decoding + [r for r in busy if r.t_first is None and r.prefilled == len(r.prompt)]
        done = now + duration
        texts = [(r, r.emit(done, self.config.answer_tokens)) for r in ready]
        emissions = [Emission(r, text, r.finish_reason is not None, r.generated[-1]) for r, text in texts]
        for slot in self.slots:
            if slot.request is not None and slot.request.finish_reason is not None:
                self._release(slot)
        return duration, emissions

    def _assign(self, now: float) -> None:
        self.started = []
        free = [slot for slot in self.slots if slot.request is None]
        passed: list[Request] = []
        while self.queue and free:
            request = self.queue.popleft()
            open_to_it = free
            if 0 <= request.id_slot < len(self.slots):
                open_to_it = [slot for slot in free if slot is self.slots[request.id_slot]]
            if not open_to_it:
                passed.append(request)
                continue
            slot, swaps = _chosen(open_to_it, request.prompt)
            free.remove(slot)
            if swaps and open_to_it is free:  # nothing is swapped in a slot that was asked for by its number
                self._recall(slot, request.prompt)
            # As llama-server: the last prompt token is always computed, for its logits.
            limit = max(0, len(request.prompt) - 1)
            request.cached = min(slot.shared_prefix(request.prompt), limit) if request.use_cache else 0
            request.prefilled = request.cached
            request.t_start = now
            request.slot = self.slots.index(slot)
            slot.request = request
            self.started.append(request)
        self.queue.extendleft(reversed(passed))

    def _recall(self, slot: SimulatedSlot, prompt: list[int]) -> None:
        """Swap a slot's conversation for a kept one that the prompt has more in common with."""
        if not self.config.host_cache:
            return
        # As llama-server: one of which less than a quarter would stay is not taken, for the rest of it would be gone.
        likely = [kept for kept in self.kept if shared_prefix(kept, prompt) >= len(kept) / 4]
        best = max(likely, key=lambda kept: shared_prefix(kept, prompt), default=[])
        left = slot.cache
        if shared_prefix(best, prompt) > slot.shared_prefix(prompt):
            self.kept.remove(best)
            slot.cache = best
        elif slot.shared_prefix(prompt) == len(left):
            return  # it goes on with what is there
        if left:
            self.kept.append(left)
        while sum(map(len, self.kept)) > self.config.host_cache:
            self.kept.popleft()

    def _release(self, slot: SimulatedSlot) -> None:
        if slot.request is not None:
            slot.cache = slot.request.prompt[: slot.request.prefilled] + slot.request.generated
            slot.request = None
            slot.left = self._releases
            self._releases += 1


def _chosen(free: Sequence[SimulatedSlot], prompt: list[int]) -> tuple[SimulatedSlot, bool]:
    """
    As llama-server: the slot that begins most alike, by more than a tenth of the prompt; else the one left first.

    A template's words are a tenth of a short question.

    Returns:
        The slot, and whether the prompt cache is looked into: not where half of what the slot holds would stay.
    """
    alike = max(free, key=lambda slot: slot.shared_prefix(prompt))
    shared = alike.shared_prefix(prompt)
    if shared > _SIMILARITY * len(prompt):
        return alike, shared < len(alike.cache) / 2
    return min(free, key=lambda slot: slot.left), True


def shared_prefix(held: list[int], wanted: list[int]) -> int:
    """Tokens that both begin with."""
    shared = 0
    for one, other in zip(held, wanted, strict=False):
        if one != other:
            break
        shared += 1
    return shared


def fold(state: int, tokens: list[int]) -> int:
    """A running hash of tokens: folding a list in two parts gives the same as in one."""
    for token in tokens:
        state = (state * 1_000_003 ^ token) & 0xFFFFFFFF
    return state


def piece_id(piece: str) -> int:
    """The id of one piece of text; equal in every process."""
    return zlib.crc32(piece.encode()) & 0x7FFFFFFF


def tokenize(text: str) -> list[int]:
    """Ids of the pieces of ``text``: about four characters each, as with real vocabularies."""
    return [piece_id(piece) for piece in _PIECE.findall(text)]


def render(conversation: Iterable[ChatMessage]) -> str:
    """The prompt of a conversation; a trailing assistant message is left open, to be continued."""
    messages = list(conversation)
    parts = [f"<|{message.role}|>{message.content}<|end|>" for message in messages]
    if messages and messages[-1].role == "assistant":
        return "".join(parts).removesuffix("<|end|>")
    return "".join(parts) + "<|assistant|>"
