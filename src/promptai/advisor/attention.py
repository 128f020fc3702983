"""What context costs: seconds that attention adds to a decoded token, by head length.

Attention compares a token with every one before it, once a query head, and how fast an engine's kernel does that
depends on the length of the heads more than on the bytes that it reads. So every length has prices of its own,

    layers x tokens seen x (query width x seconds a query value + KV width x seconds a KV value)

measured with small models that are nearly all attention. A length that was not measured has none. Pure.

llama.cpp shares a token's attention between its threads by cells of the cache, and rounds the cells up to 256: with
two threads or more the slowest one has work for all of them. Whether an engine does that here is found from the
readings, since other builds, and a single thread, do not.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from promptai.advisor.cost import ModelCost
from promptai.advisor.solve import solve_prices
from promptai.models.shape import Shape

#: Where llama.cpp's split begins, and what it rounds to (n_kv in src/llama-kv-cache.cpp, 512 in ggml-cpu/ops.cpp).
CELLS = 256
#: Head length -> heads of its probes. Lengths of the catalogue's models, about as wide as these are.
_HEADS = {64: 32, 80: 32, 96: 32, 128: 16, 256: 8}
#: Query heads that share a KV head.
_SHARING = (1, 4, 8)


class AttentionProbe(msgspec.Struct, frozen=True):
    """One model to run that is nearly all attention."""

    name: str
    shape: Shape


#: Thin, so that their weights hardly count; six layers, so that the cache of the widest is larger than a processor's.
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
    What one probe did.

    Attributes:
        decode_s: Tokens before the one that is decoded -> seconds that it took.
    """

    cost: ModelCost
    decode_s: dict[int, float]


class AttentionPrice(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds for each token seen and each number of a layer's queries, or of its keys."""

    query_s: float
    kv_s: float


class AttentionPrices(msgspec.Struct, frozen=True, kw_only=True):
    """
    Of one engine with one number of threads.

    Attributes:
        by_head: By head length, as ``Attention.head`` names it.
        step: The engine has work for a multiple of so many tokens; 1: for each as it comes.
    """

    by_head: dict[str, AttentionPrice]
    step: int

    def seconds(self, cost: ModelCost, depth: int) -> float | None:
        """What ``depth`` tokens before it add to a decoded token; ``None`` for a length that was not measured."""
        attention = cost.attention
        price = self.by_head.get(attention.head) if attention is not None else None
        if attention is None or price is None:
            return None
        a_token = attention.query_width * price.query_s + attention.kv_width * price.kv_s
        return cost.mean_cached_tokens(tokens_worked(depth, self.step)) * a_token


def tokens_worked(depth: int, step: int) -> int:
    """Tokens of work for the slowest thread, times threads. Below one step the engine shares it by heads, evenly."""
    return depth if depth < step else (depth // step + 1) * step if step > 1 else depth


def fit_attention(readings: Sequence[AttentionReading]) -> AttentionPrices:
    """
    Solve for the prices.

    Of what a shape did at one depth the least counts: whatever else runs only ever adds, and a slope is a difference.
    A shape that was no slower with more context was disturbed, and is left out; a length without any other gets none.

    Raises:
        ValueError: A probe's attention is of unknown form, or was measured at fewer than two depths.
    """
    least: dict[tuple[str, int, int], dict[int, float]] = {}
    for reading in readings:
        attention = reading.cost.attention
        if attention is None or len(reading.decode_s) < 2:
            raise ValueError("an attention probe needs a known form and two depths")
        seen = least.setdefault((attention.head, attention.query_width, attention.kv_width), {})
        for depth, seconds in reading.decode_s.items():
            seen[depth] = min(seconds, seen.get(depth, seconds))
    step = min((1, CELLS), key=lambda step: sum(_misfit(seen, step) for seen in least.values()))
    by_head = {}
    for head in dict.fromkeys(key[0] for key in least):
        slopes = {key[1:]: _slope(seen, step) for key, seen in least.items() if key[0] == head}
        rising = {widths: slope for widths, slope in slopes.items() if slope > 0}
        if rising:
            query_s, kv_s = solve_prices(list(rising), list(rising.values()))
            by_head[head] = AttentionPrice(query_s=query_s, kv_s=kv_s)
    return AttentionPrices(by_head=by_head, step=step)


def _slope(seen: Mapping[int, float], step: int) -> float:
    near, far = min(seen), max(seen)
    return (seen[far] - seen[near]) / (tokens_worked(far, step) - tokens_worked(near, step))


def _misfit(seen: Mapping[int, float], step: int) -> float:
    """Squared distance of the depths from a straight line through them, relative to the longest."""
    cells = np.array([tokens_worked(depth, step) for depth in seen], dtype=np.float64)
    seconds = np.array(list(seen.values())) / max(seen.values())
    matrix = np.stack([cells / cells.max(), np.ones_like(cells)], axis=1)
    line = np.linalg.lstsq(matrix, seconds, rcond=None)[0]
    return float(((matrix @ line - seconds) ** 2).sum())
