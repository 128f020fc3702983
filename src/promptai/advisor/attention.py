"""Price of context: the seconds that attention adds to each decoded token, by head length. Pure.

Attention compares a token with every token before it, once per query head. The speed of an engine's kernel depends on
the head length more than on the bytes read, so each head length has prices of its own:

    layers x cached tokens x (query width x seconds per query value + KV width x seconds per KV value)

They are measured with small models that consist almost entirely of attention. Head lengths that were not measured
have no price.

llama.cpp splits a token's attention between its threads by cells of the cache and rounds the cells up to 256, so with
two or more threads the slowest thread determines the time. Other builds and a single thread do not round up; the
readings show whether this engine does.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from promptai.advisor.cost import ModelCost
from promptai.advisor.solve import solve_prices
from promptai.models.shape import Shape

#: llama.cpp splits from this many cells on, and rounds to it (n_kv in src/llama-kv-cache.cpp, 512 in
#: ggml-cpu/ops.cpp).
CELLS = 256
#: Head length -> number of heads of its probes. The lengths and widths are close to those of the catalogue's models.
_HEADS = {64: 32, 80: 32, 96: 32, 128: 16, 256: 8}
#: Query heads per KV head.
_SHARING = (1, 4, 8)


class AttentionProbe(msgspec.Struct, frozen=True):
    """A probe model that consists almost entirely of attention."""

    name: str
    shape: Shape


#: Thin, so that their weights hardly count. Six layers, so that the KV cache of the widest exceeds a CPU cache.
ATTENTION_PROBES = tuple(
    AttentionProbe(
        f"heads of {length}, {heads} on {heads // sharing}",
        Shape(6, 256, heads, heads // sharing, 256, 2100, head_length=length),
    )
    for length, heads in _HEADS.items()
    for sharing in _SHARING
)


class AttentionReading(msgspec.Struct, frozen=True, kw_only=True):
    """
    Measurements of one probe.

    Attributes:
        decode_s: Depth (tokens before the decoded one) -> seconds to decode one token.
    """

    cost: ModelCost
    decode_s: dict[int, float]


class AttentionPrice(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds per cached token and query value, and per cached token and key value."""

    query_s: float
    kv_s: float


class AttentionPrices(msgspec.Struct, frozen=True, kw_only=True):
    """
    Attention prices of one engine with one number of threads.

    Attributes:
        by_head: Prices by ``Attention.head``.
        step: Number of tokens to which the engine rounds its work up; 1: no rounding.
    """

    by_head: dict[str, AttentionPrice]
    step: int

    def seconds(self, cost: ModelCost, depth: int) -> float | None:
        """Seconds that ``depth`` cached tokens add to a decoded token; ``None`` if the head length was not measured."""
        attention = cost.attention
        price = self.by_head.get(attention.head) if attention is not None else None
        if attention is None or price is None:
            return None
        per_token = attention.query_width * price.query_s + attention.kv_width * price.kv_s
        return cost.mean_cached_tokens(tokens_worked(depth, self.step)) * per_token


def tokens_worked(depth: int, step: int) -> int:
    """Tokens of work of the slowest thread, times threads; below one step, engines split evenly by heads."""
    return depth if depth < step else (depth // step + 1) * step if step > 1 else depth


def fit_attention(readings: Sequence[AttentionReading]) -> AttentionPrices:
    """
    Solve for the attention prices.

    The fastest reading of a shape at a depth counts: other programs can only add time, and a slope is a difference. A
    shape that was no slower with more context was disturbed and is ignored; a head length without any other shape has
    no price.

    Raises:
        ValueError: A probe has unknown attention, or was measured at fewer than two depths.
    """
    fastest: dict[tuple[str, int, int], dict[int, float]] = {}
    for reading in readings:
        attention = reading.cost.attention
        if attention is None or len(reading.decode_s) < 2:
            raise ValueError("an attention probe needs known attention and two depths")
        by_depth = fastest.setdefault((attention.head, attention.query_width, attention.kv_width), {})
        for depth, seconds in reading.decode_s.items():
            by_depth[depth] = min(seconds, by_depth.get(depth, seconds))
    step = min((1, CELLS), key=lambda step: sum(_misfit(by_depth, step) for by_depth in fastest.values()))
    by_head = {}
    for head in dict.fromkeys(key[0] for key in fastest):
        slopes = {key[1:]: _slope(by_depth, step) for key, by_depth in fastest.items() if key[0] == head}
        rising = {widths: slope for widths, slope in slopes.items() if slope > 0}
        if rising:
            query_s, kv_s = solve_prices(list(rising), list(rising.values()))
            by_head[head] = AttentionPrice(query_s=query_s, kv_s=kv_s)
    return AttentionPrices(by_head=by_head, step=step)


def _slope(by_depth: Mapping[int, float], step: int) -> float:
    near, far = min(by_depth), max(by_depth)
    return (by_depth[far] - by_depth[near]) / (tokens_worked(far, step) - tokens_worked(near, step))


def _misfit(by_depth: Mapping[int, float], step: int) -> float:
    """Squared residuals of a straight line through the readings, relative to the longest."""
    cells = np.array([tokens_worked(depth, step) for depth in by_depth], dtype=np.float64)
    seconds = np.array(list(by_depth.values())) / max(by_depth.values())
    matrix = np.stack([cells / cells.max(), np.ones_like(cells)], axis=1)
    line = np.linalg.lstsq(matrix, seconds, rcond=None)[0]
    return float(((matrix @ line - seconds) ** 2).sum())
