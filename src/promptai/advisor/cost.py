"""Cost of a model on any machine: bytes read per generated token, weights multiplied per prompt token. Pure.

Forecasts of speed and memory need the same few figures whether a model is a file or only a catalogue entry;
``ModelCost`` holds them for both.

Decoding reads every matrix once per token. The embedding counts only if it is also the output
matrix (tied); otherwise decoding looks up a single row of it.
"""

from collections.abc import Iterable
from math import prod
from typing import Protocol

import msgspec

from promptai.models.gguf import GgufHeader
from promptai.models.shape import Shape
from promptai.models.tensors import Quant, plan_tensors, tensor_bytes

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
#: One layer in this many attends to the whole context, the others to a window (llama.cpp, src/models/gemma*.cpp).
_WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6}


class Attention(msgspec.Struct, frozen=True, kw_only=True):
    """
    Size of the attention to each cached token.

    Attributes:
        head: Head length; ``192/128`` if keys and values differ.
        query_width, kv_width: Heads and KV heads, times the key length, summed over the layers.
    """

    head: str
    query_width: int
    kv_width: int


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """
    Cost of one model.

    Attributes:
        file_bytes: Size of the file, or of the tensors alone if there is no file yet.
        decode_bytes: Bytes read per generated token, by ggml type of the matrix.
        prefill_weights: Weights multiplied per prompt token, by ggml type. Excludes the output matrix and the last
            layer after its attention, which llama.cpp computes for the last prompt token only.
        layers, width, ffn, vocabulary: As in ``Shape``.
        kv_bytes_per_token: Size of the f16 KV cache per token, all layers; ``None``: not given in the file.
        attention: ``None``: not given in the file.
        window: Length of the sliding window in tokens, and the share of layers that use it; ``None``: no window.
    """

    file_bytes: int
    decode_bytes: dict[str, int]
    prefill_weights: dict[str, int]
    layers: int
    width: int
    ffn: int
    vocabulary: int
    kv_bytes_per_token: int | None
    attention: Attention | None
    window: tuple[int, float] | None = None

    def kv_bytes(self, context: int) -> int | None:
        """Size of the KV cache for ``context`` tokens; ``None``: unknown."""
        return (
            None
            if self.kv_bytes_per_token is None
            else round(self.kv_bytes_per_token * self.mean_cached_tokens(context))
        )

    def mean_cached_tokens(self, tokens: int) -> float:
        """Mean over the layers of the cached tokens; a windowed layer keeps its window and one batch of 512."""
        if self.window is None:
            return tokens
        length, share = self.window
        return (1 - share) * tokens + share * min(tokens, length + 512)


class _Tensor(Protocol):
    """The common part of planned tensors and tensors of a file."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def quantization(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


def cost_of_shape(shape: Shape, quant: Quant) -> ModelCost:
    """Return the cost of a model from its shape alone; raises ``KeyError`` for an unknown architecture."""
    decode, prefill = _matrices(plan_tensors(shape, quant))
    return ModelCost(
        file_bytes=tensor_bytes(shape, quant),
        decode_bytes=decode,
        prefill_weights=prefill,
        layers=shape.layers,
        width=shape.width,
        ffn=shape.ffn,
        vocabulary=shape.vocabulary,
        kv_bytes_per_token=2 * 2 * shape.head * shape.kv_heads * shape.layers,
        attention=Attention(
            head=str(shape.head),
            query_width=shape.head * shape.heads * shape.layers,
            kv_width=shape.head * shape.kv_heads * shape.layers,
        ),
        window=_window(shape.architecture, shape.sliding_window),
    )


def cost_of_file(header: GgufHeader) -> ModelCost:
    """Return the cost of a model file from its header."""
    decode, prefill = _matrices(header.tensors)
    rows = next((tensor.shape[-1] for tensor in header.tensors if tensor.name == _EMBEDDING), 0)
    name = header.architecture
    return ModelCost(
        file_bytes=header.file_bytes,
        decode_bytes=decode,
        prefill_weights=prefill,
        layers=_number(header, f"{name}.block_count"),
        width=_number(header, f"{name}.embedding_length"),
        ffn=_number(header, f"{name}.feed_forward_length"),
        vocabulary=rows,
        kv_bytes_per_token=header.kv_bytes_per_token(),
        attention=_attention(header),
        window=_window(name, header.sliding_window),
    )


def _attention(header: GgufHeader) -> Attention | None:
    heads = header.heads
    if heads is None:
        return None
    key, value = heads.key_length, heads.value_length
    head = str(key) if key == value else f"{key}/{value}"
    return Attention(head=head, query_width=heads.query_heads * key, kv_width=heads.kv_heads * key)


def _matrices(tensors: Iterable[_Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    matrices = {tensor.name: tensor for tensor in tensors if len(tensor.shape) > 1}
    if _OUTPUT in matrices:
        matrices.pop(_EMBEDDING, None)
    last = max((int(name.split(".")[1]) for name in matrices if name.startswith("blk.")), default=0)
    once = (_OUTPUT, _EMBEDDING, f"blk.{last}.attn_output.", f"blk.{last}.ffn_")
    decode: dict[str, int] = {}
    prefill: dict[str, int] = {}
    for name, tensor in matrices.items():
        decode[tensor.quantization] = decode.get(tensor.quantization, 0) + tensor.size_bytes
        if not name.startswith(once):
            prefill[tensor.quantization] = prefill.get(tensor.quantization, 0) + prod(tensor.shape)
    return decode, prefill


def _window(architecture: str, length: int | None) -> tuple[int, float] | None:
    pattern = _WINDOW_PATTERN.get(architecture)
    return (length, 1 - 1 / pattern) if length and pattern else None


def _number(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key)
    if isinstance(value, list):
        value = max((item for item in value if isinstance(item, int)), default=0)
    return value if isinstance(value, int) else 0
