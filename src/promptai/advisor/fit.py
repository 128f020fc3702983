"""One model's line in a list: does it fit this machine, and what would it do?

Two kinds of figures, never mixed up: forecasts from a calibration of this machine's engine,
and, where there is none, bounds (at least so much memory, at most so many tokens a second)
from arithmetic and memory bandwidth alone. Pure.
"""

import msgspec

from promptai.advisor.calibration import Calibration, buffer_bytes
from promptai.advisor.cost import ModelCost
from promptai.advisor.forecast import decode_bound_tps, forecast


class ModelFit(msgspec.Struct, frozen=True, kw_only=True):
    """
    What to expect of one model here.

    Attributes:
        calibrated: Forecasts; otherwise ``memory_bytes`` is a lower and ``decode_tps`` an upper bound.
        memory_bytes: Weights, KV cache of ``context`` tokens and buffers; ``None`` for a cache of unknown form.
        fits: Whether that is available now.
        unknown: Types of weights, and a length of heads, that the calibration does not know.
    """

    file_bytes: int
    context: int
    calibrated: bool
    memory_bytes: int | None
    fits: bool | None
    decode_tps: float | None
    prefill_tps: float | None
    unknown: tuple[str, ...] = ()


class MachineCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """
    This machine as far as models matter.

    Attributes:
        available_bytes: Memory that a new process could take.
        calibration: Of its engine; ``None``: there is none, ``read_bytes_per_s`` bounds instead.
    """

    available_bytes: int
    read_bytes_per_s: float
    calibration: Calibration | None = None


def model_fit(cost: ModelCost, here: MachineCapacity, *, context: int, depth: int) -> ModelFit:
    """Judge one model; ``context`` tokens take memory, ``depth`` tokens before the next one take time."""
    unknown: tuple[str, ...] = ()
    prefill: float | None = None
    if here.calibration is None:
        kv = cost.kv_bytes(context)
        memory = None if kv is None else cost.file_bytes + kv + buffer_bytes(cost)
        decode = decode_bound_tps(cost, here.read_bytes_per_s)
    else:
        expected = forecast(cost, here.calibration, context=context, depth=depth)
        memory, decode, prefill = expected.needed_bytes, expected.decode_tps, expected.prefill_tps
        unknown = expected.unknown
    return ModelFit(
        file_bytes=cost.file_bytes,
        context=context,
        calibrated=here.calibration is not None,
        memory_bytes=memory,
        fits=None if memory is None else memory <= here.available_bytes,
        decode_tps=decode,
        prefill_tps=prefill,
        unknown=unknown,
    )
