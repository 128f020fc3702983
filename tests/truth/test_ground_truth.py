"""The harness against a simulated engine with a configured, and so known, speed."""

import asyncio

import pytest

from promptai.bench.selftest import CASES, TOLERANCE, SelftestCase, selftest
from promptai.errors import PromptAIError

pytestmark = [pytest.mark.real, pytest.mark.timed]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.prompt_tokens} prompt tokens")
def test_every_metric_is_within_2_percent_and_every_count_exact(case: SelftestCase) -> None:
    """``selftest`` raises when a count is off by one."""
    checks = asyncio.run(selftest((case,)))

    assert {"ttft_s", "prefill_tps", "decode_tps", "total_tps", "decode_s, as sent"} == {c.metric for c in checks}
    assert [f"{c.metric}: {c.error:+.2%}" for c in checks if abs(c.error) > TOLERANCE] == []


def test_a_wrong_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: it detects an engine that miscounts its prompt."""
    monkeypatch.setattr("promptai.engine.simulated_api.tokenize", lambda text: [0] * (len(text) // 3))

    with pytest.raises(PromptAIError, match="token counts are"):
        asyncio.run(selftest((SelftestCase(20, 2000, 2000, 2),)))
