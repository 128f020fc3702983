import msgspec
import pytest

from promptai.advisor.calibration import buffer_bytes
from promptai.advisor.cost import cost_of_shape
from promptai.advisor.fit import MachineCapacity, model_fit
from promptai.advisor.forecast import decode_bound_tps, forecast
from promptai.models.shape import Shape
from support_calibration import CALIBRATION

COST = cost_of_shape(Shape(2, 512, 4, 2, 1024, 3000), "q4_0")


def test_unmeasured_weight_types_have_no_rate_and_are_named() -> None:
    known_a_part = msgspec.structs.replace(CALIBRATION, decode_s_per_byte={"Q4_0": 1e-9}, prefill_s_per_weight={})

    found = forecast(COST, known_a_part, context=1024, depth=0)

    assert (found.decode_tps, found.prefill_tps, found.unknown) == (None, None, ("Q6_K",))


def test_an_unmeasured_head_length_has_no_decode_rate_and_is_named() -> None:
    other = cost_of_shape(Shape(2, 512, 4, 2, 1024, 3000, head_length=112), "q4_0")

    found = forecast(other, CALIBRATION, context=1024, depth=0)

    assert (found.decode_tps, found.unknown) == (None, ("heads of 112",))
    assert found.prefill_tps is not None
    assert found.anon_bytes is not None


def test_unknown_attention_has_no_decode_rate() -> None:
    found = forecast(msgspec.structs.replace(COST, attention=None), CALIBRATION, context=1024, depth=0)

    assert found.decode_tps is None


def test_more_query_heads_per_kv_head_take_longer_at_a_depth() -> None:
    many = cost_of_shape(Shape(2, 512, 8, 2, 1024, 3000, head_length=128), "q4_0")
    same_weights = msgspec.structs.replace(many, decode_bytes=COST.decode_bytes)

    few_s, many_s = (
        1 / (forecast(cost, CALIBRATION, context=2048, depth=1000).decode_tps or 0) for cost in (COST, same_weights)
    )

    assert many.kv_bytes(1000) == COST.kv_bytes(1000)
    assert many_s - few_s == pytest.approx(2 * 1000 * (8 - 4) * 128 * 1e-9)


def test_a_kv_cache_of_unknown_size_makes_the_memory_unknown() -> None:
    found = forecast(msgspec.structs.replace(COST, kv_bytes_per_token=None), CALIBRATION, context=1024, depth=0)

    assert (found.anon_bytes, found.resident_bytes, found.needed_bytes) == (None, None, None)


def test_a_token_costs_its_bytes_and_its_layers() -> None:
    found = forecast(COST, CALIBRATION, context=1024, depth=0)

    expected_s = COST.decode_bytes["Q4_0"] * 1e-9 + COST.decode_bytes["Q6_K"] * 2e-9 + 2 * 0.001
    assert found.decode_tps == pytest.approx(1 / expected_s)
    assert found.prefill_tps == pytest.approx(1 / (COST.prefill_weights["Q4_0"] * 1e-11))


def test_weights_that_the_engine_copies_are_resident_twice_and_needed_once() -> None:
    found = forecast(COST, CALIBRATION, context=1024, depth=0)

    copied = COST.decode_bytes["Q4_0"]
    anonymous = 1_000_000 + (COST.kv_bytes(1024) or 0) + copied + buffer_bytes(COST)
    assert found.anon_bytes == anonymous
    assert found.resident_bytes == anonymous + COST.file_bytes + 500_000
    assert found.needed_bytes == found.resident_bytes - copied


def test_a_larger_context_takes_memory_and_more_depth_takes_time() -> None:
    near, far = (forecast(COST, CALIBRATION, context=4096, depth=depth) for depth in (10, 4000))

    assert near.anon_bytes == far.anon_bytes
    assert (near.decode_tps or 0) > (far.decode_tps or 0)


def test_without_a_calibration_the_figures_are_bounds() -> None:
    seen = model_fit(COST, MachineCapacity(available_bytes=10**9, read_bytes_per_s=1e9), context=1024, depth=512)

    assert not seen.calibrated
    assert seen.decode_tps == decode_bound_tps(COST, 1e9) == pytest.approx(1e9 / sum(COST.decode_bytes.values()))
    assert seen.prefill_tps is None
    assert seen.memory_bytes == COST.file_bytes + (COST.kv_bytes(1024) or 0) + buffer_bytes(COST)


@pytest.mark.parametrize(("available", "fits"), [(10**6, False), (10**9, True)])
def test_a_model_fits_if_its_memory_is_available(available: int, fits: bool) -> None:  # noqa: FBT001
    here = MachineCapacity(available_bytes=available, read_bytes_per_s=1e9, calibration=CALIBRATION)

    assert model_fit(COST, here, context=1024, depth=512).fits is fits
