"""Judge interrupted answers: same text as undisturbed, seams without loss or repetition, the model's own choices."""

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import msgspec

from promptai.bench.workload import load_bundled
from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import locate
from promptai.engine.scoring import force_token
from promptai.models.bundled import bundled_model
from support_failover import HANG_S, MAX_TOKENS, Boards, Continuation, Heard, Recorder, all_ready, ask, chat, front

#: An answer is interrupted after this number of tokens, drawn at random.
EARLIEST, LATEST = 3, 30
#: Nats between a token and the likeliest one that count as a tie: rounding depends on what is computed together.
TIE_NATS = 0.05
#: Any token may follow any other: half characters, special tokens of the template.
HOT = {"temperature": 4.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Question(NamedTuple):
    """
    A prompt and its undisturbed answer: one slot, no other request, no cache.

    Attributes:
        tokens: Number of chunks of that answer.
    """

    messages: list[dict[str, str]]
    text: str
    tokens: int


class Tally(msgspec.Struct):
    """
    Results of all requests of one configuration.

    Attributes:
        same: Interrupted answers with the undisturbed text.
        calm: Answers without an interruption, for comparison; ``calm_same`` of them have the undisturbed text.
        torn: Answers with lost or repeated text at a seam.
        odd: Answers longer than ``MAX_TOKENS``, or without exactly one finish reason.
        worse: Nats by which the likeliest token beats each token of a continuation.
    """

    asked: int = 0
    interrupted: int = 0
    failed: list[str] = []
    hung: int = 0
    same: int = 0
    calm: int = 0
    calm_same: int = 0
    torn: int = 0
    odd: int = 0
    continuations: int = 0
    unscored: int = 0
    worse: list[float] = []
    pauses_s: list[float] = []


class Run:
    """
    Requests to one configuration of real engines until enough answers were interrupted.

    Args:
        how: ``ids`` if the engine reports token ids, otherwise ``text``.
        hot: Sample at random; then only the seams are judged.
    """

    def __init__(
        self, asked: list[Question], referee: "Referee", how: Literal["ids", "text"], wanted: int, *, hot: bool = False
    ) -> None:
        self.tally = Tally()
        self._questions = asked
        self._referee = referee
        self._hot = hot
        self._fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if how == "ids" else {}
        self._fields |= HOT if hot else {}
        self._wanted = wanted
        self._seed = 0
        self._random = random.Random(wanted)

    async def play(self, boards: Boards, slots: int) -> None:
        """Request and kill, for at most four rounds per wanted interruption."""
        async with front(boards.urls) as (server, registry, recorder):
            for _ in range(4 * self._wanted):
                await boards.restart()
                await all_ready(registry, len(boards.urls))
                await self._round(server.url, boards, recorder, streams=2 * slots)
                if self.tally.interrupted >= self._wanted:
                    return

    async def _round(self, url: str, boards: Boards, recorder: Recorder, *, streams: int) -> None:
        """Send ``streams`` requests; kill the engine of the first after a random number of its tokens."""
        asked = self._random.sample(self._questions, streams)
        at = self._random.randint(EARLIEST, min(LATEST, asked[0].tokens - 8))

        def strike(heard: Heard) -> None:
            if heard.tokens == at:
                boards.kill(heard.replica)

        seeds = [self._seed + number for number in range(streams)]
        self._seed += streams
        tasks = [
            asyncio.create_task(
                ask(url, chat(one.messages, seed=seed, **self._fields), strike if not number else lambda _: None)
            )
            for number, (one, seed) in enumerate(zip(asked, seeds, strict=True))
        ]
        _, late = await asyncio.wait(tasks, timeout=HANG_S)
        self.tally.hung += len(late)
        for task in late:
            task.cancel()
        for task, one, seed in zip(tasks, asked, seeds, strict=True):
            if task not in late:
                await self._judge(task.result(), one, recorder.continuations.get(seed, []))

    async def _judge(self, heard: Heard, asked: Question, continuations: list[Continuation]) -> None:
        tally = self.tally
        tally.asked += 1
        if heard.failure:
            tally.failed.append(heard.failure)
            return
        tally.odd += heard.ended != 1 or heard.tokens > MAX_TOKENS
        if not continuations:
            tally.calm += 1
            tally.calm_same += heard.text == asked.text
            return
        tally.interrupted += 1
        tally.continuations += len(continuations)
        tally.same += heard.text == asked.text
        tally.pauses_s.append(heard.pause_s)
        tally.torn += not await self._seamless(heard, asked, continuations)
        for continuation in continuations if not self._hot else ():
            await self._score(continuation)

    async def _seamless(self, heard: Heard, asked: Question, continuations: list[Continuation]) -> bool:
        """
        Whether the client received each part of the answer exactly once.

        Its text must equal the part that the last engine was sent plus that engine's continuation; so the
        engine was sent exactly what the client had received.
        """
        prompt = await self._referee.prompt(asked.messages)
        last = continuations[-1]
        if any(continuation.prompt[: len(prompt)] != prompt for continuation in continuations):
            return False
        before = await self._referee.spelled(last.prompt[len(prompt) :])
        return bool(before) and heard.text == before + last.text

    async def _score(self, continuation: Continuation) -> None:
        """Score each token of a continuation: by how many nats another token is likelier."""
        for position, token in enumerate(continuation.tokens):
            worse = await self._referee.worse(continuation.prompt + continuation.tokens[:position], token)
            if worse is None:
                self.tally.unscored += 1
            else:
                self.tally.worse.append(worse)


class Referee:
    """An engine that serves no test request and knows the right answers; an async context manager."""

    def __init__(self, folder: Path) -> None:
        flags = EngineFlags(model=str(bundled_model()), port=free_port(), threads=1, context=4096)
        self._engine = RunningEngine(locate(), flags, log=folder / "referee.log")
        self._client = EngineClient(self._engine.base_url)
        self._upstream = HttpUpstream()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        for one in (self._engine, self._client, self._upstream):
            await self._stack.enter_async_context(one)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    async def questions(self, most: int) -> list[Question]:
        """Prompts of the bundled workload with answers long enough to be interrupted, and those answers."""
        found: dict[str, Question] = {}
        for conversation in load_bundled().conversations:
            opening = [{"role": m.role, "content": m.content} for m in conversation.prompt(0)]
            alone = [[{"role": m.role, "content": m.content}] for m in conversation.messages if m.role == "user"]
            for messages in (opening, *alone):
                key = messages[-1]["content"]
                if key in found or len(found) >= most:
                    continue
                heard = await ask(self._engine.base_url, chat(messages, cache_prompt=False))
                if not heard.failure and heard.tokens >= EARLIEST + 12:
                    found[key] = Question(messages, heard.text, heard.tokens)
        return list(found.values())

    async def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat's prompt."""
        rendered = await self._quick("/apply-template", {"messages": messages})
        return await self._client.tokenize(rendered["prompt"], add_special=True)

    async def spelled(self, tokens: list[int]) -> str:
        """The text of tokens."""
        reply = await self._quick("/detokenize", {"tokens": tokens})
        return str(reply["content"])

    async def worse(self, prompt: list[int], token: int) -> float | None:
        """Nats by which the likeliest token beats this one; ``None`` where the engine does not report it."""
        forced = await force_token(self._client, prompt, token, n_probs=1)
        if forced is None or forced.id != token or not forced.top_logprobs:
            return None
        return forced.top_logprobs[0].logprob - forced.logprob

    async def _quick(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = await self._upstream.post(self._engine.base_url, path, msgspec.json.encode(body), limit_s=HANG_S)
        return msgspec.json.decode(reply.body, type=dict[str, Any])
