"""What a runner knows before it runs; that it plays it truly is shown in ``tests/truth``."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.bench.client import Played, TurnClient
from promptai.bench.plan import Rates, Stage
from promptai.bench.recorder import Recorder
from promptai.bench.runner import Runner
from promptai.bench.trace import Trace
from support_runs import long_talk, make_failure, make_manifest, make_trace

TALKS = [long_talk("a", turns=3, chars=10), long_talk("b", turns=2, chars=10)]

Resume = Callable[..., Runner]


class Nobody:
    """An observer who does not care."""

    def opened(self, target: str, rates: Rates, client: TurnClient) -> None:
        """Ignore it."""

    def stage(self, stage: Stage) -> None:
        """Ignore it."""

    def played(self, played: Played) -> None:
        """Ignore it."""


@pytest.fixture
def resume(tmp_path: Path) -> Resume:
    """A cold run of two conversations that stands where these requests left it."""

    def resume(*traces: Trace) -> Runner:
        with Recorder(tmp_path) as recorder:
            for trace in traces:
                recorder.append(trace, "")
        with Recorder(tmp_path) as recorder:
            return Runner(make_manifest(TALKS, caches=("cold",)), TALKS, recorder, Nobody())

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
def test_what_is_left_is_what_was_not_answered_and_can_be(resume: Resume, traces: list[Trace], left: list[str]) -> None:
    assert left == pending(resume(*traces))


def test_nothing_is_left_of_a_finished_run(resume: Resume) -> None:
    everything = [make_trace(conversation=talk.id, turn=turn) for talk in TALKS for turn in range(talk.user_turns)]
    runner = resume(*everything)

    assert (runner.remaining(), runner.pending()) == ([], [])


def test_the_clock_of_a_resumed_run_goes_on_where_it_stopped(resume: Resume) -> None:
    """A second later, so that sessions can be told apart; a new run begins at 0."""
    assert pytest.approx(0.0, abs=0.5) == time.monotonic() - resume().origin
    assert pytest.approx(103.0 + 1.0, abs=0.5) == time.monotonic() - resume(make_trace(at=100.0)).origin
