"""Forecast a model's tokens per second and memory from its cost and this machine's calibration. Pure.

A forecast saves the download of two gigabytes over a slow link only to find that a model generates half a token per
second. Without a calibration there is still a bound: no engine decodes faster than memory can be read. A rate that
depends on a type of weights or a head length that was never measured is ``None``, and the missing type is named.

Heat, swapping and other programs are not part of the forecast.
"""

import msgspec

from promptai.advisor.calibration import Calibration, buffer_bytes
from promptai.advisor.cost import ModelCost


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """
    Forecast for one model on one engine.

    Attributes:
        decode_tps: Generated tokens per second of a single stream with ``depth`` tokens before it; ``None``: unknown.
        prefill_tps: Prompt tokens per second; ``None``: unknown.
        anon_bytes: Memory that the kernel cannot drop: KV cache, buffers, rearranged weights; ``None``: unknown.
        file_bytes: Mapped files; ``spare_bytes`` of them exist a second time and can be dropped.
        unknown: Types of weights and head lengths that were never measured: the reason why a rate is unknown.
    """

    decode_tps: float | None
    prefill_tps: float | None
    anon_bytes: int | None
    file_bytes: int
    spare_bytes: int
    depth: int
    unknown: tuple[str, ...] = ()

    @property
    def resident_bytes(self) -> int | None:
        """Resident memory of the process while memory is plentiful."""
        return None if self.anon_bytes is None else self.anon_bytes + self.file_bytes

    @property
    def needed_bytes(self) -> int | None:
        """Memory that must stay resident to run at the forecast speed."""
        return None if self.anon_bytes is None else self.anon_bytes + self.file_bytes - self.spare_bytes


def forecast(cost: ModelCost, calibration: Calibration, *, context: int, depth: int) -> Forecast:
    """
    Forecast speed and memory of a model.

    Args:
        context: Context size of the engine in tokens; determines the memory.
        depth: Tokens before the one being generated; determines the time.
    """
    copied = sum(calibration.copied_share.get(kind, 0.0) * size for kind, size in cost.decode_bytes.items())
    kv = cost.kv_bytes(context)
    return Forecast(
        decode_tps=_decode_tps(cost, calibration, depth),
        prefill_tps=_prefill_tps(cost, calibration),
        anon_bytes=None
        if kv is None
        else round(calibration.base_anon_bytes + kv + copied + calibration.buffer_scale * buffer_bytes(cost)),
        file_bytes=cost.file_bytes + calibration.base_file_bytes,
        spare_bytes=round(copied),
        depth=depth,
        unknown=_unknown(cost, calibration),
    )


def decode_bound_tps(cost: ModelCost, read_bytes_per_s: float) -> float | None:
    """Upper bound of tokens per second by memory bandwidth; ``None`` for a model without matrices."""
    size = sum(cost.decode_bytes.values())
    return read_bytes_per_s / size if size else None


def _unknown(cost: ModelCost, calibration: Calibration) -> tuple[str, ...]:
    types = sorted(cost.decode_bytes.keys() - calibration.decode_s_per_byte.keys())
    head = cost.attention.head if cost.attention is not None else None
    return (*types, *(() if head is None or head in calibration.attention.by_head else (f"heads of {head}",)))


def _decode_tps(cost: ModelCost, calibration: Calibration, depth: int) -> float | None:
    """Tokens per second; ``None`` if a price of a weight type or of attention is unknown."""
    prices, attention_s = calibration.decode_s_per_byte, calibration.attention.seconds(cost, depth)
    if not cost.decode_bytes or cost.decode_bytes.keys() - prices.keys() or attention_s is None:
        return None
    reading = sum(prices[kind] * size for kind, size in cost.decode_bytes.items())
    return 1 / (reading + calibration.decode_s_per_layer * cost.layers + attention_s)


def _prefill_tps(cost: ModelCost, calibration: Calibration) -> float | None:
    prices = calibration.prefill_s_per_weight
    if not cost.prefill_weights or cost.prefill_weights.keys() - prices.keys():
        return None
    return 1 / sum(prices[kind] * count for kind, count in cost.prefill_weights.items())
