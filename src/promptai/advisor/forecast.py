"""What a model will do here: tokens a second and bytes, from its shape and this machine's calibration.

Downloading two gigabytes over a slow link to learn that a model makes half a token a
second is what this saves. Without a calibration there is still a bound: no engine
decodes faster than memory can be read. A figure that would rest on a type of weights
or a length of heads that was never measured is ``None``, with what is missing named. Pure.

Not forecast: heat, swapping, and what other programs take.
"""

import msgspec

from promptai.advisor.calibration import Calibration, buffer_bytes
from promptai.advisor.cost import ModelCost


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """
    Expected of one model on one engine.

    Attributes:
        decode_tps: Tokens a second of one stream, with ``depth`` tokens before it; ``prefill_tps`` of a prompt.
        anon_bytes: Memory that the kernel cannot drop: KV cache, buffers, rearranged weights.
        file_bytes: Mapped files; of these ``spare_bytes`` exist a second time and can be dropped.
        unknown: Types of weights, and a length of heads, that were never measured; they are why a rate is ``None``.
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
        """What the process shows as resident while there is plenty of memory."""
        return None if self.anon_bytes is None else self.anon_bytes + self.file_bytes

    @property
    def needed_bytes(self) -> int | None:
        """What must stay in memory for it to run at this speed."""
        return None if self.anon_bytes is None else self.anon_bytes + self.file_bytes - self.spare_bytes


def forecast(cost: ModelCost, calibration: Calibration, *, context: int, depth: int) -> Forecast:
    """
    Price ``cost``.

    Args:
        context: Tokens of context that the engine is started with: they take memory.
        depth: Tokens that stand before the one being generated: they take time.
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
    """Tokens a second that memory bandwidth alone allows; ``None`` without a matrix to read."""
    size = sum(cost.decode_bytes.values())
    return read_bytes_per_s / size if size else None


def _unknown(cost: ModelCost, calibration: Calibration) -> tuple[str, ...]:
    types = sorted(cost.decode_bytes.keys() - calibration.decode_s_per_byte.keys())
    head = cost.attention.head if cost.attention is not None else None
    return (*types, *(() if head is None or head in calibration.attention.by_head else (f"heads of {head}",)))


def _decode_tps(cost: ModelCost, calibration: Calibration, depth: int) -> float | None:
    """``None`` where a type of weights, or what attention costs, is not known."""
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
