"""The state of a runner at the start and after a resume; ``tests/truth`` shows that it measures correctly."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from promptai.bench.client import PlayedTurn, TurnClient
from promptai.bench.events import MeasurementCost, Opened, Session
from promptai.bench.manifest import TargetFacts
from promptai.bench.plan import Stage, WarmUpRates
from promptai.bench.recorder import Recorder, read_events, read_traces
from promptai.bench.runner import Runner
from promptai.bench.target import OpenTarget
from promptai.bench.trace import Trace
from promptai.device.sample import Sample
from promptai.engine.client import Arrival, EngineClient
from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError
from promptai.wire.openai import ChunkChoice, CompletionChunk, Delta
from support_runs import long_talk, make_failure, make_manifest, make_trace, write_lines

TALKS = [long_talk("a", turns=3, chars=10), long_talk("b", turns=2, chars=10)]

Resume = Callable[..., Runner]


class SilentObserver:
    """An observer that ignores everything."""

    def opened(self, target: str, rates: WarmUpRates, client: TurnClient) -> None:
        """Ignore it."""

    def stage(self, stage: Stage) -> None:
        """Ignore it."""

    def played(self, played: PlayedTurn) -> None:
        """Ignore it."""


@pytest.fixture
def resume(tmp_path: Path) -> Resume:
    """Return the runner of a cold run of two conversations after these requests."""

    def resume(*traces: Trace) -> Runner:
        with Recorder(tmp_path) as recorder:
            for trace in traces:
                recorder.append(trace, "")
        with Recorder(tmp_path) as recorder:
            return Runner(make_manifest(TALKS, caches=("cold",)), TALKS, recorder, SilentObserver())

    return resume


def pending(runner: Runner) -> list[str]:
    return [f"{key.conversation}{key.turn}" for key in runner.pending()]


@pytest.mark.parametrize(
    ("traces", "left"),
    [
        pytest.param([], ["a0", "a1", "a2", "b0", "b1"], id="new"),
        pytest.param([make_trace(conversation="a", turn=0)], ["a1", "a2", "b0", "b1"], id="one-answered"),
        pytest.param([make_failure(conversation="a", turn=0)], ["a0", "a1", "a2", "b0", "b1"], id="one-failed"),
        pytest.param(
            [make_trace(turn=0), make_failure("ContextExceeded: 900 > 512", turn=1)], ["b0", "b1"], id="one-too-long"
        ),
    ],
)
def test_plays_unanswered_requests_that_can_succeed(resume: Resume, traces: list[Trace], left: list[str]) -> None:
    assert left == pending(resume(*traces))


def test_a_finished_run_has_nothing_left(resume: Resume) -> None:
    everything = [make_trace(conversation=talk.id, turn=turn) for talk in TALKS for turn in range(talk.user_turns)]
    runner = resume(*everything)

    assert (runner.remaining(), runner.pending()) == ([], [])


def test_the_clock_of_a_resumed_run_continues(resume: Resume) -> None:
    """One second later, which separates the sessions; a new run begins at 0."""
    assert pytest.approx(0.0, abs=0.5) == time.monotonic() - resume().origin
    assert pytest.approx(103.0 + 1.0, abs=0.5) == time.monotonic() - resume(make_trace(at=100.0)).origin


def test_the_clock_of_a_run_without_answers_continues_after_its_telemetry(resume: Resume, tmp_path: Path) -> None:
    write_lines(tmp_path / "telemetry.jsonl", [Sample(t=300.0)])

    assert pytest.approx(300.0 + 1.0, abs=0.5) == time.monotonic() - resume().origin


def test_salts_differ_by_run_session_and_opening(tmp_path: Path) -> None:
    """Two URLs may lead to one server, whose cache may contain prompts of the other URL or of an earlier run."""
    manifests = [replace(make_manifest(TALKS), created=f"2026-11-20T12:00:00.{run}") for run in (1, 2)]
    nonces = []
    for session in range(2):
        with Recorder(tmp_path) as recorder:
            recorder.note(Session(float(session), "Linux 6.6", None))
            runners = [Runner(manifest, TALKS, recorder, SilentObserver()) for manifest in manifests]
            nonces += [runner._next_nonce() for runner in runners for _ in range(2)]

    assert len(set(nonces)) == 8


class Slot(EngineClient):
    """Fails to prepare its cache a number of times, and answers everything else with one word."""

    def __init__(self, failures: int, kind: type[EngineError]) -> None:
        super().__init__("http://none")
        self.failures, self.kind = failures, kind

    async def stream_chat(self, body: dict[str, Any]) -> AsyncGenerator[Arrival, None]:
        """Fail the given number of times; one-token requests prepare the cache."""
        self.failures -= body["max_tokens"] == 1
        if body["max_tokens"] == 1 and self.failures >= 0:
            raise self.kind("the answer was cut")
        yield Arrival(time.monotonic(), CompletionChunk([ChunkChoice(Delta("yes"), "stop")]))


def play_warm(directory: Path, slot: Slot) -> list[Trace]:
    """The traces on disk after playing five conversations of one turn warm."""
    talks = [long_talk(id_, turns=1, chars=10) for id_ in "abcde"]
    stage = Stage("m", "warm", 0, tuple(talk.id for talk in talks))
    opened = OpenTarget(slot, "m", True, None, None, lambda: None)
    manifest = make_manifest(talks, caches=("warm",))
    with Recorder(directory) as recorder:
        client = opened.turn_client(manifest.protocol, origin=0.0, nonce="")
        asyncio.run(Runner(manifest, talks, recorder, SilentObserver())._stage(stage, client, opened))
    return read_traces(directory)


def test_skips_a_conversation_whose_cache_cannot_be_prepared(tmp_path: Path) -> None:
    found = play_warm(tmp_path, Slot(2, EngineProtocolError))

    cut = "EngineProtocol: the answer was cut"
    assert [(t.conversation, t.error) for t in found] == [("a", cut), ("b", cut), ("c", None), ("d", None), ("e", None)]


@pytest.mark.parametrize(("kind", "tried"), [(EngineProtocolError, 3), (EngineDiedError, 1)])
def test_ends_the_run_if_the_cache_can_never_be_prepared(kind: type[EngineError], tried: int, tmp_path: Path) -> None:
    with pytest.raises(kind, match="the answer was cut"):
        play_warm(tmp_path, Slot(5, kind))

    assert len(read_traces(tmp_path)) == tried


@pytest.mark.real
@pytest.mark.timed
def test_a_session_records_kernel_target_and_cost_without_loading(tmp_path: Path) -> None:
    config = SimulationConfig(prefill_tps=1e5, decode_tps=1e4, load_s=0.0)

    async def play() -> float:
        async with SimulatedEngine(config) as engine:
            manifest = make_manifest(TALKS, [TargetFacts("m", url=engine.base_url)], max_tokens=2)
            with Recorder(tmp_path) as recorder:
                start = time.monotonic()
                await Runner(manifest, TALKS, recorder, SilentObserver()).run()
                return time.monotonic() - start

    whole_s = asyncio.run(play())
    session, opened, cost = read_events(tmp_path)
    traces = read_traces(tmp_path)

    assert isinstance(session, Session)
    assert session.kernel.startswith("Linux")
    assert isinstance(opened, Opened)
    assert opened.llama_server is True
    assert isinstance(cost, MeasurementCost)
    played_s = max(t.t_end for t in traces) - min(t.t_sent for t in traces)
    assert played_s <= cost.wall_s < played_s + 0.5 * (whole_s - played_s)
