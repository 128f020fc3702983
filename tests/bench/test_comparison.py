import asyncio
import math
import os
from pathlib import Path
from random import Random

import pytest

from promptai.bench.comparison import ComparisonTask, compare, first_is_faster, rank, ratio, round_seconds, turns
from promptai.engine.choice import Comparison, MeasuredEngine, Round
from promptai.engine.locate import EngineBinary, fingerprint_of
from support_fake_engine import write_fake_engine


class Watched:
    """Records the progress."""

    def __init__(self) -> None:
        self.told: list[tuple[float, str]] = []

    def share(self, share: float, detail: str) -> None:
        """Record the share."""
        self.told.append((share, detail))


def task(tmp_path: Path, *, repeats: int, tokens: int = 8) -> ComparisonTask:
    model = tmp_path / "m.gguf"
    model.touch()
    return ComparisonTask(model=model, prompt_tokens=32, tokens=tokens, repeats=repeats, threads=1)


def fake(path: Path, *, prefill: float, decode: float, breaks: bool = False) -> EngineBinary:
    server = write_fake_engine(path / "bin" / "llama-server", prefill=prefill, decode=decode, breaks=breaks)
    return EngineBinary("built", (str(server),), "b7 (abc)", ("SSE3",))


def noisy(mean: float, spread: float, seed: int, n: int = 9) -> list[float]:
    generator = Random(seed)
    return [mean * math.exp(generator.gauss(0, spread)) for _ in range(n)]


@pytest.mark.real
def test_excludes_a_failing_engine_with_its_error(tmp_path: Path) -> None:
    """The other engines are still compared."""
    engines = [
        fake(tmp_path / "broken", prefill=1, decode=1, breaks=True),
        fake(tmp_path / "a", prefill=4000, decode=400),
        fake(tmp_path / "b", prefill=2000, decode=200),
    ]

    outcome = asyncio.run(compare(engines, task(tmp_path, repeats=1), Watched(), cpu="cpu", log=tmp_path / "log"))

    assert [engine.name for engine in outcome.comparison.engines] == ["a", "b"]
    assert list(outcome.failed) == ["broken"]
    assert "does not support --cache-ram" in outcome.failed["broken"]


@pytest.mark.real
def test_engines_of_known_speed_are_measured_in_turns(tmp_path: Path) -> None:
    """Two rounds show no significant difference, so the default order stays."""
    engines = [fake(tmp_path / "slow", prefill=1000, decode=100), fake(tmp_path / "fast", prefill=2000, decode=200)]
    watched = Watched()

    outcome = asyncio.run(compare(engines, task(tmp_path, repeats=2), watched, cpu="this", log=tmp_path / "log"))

    slow, fast = outcome.comparison.engines
    assert [(slow.name, len(slow.rounds)), (fast.name, len(fast.rounds))] == [("slow", 2), ("fast", 2)]
    assert [r.decode_tps for r in fast.rounds] == pytest.approx([200, 200], rel=0.01)
    assert [r.prefill_tps for r in slow.rounds] == pytest.approx([1000, 1000], rel=0.01)
    assert (outcome.comparison.cpu, outcome.failed) == ("this", {})
    assert all(engine.fingerprint for engine in outcome.comparison.engines)
    assert watched.told == [
        (0.0, "round 1/2, slow"),
        (0.25, "round 1/2, fast"),
        (0.5, "round 2/2, fast"),
        (0.75, "round 2/2, slow"),
    ]


@pytest.mark.real
def test_records_the_fingerprint_from_before_a_rebuild(tmp_path: Path) -> None:
    """The comparison does not apply to the rebuilt engine."""
    engines = [fake(tmp_path / name, prefill=4000, decode=400) for name in ("a", "b")]
    before = fingerprint_of(engines[0])

    class Building(Watched):
        def share(self, share: float, detail: str) -> None:
            super().share(share, detail)
            os.utime(engines[0].command[0], (1, 1))

    outcome = asyncio.run(compare(engines, task(tmp_path, repeats=1), Building(), cpu="cpu", log=tmp_path / "log"))

    assert before == outcome.comparison.engines[0].fingerprint != fingerprint_of(engines[0])


