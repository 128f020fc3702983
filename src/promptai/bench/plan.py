"""What to play in which order, how long it will take, and what fits a time budget.

A full evaluation is days of work for a board. Whoever starts one wants to know
before and during how long it takes; whoever has half an hour wants the part of
the workload that says most. And the order matters: a board that heats up
punishes whatever runs last, so targets take turns instead of running one after
another. Pure: the same input gives the same plan, which is what lets a run resume.
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

#: Most conversations of one stage where several targets take turns: what drifts slowly must weigh on all alike.
_LONGEST_BLOCK = 10
#: Fewest blocks where several targets take turns: A B, B A, A B, B A.
_FEWEST_TURNS = 4
#: How often a block fills its places when conversations run side by side: at its end they are empty, one by one.
_ROUNDS = 4


class Protocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    How requests are made; the defaults are the paper's, made explicit.

    Attributes:
        max_tokens: Cap of generated tokens an answer.
        seed: For the engine's sampler, the arrivals and the choice of a part of the workload.
        caches: ``cold`` (KV cache off), ``warm`` (earlier turns may be in it), or both.
        history: ``data``: the data set's own assistant turns stand in the prompt, so that every
            model gets the same prompts; ``own``: the model's answers do.
        repeats: Times the workload is played.
        concurrency: Conversations at once in a closed loop.
        ignore_eos: Answers always run to ``max_tokens``: for throughput, not for realism.
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
        """Whether never more than one request is in progress."""
        return self.concurrency == 1 and self.arrivals.kind == "closed"


class Stage(msgspec.Struct, frozen=True):
    """A stretch of one target with one cache setting: conversation ids in order."""

    target: str
    cache: Cache
    repeat: int
    conversations: tuple[str, ...]


class WarmUpRates(msgspec.Struct, frozen=True):
    """
    What a target was seen to do in its warm-up, as far as forecasts need it.

    Attributes:
        answer_tokens: Expected tokens an answer.
    """

    prefill_tps: float
    decode_tps: float
    chars_per_token: float
    answer_tokens: float


class RequestWork(msgspec.Struct, frozen=True):
    """
    What requests make an engine compute.

    Attributes:
        chars: Characters of the workload to prefill.
        reread: The model's own earlier answers to prefill.
        answers: Answers to decode.
    """

    chars: int = 0
    reread: int = 0
    answers: int = 0

    def plus(self, other: "RequestWork", times: int = 1) -> "RequestWork":
        """This and ``times`` the other; -1 takes it away."""
        return RequestWork(
            self.chars + times * other.chars, self.reread + times * other.reread, self.answers + times * other.answers
        )

    def seconds(self, rates: WarmUpRates) -> float:
        """How long it should take."""
        prefill = self.chars / rates.chars_per_token + self.reread * rates.answer_tokens
        return prefill / rates.prefill_tps + self.answers * rates.answer_tokens / rates.decode_tps


def plan_stages(targets: Sequence[str], conversations: Sequence[str], protocol: Protocol) -> list[Stage]:
    """
    Every stage of a run, in order.

    Blocks of conversations go through all targets forwards, the next block
    backwards (A B, B A, …): slow drifts of temperature or clock then weigh on all
    alike, and neighbouring stages of one target share a loaded engine. A target that
    is alone, or under open arrivals, plays one block: the next stage begins when the last
    conversation has ended, and until then there are fewer at once than were asked for.
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
    """What seeds a stage's arrivals: the same for every target and cache setting, and when a run resumes."""
    return f"{seed}/{stage.repeat}/{stage.conversations[0]}"


def stratified(conversations: Sequence[Conversation], count: int, generator: "Random") -> list[Conversation]:
    """
    Draw ``count`` conversations that stand for all lengths.

    One comes from each of ``count`` equal strata by prompt length; the original order is kept.
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
    What one request makes an engine compute.

    Cold, its whole prompt; warm, what is new since the turn before, of which the model's own answer is not.
    """
    chars, reread = _prompt_chars(conversation, turn, history), turn if history == "own" else 0
    if cache == "warm" and turn > 0:
        chars, reread = chars - _prompt_chars(conversation, turn - 1, history), 0
    return RequestWork(chars, reread, 1)


def conversation_seconds(conversation: Conversation, cache: Cache, rates: WarmUpRates, history: History) -> float:
    """How long playing ``conversation`` once should take, in seconds."""
    turns = range(conversation.user_turns)
    return sum(request_work(conversation, turn, cache, history).seconds(rates) for turn in turns)


def typical_prompt(conversations: Sequence[Conversation], history: History) -> list[Message]:
    """The prompt that is nearest to the mean length of all: what a target does at it stands for the workload."""
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
    The largest stratified part of the workload that fits ``budget_s``.

    Where no stratified part does, the shortest conversation alone; empty when not even that fits.

    Args:
        seconds: Estimated seconds of one conversation over all targets, caches and repeats.
        generator_for: A fresh seeded generator for each size that is tried.
    """
    for count in range(len(conversations), 0, -1):
        part = stratified(conversations, count, generator_for(count))
        if sum(seconds(conversation) for conversation in part) <= budget_s:
            return part
    shortest = min(conversations, key=seconds, default=None)
    return [shortest] if shortest is not None and seconds(shortest) <= budget_s else []


def chars_per_token(vocabulary: int | None) -> float:
    """
    Fewest characters a token that a vocabulary of this size can be expected to reach on technical English.

    Common ones reach 3.6 to 4.5 (32 k to 256 k tokens). Rather too few: a context that is too
    small loses conversations, one that is a little too large costs some memory.
    """
    return 1.8 if vocabulary is not None and vocabulary < 16_000 else 3.0


def context_needed(
    conversations: Iterable[Conversation], max_tokens: int, *, chars_per_token: float, history: History
) -> int:
    """Tokens of context that the longest conversation needs, its answers included, rounded up to 512."""

    def tokens(conversation: Conversation) -> int:
        # 40 characters a message stand for the marks of the chat template.
        chars = _prompt_chars(conversation, conversation.user_turns - 1, history) + 40 * len(conversation.messages)
        return round(chars / chars_per_token) + max_tokens * (conversation.user_turns if history == "own" else 1)

    return -(-max(map(tokens, conversations), default=max_tokens) // 512) * 512


def _prompt_chars(conversation: Conversation, turn: int, history: History) -> int:
    """Characters of a prompt that the workload decides."""
    if history == "data":
        return conversation.prompt_chars(turn)
    return sum(len(message.content) for message in conversation.prompt(turn, [""] * turn))


def _weight(conversation: Conversation) -> int:
    return conversation.prompt_chars(conversation.user_turns - 1)
