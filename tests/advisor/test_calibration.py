"""Calibration, against simulated machines with chosen prices."""

from random import Random

import pytest

from promptai.advisor.attention import ATTENTION_PROBES, AttentionPrice, AttentionPrices, AttentionReading
from promptai.advisor.calibration import PROBES, Calibration, Reading, buffer_bytes, fit_calibration
from promptai.advisor.cost import ModelCost, cost_of_shape
from promptai.advisor.forecast import forecast
from promptai.models.shape import Shape

BYTE_S = {"Q4_0": 40e-12, "Q4_K": 55e-12, "Q6_K": 70e-12, "Q8_0": 30e-12}
WEIGHT_S = {"Q4_0": 6e-12, "Q4_K": 7e-12, "Q6_K": 7e-12, "Q8_0": 5e-12}
COPIED = {"Q4_0": 1.0, "Q4_K": 1.0, "Q6_K": 0.0, "Q8_0": 0.0}
LAYER_S, BASE_BYTES = 30e-6, 24_000_000
#: Short heads are dear, as on real machines.
ATTENTION = AttentionPrices(
    by_head={
        str(length): AttentionPrice(query_s=10e-9 / length, kv_s=50e-9 / length) for length in (64, 80, 96, 128, 256)
    },
    step=256,
)

LLAMA_32_3B = Shape(28, 3072, 24, 8, 8192, 128_256, tied=True)


def decode_s(cost: ModelCost, depth: int) -> float:
    attention_s = ATTENTION.seconds(cost, depth) or 0
    return sum(BYTE_S[kind] * size for kind, size in cost.decode_bytes.items()) + cost.layers * LAYER_S + attention_s


def readings(noise: float = 0.0) -> list[Reading]:
    """Readings of the probes on that machine, with times up to ``noise`` too long."""
    generator = Random(1)
    found = []
    for probe in PROBES:
        cost = cost_of_shape(probe.shape, probe.quant)
        loaded = BASE_BYTES + (cost.kv_bytes(2048) or 0)
        loaded += sum(int(COPIED[kind]) * size for kind, size in cost.decode_bytes.items())
        found.append(
            Reading(
                cost=cost,
                decode_s=decode_s(cost, 512) * (1 + noise * generator.random()),
                depth=512,
                prefill_s=sum(WEIGHT_S[kind] * count for kind, count in cost.prefill_weights.items()),
                context=2048,
                anon_loaded_bytes=loaded,
                anon_peak_bytes=loaded + round(0.9 * buffer_bytes(cost)),
                file_mapped_bytes=cost.file_bytes + 19_000_000,
            )
        )
    return found


def attention_readings(noise: float = 0.0) -> list[AttentionReading]:
    generator = Random(2)
    found = []
    for probe in ATTENTION_PROBES:
        cost = cost_of_shape(probe.shape, "q4_0")
        times = {depth: decode_s(cost, depth) * (1 + noise * generator.random()) for depth in (264, 488, 1288)}
        found.append(AttentionReading(cost=cost, decode_s=times))
    return found


def solved(noise: float = 0.0) -> Calibration:
    created = "2026-11-21T00:00:00+00:00"
    return fit_calibration(
        readings(noise), attention_readings(noise), engine="an engine", cpu="a processor", threads=2, created=created
    )


def test_rejects_probes_whose_head_length_has_no_attention_reading() -> None:
    others = [
        reading for reading in attention_readings() if reading.cost.attention and reading.cost.attention.head != "128"
    ]

    with pytest.raises(ValueError, match="head length"):
        fit_calibration(readings(), others, engine="", cpu="", threads=1, created="")


def test_the_probes_separate_all_prices() -> None:
    found = solved()

    assert found.decode_s_per_byte == pytest.approx(BYTE_S, rel=0.01)
    assert found.decode_s_per_layer == pytest.approx(LAYER_S, rel=0.01)
    assert found.attention.step == 256
    assert found.attention.by_head.keys() == ATTENTION.by_head.keys()
    for length, price in found.attention.by_head.items():
        assert price.query_s == pytest.approx(ATTENTION.by_head[length].query_s, rel=0.01)
        assert price.kv_s == pytest.approx(ATTENTION.by_head[length].kv_s, rel=0.01)
    assert found.prefill_s_per_weight == pytest.approx(WEIGHT_S, rel=0.01)
    assert found.copied_share == COPIED
    assert found.base_anon_bytes == pytest.approx(BASE_BYTES, rel=0.01)
    assert found.base_file_bytes == pytest.approx(19_000_000)
    assert found.buffer_scale == pytest.approx(0.9, rel=0.01)


def test_no_price_is_negative_even_on_a_noisy_machine() -> None:
    found = solved(noise=0.5)

    assert min(found.decode_s_per_byte.values()) >= 0
    assert found.decode_s_per_layer >= 0
    assert min(min(price.query_s, price.kv_s) for price in found.attention.by_head.values()) >= 0


@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m", "q8_0"])
def test_forecasts_an_unprobed_model_within_2_percent(quant: str) -> None:
    cost = cost_of_shape(LLAMA_32_3B, quant)  # type: ignore[arg-type]

    found = forecast(cost, solved(), context=4096, depth=1000)

    assert found.decode_tps == pytest.approx(1 / decode_s(cost, 1000), rel=0.02)
    assert found.unknown == ()


def test_5_percent_noise_in_the_probes_is_at_most_10_percent_in_a_forecast() -> None:
    cost = cost_of_shape(LLAMA_32_3B, "q4_k_m")

    found = forecast(cost, solved(noise=0.05), context=4096, depth=1000)

    assert found.decode_tps == pytest.approx(1 / decode_s(cost, 1000), rel=0.10)
