"""Play a plan: open each target, warm it up, play its stages, write every trace to disk.

``bench.plan`` decides what to play and ``bench.recorder`` keeps the finished requests on disk, so
this module can be killed at any moment and started again.

    for each group of stages of one target:
        open it -> warm up (not counted) -> for each stage: play its conversations -> close it

The turns of a conversation follow one another; conversations run concurrently only if the
protocol asks for it. Before each warm conversation the KV cache is filled with another text, so
"warm" always means this conversation's own earlier turns. No statistics and no output here.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from random import Random
from typing import Protocol as Interface

from promptai.bench.arrivals import remaining_offsets, start_offsets
from promptai.bench.client import PlayedTurn, TurnClient
from promptai.bench.events import MeasurementCost, Opened, Session
from promptai.bench.manifest import Manifest, TargetFacts, describe_machine
from promptai.bench.plan import Stage, WarmUpRates, arrival_seed, plan_stages
from promptai.bench.recorder import Recorder, is_hopeless
from promptai.bench.target import OpenTarget, open_target
from promptai.bench.trace import TraceKey
from promptai.bench.warmup import warm_up
from promptai.bench.workload import Conversation
from promptai.device.memory import peak_rss_bytes
from promptai.device.telemetry import Telemetry
from promptai.engine.client import SILENCE_S
from promptai.errors import EngineDiedError, EngineError, SettingsError
from promptai.wire.openai import Message

_MAX_FAILURES_IN_A_ROW = 3


class RunObserver(Interface):
    """A display of a run's progress; every method must return at once."""

    def opened(self, target: str, rates: WarmUpRates, client: TurnClient) -> None:
        """A target has finished its warm-up with these rates; ``client.live`` shows the turn in progress."""

    def stage(self, stage: Stage) -> None:
        """A stage begins."""

    def played(self, played: PlayedTurn) -> None:
        """A turn has been written to disk."""


