"""Decide what to play in which order, estimate how long it takes, and fit it into a time budget.

A full evaluation keeps a board busy for days, so users need an estimate before and during it, and
with half an hour they need the most informative part of the workload. Order matters: a board that
heats up penalises the last target, so targets take turns instead of running one after another.
Pure: the same input gives the same plan, which lets a run resume.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from promptai.bench.arrivals import Arrivals
from promptai.bench.trace import Cache
from promptai.bench.workload import Conversation, History
from promptai.wire.openai import Message

if TYPE_CHECKING:
    from random import Random

#: Most conversations per stage when several targets take turns, so a slow drift affects all alike.
_LONGEST_BLOCK = 10
#: Fewest blocks when several targets take turns: A B, B A, A B, B A.
_FEWEST_TURNS = 4
#: Fewest conversations per block and concurrent place: at the end of a block, concurrency runs down.
_ROUNDS = 4


class Protocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    The definition of the requests; the defaults make the paper's explicit.

    Attributes:
        max_tokens: Limit of generated tokens per answer.
        seed: Seed of the engine's sampler, the arrivals and the selection from the workload.
        caches: ``cold`` (KV cache off), ``warm`` (it may contain earlier turns), or both.
        history: Assistant turns in the prompt. ``data``: the data set's, so every model gets the same prompts;
            ``own``: the model's answers.
        repeats: Passes over the workload.
        concurrency: Concurrent conversations in a closed loop.
        ignore_eos: Every answer runs to ``max_tokens``: for throughput, not for realism.
    """

    max_tokens: int = 500
    seed: int = 0
    caches: tuple[Cache, ...] = ("cold", "warm")
    history: History = "data"
    repeats: int = 1
    concurrency: int = 1
    arrivals: Arrivals = Arrivals()
    ignore_eos: bool = False

    @property
    def one_at_a_time(self) -> bool:
        """Whether at most one request is in progress at any time."""
        return self.concurrency == 1 and self.arrivals.kind == "closed"


class Stage(msgspec.Struct, frozen=True):
    """A part of a run with one target and one cache setting: conversation ids in order."""

    target: str
    cache: Cache
    repeat: int
    conversations: tuple[str, ...]


class WarmUpRates(msgspec.Struct, frozen=True):
    """
    Rates of a target from its warm-up, for forecasts.

    Attributes:
        answer_tokens: Expected tokens per answer.
    """

    prefill_tps: float
    decode_tps: float
    chars_per_token: float
    answer_tokens: float


class RequestWork(msgspec.Struct, frozen=True):
    """
    The work that requests cause an engine.

    Attributes:
        chars: Characters of the workload to prefill.
        reread: Number of the model's own earlier answers to prefill.
        answers: Number of answers to decode.
    """

    chars: int = 0
    reread: int = 0
    answers: int = 0

    def plus(self, other: "RequestWork", times: int = 1) -> "RequestWork":
        """Add ``times`` the other; -1 subtracts it."""
        return RequestWork(
            self.chars + times * other.chars, self.reread + times * other.reread, self.answers + times * other.answers
        )

    def seconds(self, rates: WarmUpRates) -> float:
        """Expected duration in seconds."""
        prefill = self.chars / rates.chars_per_token + self.reread * rates.answer_tokens
        return prefill / rates.prefill_tps + self.answers * rates.answer_tokens / rates.decode_tps


