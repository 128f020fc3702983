"""The output of a run in progress, without a terminal."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from promptai.bench.client import PlayedTurn, TurnClient
from promptai.bench.plan import Protocol, WarmUpRates
from promptai.bench.recorder import Recorder
from promptai.bench.runner import Runner
from promptai.cli.progress import RunProgress
from promptai.engine.client import EngineClient
from promptai.errors import EngineProtocolError
from support_runs import long_talk, make_failure, make_manifest, make_trace

#: Twenty conversations of one turn: 4 s to prefill, 5 s to answer.
TALKS = [long_talk(f"c{n}", turns=1, chars=400) for n in range(20)]
RATES = WarmUpRates(prefill_tps=25.0, decode_tps=10.0, chars_per_token=4.0, answer_tokens=50.0)


def opened(directory: Path, out: StringIO, **protocol: Any) -> RunProgress:
    """A run before its first request."""
    manifest = make_manifest(TALKS, caches=("cold",), **protocol)
    progress = RunProgress(Console(file=out, width=200))
    with Recorder(directory) as recorder:
        progress.begin(Runner(manifest, TALKS, recorder, progress), TALKS, manifest.protocol)
    client = TurnClient(EngineClient("http://none"), Protocol(), model="m", llama_server=True, origin=0.0)
    progress.opened("m", RATES, client)
    return progress


@pytest.mark.parametrize(("at_once", "left"), [(1, "about 3 min left"), (4, "about 45 s left")])
def test_the_time_left_is_labelled_as_an_estimate(at_once: int, left: str, tmp_path: Path) -> None:
    out = StringIO()
    opened(tmp_path, out, concurrency=at_once)

    assert f"m: warmed up, prefill 25 and decode 10.0 tokens/s; {left}" in out.getvalue()


def test_logs_a_line_per_finished_tenth(tmp_path: Path) -> None:
    """A stage may last for days."""
    out = StringIO()
    progress = opened(tmp_path, out)
    for talk in TALKS:
        progress.played(PlayedTurn(make_trace(conversation=talk.id, t_end=9.0), ""))

    told = [line.partition(",")[0] for line in out.getvalue().splitlines()[1:]]
    assert told == [f"{tenth}0 % done" for tenth in range(1, 10)]


def test_skipped_turns_take_no_more_time(tmp_path: Path) -> None:
    out = StringIO()
    progress = opened(tmp_path, out)
    for talk in TALKS[:10]:
        failure = EngineProtocolError("cut")
        progress.played(PlayedTurn(make_failure(conversation=talk.id, t_end=0.1), "", failure))

    assert progress._left is not None
    assert progress._left.seconds() == pytest.approx(90.0)