class Runner:
    """
    Plays one run from its current state.

    Args:
        conversations: The selected ones, in order.
        api_key: For servers that require one.
        silence_s: Longest wait for the next bytes of an answer.
    """

    def __init__(
        self,
        manifest: Manifest,
        conversations: Sequence[Conversation],
        recorder: Recorder,
        observer: RunObserver,
        *,
        api_key: str | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._manifest = manifest
        self._protocol = manifest.protocol
        self._conversations = {conversation.id: conversation for conversation in conversations}
        self._recorder = recorder
        self._observer = observer
        self._api_key = api_key
        self._silence_s = silence_s
        self._answered = recorder.answered()
        self._hopeless = recorder.hopeless()
        # The run's clock continues one second after its last entry, which separates the sessions.
        last_t = recorder.last_t()
        self.origin = time.monotonic() - (last_t + 1.0 if last_t else 0.0)
        self._session = 1 + sum(isinstance(event, Session) for event in recorder.events)
        self._openings = 0
        self._failures = 0
        self._playing_s = self._playing_cpu_s = 0.0

    def remaining(self) -> list[Stage]:
        """Stages with requests left to play, in order."""
        names = [target.name for target in self._manifest.targets]
        stages = plan_stages(names, list(self._conversations), self._protocol)
        return [stage for stage in stages if any(self._pending(stage, id_) for id_ in stage.conversations)]

    def pending(self) -> list[TraceKey]:
        """Requests left to play, in order."""
        return [
            self._key(stage, id_, turn)
            for stage in self.remaining()
            for id_ in stage.conversations
            for turn in self._pending(stage, id_)
        ]

    async def run(self) -> None:
        """
        Play the rest of the run.

        Raises:
            EngineError: A target cannot be opened, died, or failed several times in a row.
            RunError: The run cannot be written.
        """
        stages = self.remaining()
        if not stages:
            return
        targets = {target.name: target for target in self._manifest.targets}
        machine = describe_machine()
        self._recorder.note(Session(time.monotonic() - self.origin, machine.kernel, machine.cpu.governor))
        telemetry = Telemetry().start(self._recorder.directory / "telemetry.jsonl", origin=self.origin)
        try:
            for name, group in groupby(stages, key=lambda stage: stage.target):
                await self._target(targets[name], list(group), telemetry)
        finally:
            cost = telemetry.stop()
            self._recorder.note(
                MeasurementCost(
                    t=time.monotonic() - self.origin,
                    wall_s=self._playing_s,
                    client_cpu_s=self._playing_cpu_s,
                    client_max_rss_bytes=peak_rss_bytes(),
                    telemetry_cpu_s=cost.cpu_s,
                    telemetry_wall_s=cost.wall_s,
                    telemetry_max_rss_bytes=cost.max_rss_bytes,
                    energy_source=None if cost.energy_source == "none" else cost.energy_source,
                    telemetry_error=cost.error,
                )
            )

    async def _target(self, facts: TargetFacts, stages: list[Stage], telemetry: Telemetry) -> None:
        log = self._recorder.directory / f"engine-{facts.name}.log"
        async with open_target(facts, log=log, api_key=self._api_key, silence_s=self._silence_s) as opened:
            if self._protocol.ignore_eos and not opened.llama_server:
                raise SettingsError(
                    f"{facts.name} is not a llama-server and does not support --ignore-eos", hint="drop --ignore-eos"
                )
            telemetry.watch(opened.pid)
            try:
                client = opened.turn_client(self._protocol, origin=self.origin, nonce=self._next_nonce())
                rates, first_s = await warm_up(client, answer_tokens=self._protocol.max_tokens)
                self._recorder.note(Opened(client.now(), facts.name, opened.load_s, first_s, opened.llama_server))
                self._observer.opened(facts.name, rates, client)
                with self._playing():
                    for stage in stages:
                        self._observer.stage(stage)
                        await self._stage(stage, client, opened)
            except EngineDiedError as error:
                raise await asyncio.to_thread(opened.death) or error from None
            finally:
                telemetry.watch(None)

    def _next_nonce(self) -> str:
        """Return a new nonce for salts: differs by run and by opening, as two URLs may lead to one server."""
        self._openings += 1
        return f"{self._manifest.created}/{self._session}/{self._openings}"

    @contextmanager
    def _playing(self) -> Iterator[None]:
        """Count the block's wall and CPU time as measuring."""
        cpu_start, start = time.process_time(), time.monotonic()
        try:
            yield
        finally:
            self._playing_cpu_s += time.process_time() - cpu_start
            self._playing_s += time.monotonic() - start

    async def _stage(self, stage: Stage, client: TurnClient, opened: OpenTarget) -> None:
        """Start the stage's conversations according to the arrivals."""
        ids = stage.conversations
        pending = [position for position, id_ in enumerate(ids) if self._pending(stage, id_)]
        generator = Random(arrival_seed(stage, self._protocol.seed))  # noqa: S311  reproducible, not secret
        offsets = start_offsets(self._protocol.arrivals, len(ids), generator)
        begin = client.now()
        try:
            async with asyncio.TaskGroup() as group:
                if offsets is None:
                    queue = iter([ids[position] for position in pending])
                    for _ in range(self._protocol.concurrency):
                        group.create_task(self._worker(stage, queue, client, opened))
                else:
                    for position, offset in zip(pending, remaining_offsets(offsets, pending), strict=True):
                        group.create_task(self._arrival(stage, ids[position], begin + offset, client, opened))
        except BaseExceptionGroup as errors:
            # One engine, one cause: the first error is the cause, the others follow from it.
            raise errors.exceptions[0] from None

    async def _worker(self, stage: Stage, queue: Iterator[str], client: TurnClient, opened: OpenTarget) -> None:
        for id_ in queue:
            await self._conversation(stage, id_, client, opened, t_scheduled=client.now())

    async def _arrival(
        self, stage: Stage, id_: str, t_scheduled: float, client: TurnClient, opened: OpenTarget
    ) -> None:
        await asyncio.sleep(max(0.0, t_scheduled - client.now()))
        await self._conversation(stage, id_, client, opened, t_scheduled=t_scheduled)

    async def _conversation(
        self, stage: Stage, id_: str, client: TurnClient, opened: OpenTarget, *, t_scheduled: float
    ) -> None:
        conversation = self._conversations[id_]
        pending = self._pending(stage, id_)
        if stage.cache == "warm" and opened.llama_server and self._protocol.one_at_a_time:
            try:
                await self._prepare_cache(client, conversation, stage, pending[0])
            except EngineError as failure:
                key = self._key(stage, id_, pending[0])
                await self._record(client.unplayed(key, failure, t_scheduled=t_scheduled))
                return
        for turn in pending:
            played = await client.play(
                self._key(stage, id_, turn), self._prompt(stage, conversation, turn), t_scheduled=t_scheduled
            )
            t_scheduled = played.trace.t_end  # the next turn is due when this one has been answered
            await self._record(played)
            if played.failure is not None:
                return  # later turns would build on an answer that does not exist

    async def _record(self, played: PlayedTurn) -> None:
        """Write a turn to disk; raises its failure if the run cannot continue."""
        await asyncio.to_thread(self._recorder.append, played.trace, played.text)
        self._observer.played(played)
        if played.failure is None:
            self._failures = 0
        elif not is_hopeless(played.trace):  # the prompt exceeds the context; other conversations may fit
            self._failures += 1
            if isinstance(played.failure, EngineDiedError) or self._failures >= _MAX_FAILURES_IN_A_ROW:
                raise played.failure

    async def _prepare_cache(self, client: TurnClient, conversation: Conversation, stage: Stage, turn: int) -> None:
        """Fill the slot with what an uninterrupted run would find there: unrelated text, or the previous turn."""
        if turn == 0:
            await client.warm_up([Message("user", "-")], "warm", max_tokens=1)
        else:
            await client.warm_up(self._prompt(stage, conversation, turn - 1), "warm", max_tokens=1)

    def _prompt(self, stage: Stage, conversation: Conversation, turn: int) -> list[Message]:
        if self._protocol.history == "data":
            return conversation.prompt(turn)
        answers = self._recorder.answers
        own = [answers[self._key(stage, conversation.id, earlier)] for earlier in range(turn)]
        return conversation.prompt(turn, own)

    def _key(self, stage: Stage, id_: str, turn: int) -> TraceKey:
        return TraceKey(stage.target, stage.cache, stage.repeat, id_, turn)

    def _pending(self, stage: Stage, id_: str) -> list[int]:
        """Turns of a conversation left to play; none if a turn has exceeded the context."""
        turns = range(self._conversations[id_].user_turns)
        keys = [self._key(stage, id_, turn) for turn in turns]
        if any(key in self._hopeless for key in keys):
            return []
        return [turn for turn, key in zip(turns, keys, strict=True) if key not in self._answered]
