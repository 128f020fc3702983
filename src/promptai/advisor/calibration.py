"""Prices of this machine's engine: seconds per byte, weight and layer, fitted from small random models. Pure.

"Memory bandwidth divided by file size" is a bound, not a forecast: on a server core it is three times too high,
because unpacking four-bit weights takes longer than reading them, and each type of weights has its own price. So the
real engine runs a few models of some hundred megabytes whose costs differ, and the prices are solved for.
``engine.probe`` measures; this module does the algebra.

Decoding one token takes

    sum over types (bytes of the type x seconds per byte) + layers x seconds per layer + attention

and the engine's anonymous memory after loading is

    base + KV cache + sum over types (bytes of the type x share that the engine copies)

because llama.cpp rearranges the weights of some types for its fastest kernels and keeps both copies.
The attention term is in ``advisor.attention``.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from promptai.advisor.attention import AttentionPrices, AttentionReading, fit_attention
from promptai.advisor.cost import ModelCost
from promptai.advisor.solve import solve_prices
from promptai.models.shape import Shape
from promptai.models.tensors import Quant

SCHEMA = 2
_FEW_TOKENS = 2100  # slightly above promptai-tiny's vocabulary, so that the output matrix hardly counts


class Probe(msgspec.Struct, frozen=True):
    """A probe model."""

    name: str
    shape: Shape
    quant: Quant


#: Each probe separates a price that the others cannot. All but the last, which is mostly layers, exceed any CPU cache.
PROBES = (
    Probe("q8_0", Shape(4, 2048, 16, 4, 8192, _FEW_TOKENS), "q8_0"),
    Probe("q4_0", Shape(8, 2048, 16, 16, 8192, _FEW_TOKENS), "q4_0"),
    Probe("q4_k_m", Shape(8, 2048, 16, 4, 8192, _FEW_TOKENS), "q4_k_m"),
    Probe("large vocabulary", Shape(1, 2048, 16, 4, 8192, 150_000, tied=True), "q4_0"),
    Probe("many layers", Shape(40, 512, 8, 2, 1024, _FEW_TOKENS), "q8_0"),
)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """
    Measurements of one probe.

    Attributes:
        decode_s: Seconds per generated token with ``depth`` tokens before it.
        prefill_s: Seconds per prompt token.
        context: Context size of the engine in tokens.
        anon_loaded_bytes: Anonymous memory of the engine after loading; ``anon_peak_bytes`` after a prompt.
        file_mapped_bytes: Mapped files, the model included.
    """

    cost: ModelCost
    decode_s: float
    depth: int
    prefill_s: float
    context: int
    anon_loaded_bytes: int
    anon_peak_bytes: int
    file_mapped_bytes: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """
    Prices of one engine on one machine with one number of threads.

    Attributes:
        engine, cpu, threads: The configuration it is valid for.
        decode_s_per_byte: Seconds per byte read, by ggml type.
        decode_s_per_layer: Seconds per layer in addition to its bytes.
        attention: Prices of the cached tokens.
        prefill_s_per_weight: Seconds per weight and prompt token, by ggml type.
        copied_share: Share of the bytes that exist twice in memory, by ggml type.
        base_anon_bytes, base_file_bytes: Memory of the engine without a model.
        buffer_scale: Measured compute buffers relative to ``buffer_bytes``.
        created: UTC, ISO 8601.
    """

    engine: str
    cpu: str
    threads: int
    decode_s_per_byte: dict[str, float]
    decode_s_per_layer: float
    attention: AttentionPrices
    prefill_s_per_weight: dict[str, float]
    copied_share: dict[str, float]
    base_anon_bytes: int
    base_file_bytes: int
    buffer_scale: float
    created: str
    schema: int = SCHEMA


def fit_calibration(
    readings: Sequence[Reading],
    attention_readings: Sequence[AttentionReading],
    *,
    engine: str,
    cpu: str,
    threads: int,
    created: str,
) -> Calibration:
    """
    Solve for the prices.

    Raises:
        ValueError: A probe's KV cache is of unknown size, or its head length has no attention reading.
    """
    attention = fit_attention(attention_readings)
    types = sorted({kind for reading in readings for kind in reading.cost.decode_bytes})
    decode = solve_prices(
        [[*(r.cost.decode_bytes.get(kind, 0) for kind in types), r.cost.layers] for r in readings],
        [r.decode_s - _attention_s(r, attention) for r in readings],
    )
    memory = solve_prices(
        [[*(r.cost.decode_bytes.get(kind, 0) for kind in types), 1] for r in readings],
        [r.anon_loaded_bytes - _kv_bytes(r, r.context) for r in readings],
    )
    scales = [(r.anon_peak_bytes - r.anon_loaded_bytes) / buffer_bytes(r.cost) for r in readings]
    return Calibration(
        engine=engine,
        cpu=cpu,
        threads=threads,
        decode_s_per_byte=dict(zip(types, decode[:-1], strict=True)),
        decode_s_per_layer=decode[-1],
        attention=attention,
        prefill_s_per_weight=_prefill_prices(readings),
        # The engine copies a type or it does not; fractions are noise of the other terms.
        copied_share={kind: float(round(min(share, 1.0))) for kind, share in zip(types, memory[:-1], strict=True)},
        base_anon_bytes=round(memory[-1]),
        base_file_bytes=round(np.median([max(0, r.file_mapped_bytes - r.cost.file_bytes) for r in readings])),
        buffer_scale=float(np.median(scales)),
        created=created,
    )


def buffer_bytes(cost: ModelCost, *, batch: int = 512) -> int:
    """
    Estimate the compute buffers of one batch: gate and up of a layer, five vectors, samplers.

    Deliberately rough, because they are a few percent of the memory; ``Calibration.buffer_scale`` corrects it.
    """
    return 4 * batch * (2 * cost.ffn + 5 * cost.width) + 50 * cost.vocabulary


def _prefill_prices(readings: Sequence[Reading]) -> dict[str, float]:
    """
    Seconds per weight and prompt token; K-quants share one price, as every mix has them in similar shares.

    Probes with a single layer are ignored: nearly all of it is computed for the last prompt token only.
    """
    readings = [reading for reading in readings if reading.cost.layers > 1]
    kinds = sorted({kind for reading in readings for kind in reading.cost.prefill_weights})
    groups = sorted({_group(kind) for kind in kinds})
    solved = solve_prices(
        [
            [sum(n for kind, n in r.cost.prefill_weights.items() if _group(kind) == group) for group in groups]
            for r in readings
        ],
        [r.prefill_s for r in readings],
    )
    by_group = dict(zip(groups, solved, strict=True))
    return {kind: by_group[_group(kind)] for kind in kinds}


def _group(kind: str) -> str:
    return "K" if kind.endswith("_K") else kind


def _kv_bytes(reading: Reading, tokens: int) -> int:
    found = reading.cost.kv_bytes(tokens)
    if found is None:
        raise ValueError("a probe needs a KV cache of known size")
    return found


def _attention_s(reading: Reading, attention: AttentionPrices) -> float:
    found = attention.seconds(reading.cost, reading.depth)
    if found is None:
        raise ValueError("a probe needs a head length whose attention was measured")
    return found
