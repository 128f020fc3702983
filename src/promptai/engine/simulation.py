"""The scheduling and output of a simulated engine.

A harness that measures engines must be measured itself, and testing a router takes four boards where there is one
laptop. Both need an engine of known speed. This one does continuous batching like llama-server (each step computes some
prompt tokens, and one token for every decoding stream), and its steps take exactly the time that the configured rates
imply.

    queued --a slot is free--> prefill --prompt computed--> decode --end--> gone
                                  (first token)     (one token a step)

Pure: no clock, no sockets, no randomness. ``engine.simulator`` adds time and ``engine.simulated`` a network. Each token
is a hash of all tokens before it: the text is the same in every process, and when it is continued from any point.
"""

import re
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from promptai.wire.llamaserver import Timings

#: Up to six characters with the white space before them; a template mark is one token.
_PIECE = re.compile(r"<\|[a-z]+\|>|\s?[^\s<]{1,6}|\s|<")
_SIMILARITY = 0.1
_WORDS = (
    *("cell", "link", "fibre", "mast", "radio", "alarm", "power", "load", "drift", "clock", "packet", "router"),
    *("sector", "backup", "signal", "uplink", "switch", "node", "queue", "frame", "reset", "check", "next"),
    *("the", "a", "is", "was", "has", "no", "and", "when", "then", "over", "under", "high", "low"),
)


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    The speed and size of a simulated engine.

    Attributes:
        prefill_tps: Prompt tokens per second, shared by all slots.
        decode_tps: Tokens per second of a single stream.
        slots: Requests in progress at once; further requests wait in order of arrival.
        decode_slowdown: Time that each further stream adds to a decode step, as a share of a single stream's step.
            0: batching is free; 1: it gains nothing.
        batch: Maximum prompt tokens of one step, which bounds the delay of decoding streams.
        context: Tokens of context of one slot.
        answer_tokens: Mean length of an answer; ``None``: answers end at ``max_tokens``.
        host_cache: Size of the prompt cache in tokens (``--cache-ram``).
        load_s: Seconds after the start during which it reports that it is loading.
        time_scale: 10 makes everything ten times as fast, rates and loading.
        model: The model name that it reports.
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
                raise ValueError(f"{name} must be greater than 0")


class ChatMessage(Protocol):
    """A message of a conversation."""

    @property
    def role(self) -> str:
        """``system``, ``user`` or ``assistant``."""

    @property
    def content(self) -> str:
        """The text."""


class Request:
    """
    A request inside the simulated engine.

    Attributes:
        max_tokens: Maximum length of the answer.
        id_slot: The slot that it waits for; any free slot when there is none of that number.
        slot: The slot that it got; -1: none yet.
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
        """The timings that llama-server would report, from the simulated clock."""
        start, first, last = self.t_start or 0.0, self.t_first or 0.0, self.t_last or 0.0
        return Timings(
            cache_n=self.cached,
            prompt_n=len(self.prompt) - self.cached,
            prompt_ms=(first - start) * 1000,
            predicted_n=len(self.generated),
            predicted_ms=(last - first) * 1000,
        )

    def emit(self, now: float, answer_tokens: int | None) -> str:
        """Generate the next token at ``now``, and decide whether it is the last."""
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
    """A token that a step generated; ``last`` when it ends the answer."""

    request: Request
    text: str
    last: bool
    token: int


class SimulatedSlot:
    """
    One slot.

    Attributes:
        cache: The tokens in its KV cache.
        request: The request that it serves; ``None``: it is free.
        left: Serial number of its last release among those of all slots; -1: never used.
    """

    def __init__(self) -> None:
        self.cache: list[int] = []
        self.request: Request | None = None
        self.left = -1

    def shared_prefix(self, prompt: list[int]) -> int:
        """Return how many tokens at the start of ``prompt`` are in the cache."""
        return shared_prefix(self.cache, prompt)


class Scheduler:
    """
    Continuous batching over slots.

    Attributes:
        started: Requests that got a slot at the beginning of the last step.
        kept: The prompt cache: conversations that left their slot, oldest first.
        prompted: Requests whose prompt was partly computed by the last step.
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
        """Remove a request whose client has disconnected; its slot is free from the next step on."""
        if request in self.queue:
            self.queue.remove(request)
        for slot in self.slots:
            if slot.request is request:
                self._release(slot)

    def step(self, now: float) -> tuple[float, list[Emission]]:
        """
        Compute one batch that starts at ``now`` (seconds).

        Returns:
            The duration in seconds, and the tokens that are generated at its end.
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
            if swaps and open_to_it is free:  # a slot requested by its number keeps its cache
                self._recall(slot, request.prompt)
            # Like llama-server: the last prompt token is always computed, for its logits.
            limit = max(0, len(request.prompt) - 1)
            request.cached = min(slot.shared_prefix(request.prompt), limit) if request.use_cache else 0
            request.prefilled = request.cached
            request.t_start = now
            request.slot = self.slots.index(slot)
            slot.request = request
            self.started.append(request)
        self.queue.extendleft(reversed(passed))

    def _recall(self, slot: SimulatedSlot, prompt: list[int]) -> None:
        """Swap the slot's conversation for a kept one that shares a longer prefix with the prompt."""
        if not self.config.host_cache:
            return
        # Like llama-server: a conversation is not restored when less than a quarter of it would be used.
        likely = [kept for kept in self.kept if shared_prefix(kept, prompt) >= len(kept) / 4]
        best = max(likely, key=lambda kept: shared_prefix(kept, prompt), default=[])
        left = slot.cache
        if shared_prefix(best, prompt) > slot.shared_prefix(prompt):
            self.kept.remove(best)
            slot.cache = best
        elif slot.shared_prefix(prompt) == len(left):
            return  # the prompt continues the slot's conversation
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
    Choose a slot like llama-server: the one with the longest shared prefix, if that is more than a tenth of the prompt.

    Otherwise it is the one released first. (A template's own words are a tenth of a short question.)

    Returns:
        The slot, and whether to search the prompt cache: not when at least half of the slot's tokens would stay.
    """
    alike = max(free, key=lambda slot: slot.shared_prefix(prompt))
    shared = alike.shared_prefix(prompt)
    if shared > _SIMILARITY * len(prompt):
        return alike, shared < len(alike.cache) / 2
    return min(free, key=lambda slot: slot.left), True


def shared_prefix(held: list[int], wanted: list[int]) -> int:
    """Return the length of the common prefix in tokens."""
    shared = 0
    for one, other in zip(held, wanted, strict=False):
        if one != other:
            break
        shared += 1
    return shared


def fold(state: int, tokens: list[int]) -> int:
    """Update a running hash of tokens; folding a list in two parts gives the same result as in one."""
    for token in tokens:
        state = (state * 1_000_003 ^ token) & 0xFFFFFFFF
    return state


def piece_id(piece: str) -> int:
    """Return the id of one piece of text; the same in every process."""
    return zlib.crc32(piece.encode()) & 0x7FFFFFFF


def tokenize(text: str) -> list[int]:
    """Return the token ids of ``text``: about four characters each, like real vocabularies."""
    return [piece_id(piece) for piece in _PIECE.findall(text)]


def render(conversation: Iterable[ChatMessage]) -> str:
    """Return the prompt of a conversation; a trailing assistant message is left open, to be continued."""
    messages = list(conversation)
    parts = [f"<|{message.role}|>{message.content}<|end|>" for message in messages]
    if messages and messages[-1].role == "assistant":
        return "".join(parts).removesuffix("<|end|>")
    return "".join(parts) + "<|assistant|>"