@pytest.mark.parametrize(
    ("engines", "repeats", "expected"),
    [(2, 3, [[0, 1], [1, 0], [0, 1]]), (3, 2, [[0, 1, 2], [2, 1, 0]]), (2, 1, [[0, 1]])],
)
def test_every_other_round_is_reversed(engines: int, repeats: int, expected: list[list[int]]) -> None:
    assert expected == turns(engines, repeats)


def test_a_board_that_warms_up_favours_no_engine() -> None:
    """Each round is 5 % slower than the last; both engines are the same within a round."""
    drift = [0.95**number for number in range(9)]
    base, same = ([value * (1 + wobble) for value in drift] for wobble in (0.0, 0.001))

    found = ratio(same, base)

    assert found.value == pytest.approx(1.001)
    assert found.ci95 is not None
    assert found.ci95[1] - found.ci95[0] < 1e-9


def test_fewer_than_five_rounds_have_no_interval() -> None:
    assert ratio([2.0] * 4, [1.0] * 4).ci95 is None
    assert ratio([2.0] * 4, [1.0] * 4).value == pytest.approx(2.0)
    assert ratio([2.0] * 5, [1.0] * 5).ci95 == pytest.approx((2.0, 2.0))


def test_the_interval_has_its_nominal_coverage() -> None:
    """Five rounds with 3 % of noise, 400 times: 95 % would be 380."""
    held = 0
    for seed in range(400):
        interval = ratio(noisy(1.2, 0.03, seed, n=5), noisy(1.0, 0.03, seed + 10_000, n=5)).ci95
        assert interval is not None
        held += interval[0] <= 1.2 <= interval[1]

    assert 365 <= held <= 395


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param([noisy(1.0, 0.01, 1), noisy(1.0, 0.01, 2)], [0, 1], id="noise"),
        pytest.param([noisy(1.0, 0.01, 1), noisy(0.8, 0.01, 2)], [1, 0], id="second-is-faster"),
        pytest.param([noisy(0.8, 0.01, 1), noisy(1.0, 0.01, 2)], [0, 1], id="first-is-faster"),
        pytest.param([[1.0] * 4, [0.5] * 4], [0, 1], id="too-few-rounds"),
        pytest.param([noisy(m, 0.01, s) for s, m in enumerate((1.0, 0.7, 0.4))], [2, 1, 0], id="all-backwards"),
        pytest.param([noisy(m, 0.01, s) for s, m in enumerate((0.7, 1.0, 0.7))], [0, 2, 1], id="a-tie-stays"),
        pytest.param(
            [noisy(1.0, 0.01, 0), noisy(0.95, 0.2, 1), noisy(0.9, 0.01, 2)],
            [1, 2, 0],
            id="two-ties-do-not-hide-a-slower-engine",
        ),
        pytest.param([], [], id="nobody"),
    ],
)
def test_only_a_significantly_faster_engine_moves_ahead(seconds: list[list[float]], expected: list[int]) -> None:
    assert expected == rank(seconds)


def test_weights_both_rates_by_prompt_and_answer_length() -> None:
    """An engine may be faster at prefill and slower at decode."""
    reader, writer = Round(prefill_tps=200, decode_tps=10), Round(prefill_tps=50, decode_tps=20)

    assert round_seconds(reader, 1000, 10) < round_seconds(writer, 1000, 10)
    assert round_seconds(reader, 10, 1000) > round_seconds(writer, 10, 1000)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([100.0, 90.0], True), ([100.0, 99.9], False), ([100.0, 90.0, 10.0], True), ([100.0], False), ([], False)],
)
def test_the_first_engine_is_faster_only_if_significant(rates: list[float], expected: bool) -> None:  # noqa: FBT001
    engines = [
        MeasuredEngine(str(number), "", "", [Round(value, value) for value in noisy(rate, 0.01, number)])
        for number, rate in enumerate(rates)
    ]
    comparison = Comparison(
        created="", cpu="", threads=1, model="m", prompt_tokens=64, generated_tokens=64, engines=engines
    )

    assert expected == first_is_faster(comparison)
