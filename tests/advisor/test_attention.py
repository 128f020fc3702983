"""Attention prices, against simulated kernels with chosen prices."""

import pytest

from promptai.advisor.attention import (
    ATTENTION_PROBES,
    AttentionPrice,
    AttentionPrices,
    AttentionReading,
    fit_attention,
    tokens_worked,
)
from promptai.advisor.cost import cost_of_shape
from promptai.models.shape import Shape

DEPTHS = (264, 488, 1288)
BASE_S = 0.0005


def readings(prices: AttentionPrices) -> list[AttentionReading]:
    """Readings that the probes of these head lengths would give."""
    found = []
    for probe in ATTENTION_PROBES:
        cost = cost_of_shape(probe.shape, "q4_0")
        if cost.attention is not None and cost.attention.head in prices.by_head:
            times = {depth: BASE_S + (prices.seconds(cost, depth) or 0) for depth in DEPTHS}
            found.append(AttentionReading(cost=cost, decode_s=times))
    return found


@pytest.mark.parametrize("step", [1, 256])
def test_recovers_the_prices_and_the_rounding_step_from_the_probes(step: int) -> None:
    chosen = {
        "64": AttentionPrice(query_s=1.5e-10, kv_s=8e-10),
        "80": AttentionPrice(query_s=6e-10, kv_s=7e-10),
        "128": AttentionPrice(query_s=2e-10, kv_s=0.0),
    }

    found = fit_attention(readings(AttentionPrices(by_head=chosen, step=step)))

    assert found.step == step
    assert found.by_head.keys() == chosen.keys()
    for length, price in chosen.items():
        assert found.by_head[length].query_s == pytest.approx(price.query_s, rel=1e-6)
        assert found.by_head[length].kv_s == pytest.approx(price.kv_s, rel=1e-6, abs=1e-20)


def test_ignores_a_disturbed_pass() -> None:
    calm = readings(AttentionPrices(by_head={"96": AttentionPrice(query_s=2e-10, kv_s=5e-10)}, step=256))
    disturbed = [
        AttentionReading(cost=reading.cost, decode_s={depth: 10 * s for depth, s in reading.decode_s.items()})
        for reading in calm
    ]

    assert fit_attention([*disturbed, *calm]) == fit_attention(calm)


def test_a_head_length_that_was_no_slower_with_more_context_has_no_price() -> None:
    cost = cost_of_shape(ATTENTION_PROBES[0].shape, "q4_0")

    found = fit_attention([AttentionReading(cost=cost, decode_s={264: 0.2, 488: 0.2, 1288: 0.1})])

    assert found.by_head == {}


def test_one_depth_gives_no_price() -> None:
    cost = cost_of_shape(ATTENTION_PROBES[0].shape, "q4_0")

    with pytest.raises(ValueError, match="two depths"):
        fit_attention([AttentionReading(cost=cost, decode_s={264: 0.1})])


def test_rounds_work_up_to_the_next_step_after_the_first() -> None:
    assert [tokens_worked(depth, 256) for depth in (0, 255, 256, 511, 512)] == [0, 255, 512, 512, 768]
    assert [tokens_worked(depth, 1) for depth in (0, 255, 256, 511, 512)] == [0, 255, 256, 511, 512]


def test_windowed_layers_work_on_at_most_their_window_and_a_batch() -> None:
    """Five of six layers of Gemma 3."""
    shape = Shape(6, 512, 4, 1, 1024, 3000, architecture="gemma3", head_length=256, sliding_window=512)
    prices = AttentionPrices(by_head={"256": AttentionPrice(query_s=1e-9, kv_s=2e-9)}, step=1)

    found = prices.seconds(cost_of_shape(shape, "q4_0"), 3000)

    assert found == pytest.approx((3000 + 5 * 1024) * (4 * 256 * 1e-9 + 256 * 2e-9))
