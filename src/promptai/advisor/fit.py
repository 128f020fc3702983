"""Whether a model fits this machine, and its expected speed. Pure.

The figures are either forecasts from a calibration of this machine's engine or, without one, bounds from arithmetic
and memory bandwidth alone: a minimum of memory and a maximum of tokens per second. The two are never mixed.
"""

import msgspec

from promptai.advisor.calibration import Calibration, buffer_bytes
from promptai.advisor.cost import ModelCost
from promptai.advisor.forecast import decode_bound_tps, forecast


class ModelFit(msgspec.Struct, frozen=True, kw_only=True):
    """
    Memory and speed of one model on this machine.

    Attributes:
        calibrated: True: the figures are forecasts; false: ``memory_bytes`` is a lower bound, ``decode_tps`` an upper.
        memory_bytes: Weights, KV cache of ``context`` tokens and buffers; ``None``: KV cache of unknown size.
        fits: Whether that much memory is available now; ``None``: unknown.
        unknown: Types of weights and head lengths that are missing in the calibration.
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
    Memory and speed of this machine.

    Attributes:
        available_bytes: Memory available to a new process.
        read_bytes_per_s: Memory bandwidth; bounds the speed without a calibration.
        calibration: Calibration of its engine; ``None``: not calibrated.
    """

    available_bytes: int
    read_bytes_per_s: float
    calibration: Calibration | None = None


def model_fit(cost: ModelCost, machine: MachineCapacity, *, context: int, depth: int) -> ModelFit:
    """Assess a model; ``context`` tokens determine the memory, ``depth`` tokens before the next one the time."""
    unknown: tuple[str, ...] = ()
    prefill: float | None = None
    if machine.calibration is None:
        kv = cost.kv_bytes(context)
        memory = None if kv is None else cost.file_bytes + kv + buffer_bytes(cost)
        decode = decode_bound_tps(cost, machine.read_bytes_per_s)
    else:
        expected = forecast(cost, machine.calibration, context=context, depth=depth)
        memory, decode, prefill = expected.needed_bytes, expected.decode_tps, expected.prefill_tps
        unknown = expected.unknown
    return ModelFit(
        file_bytes=cost.file_bytes,
        context=context,
        calibrated=machine.calibration is not None,
        memory_bytes=memory,
        fits=None if memory is None else memory <= machine.available_bytes,
        decode_tps=decode,
        prefill_tps=prefill,
        unknown=unknown,
    )