def plan_stages(targets: Sequence[str], conversations: Sequence[str], protocol: Protocol) -> list[Stage]:
    """
    Return every stage of a run, in order.

    A block of conversations goes through all targets in order, the next block in reverse (A B, B A, …):
    slow drifts of temperature or clock then affect all alike, and adjacent stages of one target share a
    loaded engine. A single target, or open arrivals, play one block, because a stage begins only when
    the last conversation of the one before has ended, and until then concurrency is lower than requested.
    """
    size = max(1, len(conversations))
    if len(targets) > 1 and protocol.arrivals.kind == "closed":
        size = max(1, min(_LONGEST_BLOCK, size // _FEWEST_TURNS))
        if protocol.concurrency > 1:
            size = max(size, _ROUNDS * protocol.concurrency)
    stages: list[Stage] = []
    order = list(targets)
    for repeat in range(protocol.repeats):
        for start in range(0, len(conversations), size):
            block = tuple(conversations[start : start + size])
            for target in order:
                stages += [Stage(target, cache, repeat, block) for cache in protocol.caches]
            order.reverse()
    return stages


def arrival_seed(stage: Stage, seed: int) -> str:
    """Seed of a stage's arrivals: the same for every target and cache setting, and in a resumed run."""
    return f"{seed}/{stage.repeat}/{stage.conversations[0]}"


def stratified(conversations: Sequence[Conversation], count: int, generator: "Random") -> list[Conversation]:
    """
    Draw ``count`` conversations that represent all lengths.

    One from each of ``count`` equal strata by prompt length; the original order is kept.
    """
    total = len(conversations)
    if count >= total:
        return list(conversations)
    ranked = sorted(range(total), key=lambda i: (_weight(conversations[i]), i))
    bounds = [round(total * edge / count) for edge in range(count + 1)]
    chosen = {ranked[generator.randrange(low, high)] for low, high in pairwise(bounds)}
    return [conversations[i] for i in sorted(chosen)]


def request_work(conversation: Conversation, turn: int, cache: Cache, history: History) -> RequestWork:
    """
    Return the work of one request.

    Cold: the whole prompt. Warm: the part added since the previous turn, without the model's own answer.
    """
    chars, reread = _prompt_chars(conversation, turn, history), turn if history == "own" else 0
    if cache == "warm" and turn > 0:
        chars, reread = chars - _prompt_chars(conversation, turn - 1, history), 0
    return RequestWork(chars, reread, 1)


def conversation_seconds(conversation: Conversation, cache: Cache, rates: WarmUpRates, history: History) -> float:
    """Expected seconds of playing ``conversation`` once."""
    turns = range(conversation.user_turns)
    return sum(request_work(conversation, turn, cache, history).seconds(rates) for turn in turns)


def typical_prompt(conversations: Sequence[Conversation], history: History) -> list[Message]:
    """Return the prompt closest to the mean length, to represent the workload when rates are measured."""
    turns = [(conversation, turn) for conversation in conversations for turn in range(conversation.user_turns)]
    chars = [_prompt_chars(conversation, turn, history) for conversation, turn in turns]
    mean = sum(chars) / len(chars)
    conversation, turn = turns[min(range(len(turns)), key=lambda number: abs(chars[number] - mean))]
    return conversation.prompt(turn)


def fit_budget(
    conversations: Sequence[Conversation],
    budget_s: float,
    seconds: Callable[[Conversation], float],
    generator_for: Callable[[int], "Random"],
) -> list[Conversation]:
    """
    Return the largest stratified part of the workload that fits ``budget_s``.

    If none fits, the shortest conversation alone; empty if that does not fit either.

    Args:
        seconds: Estimates one conversation over all targets, caches and repeats.
        generator_for: Returns a newly seeded generator for each size tried.
    """
    for count in range(len(conversations), 0, -1):
        part = stratified(conversations, count, generator_for(count))
        if sum(seconds(conversation) for conversation in part) <= budget_s:
            return part
    shortest = min(conversations, key=seconds, default=None)
    return [shortest] if shortest is not None and seconds(shortest) <= budget_s else []


def chars_per_token(vocabulary: int | None) -> float:
    """
    Return a cautious estimate of characters per token of technical English.

    Common vocabularies of 32 k to 256 k tokens reach 3.6 to 4.5. The estimate is rather low: a context
    that is too small loses conversations; one that is slightly too large costs some memory.

    Args:
        vocabulary: Size in tokens; ``None``: unknown.
    """
    return 1.8 if vocabulary is not None and vocabulary < 16_000 else 3.0


def context_needed(
    conversations: Iterable[Conversation], max_tokens: int, *, chars_per_token: float, history: History
) -> int:
    """Tokens of context for the longest conversation with its answers, rounded up to a multiple of 512."""

    def tokens(conversation: Conversation) -> int:
        # 40 characters per message allow for the chat template's markers.
        chars = _prompt_chars(conversation, conversation.user_turns - 1, history) + 40 * len(conversation.messages)
        return round(chars / chars_per_token) + max_tokens * (conversation.user_turns if history == "own" else 1)

    return -(-max(map(tokens, conversations), default=max_tokens) // 512) * 512


def _prompt_chars(conversation: Conversation, turn: int, history: History) -> int:
    """Characters of a prompt without the model's own answers."""
    if history == "data":
        return conversation.prompt_chars(turn)
    return sum(len(message.content) for message in conversation.prompt(turn, [""] * turn))


def _weight(conversation: Conversation) -> int:
    return conversation.prompt_chars(conversation.user_turns - 1)
