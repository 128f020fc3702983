"""What a model makes a machine do: bytes to read for a token, weights to multiply for a prompt.

Speed and memory forecasts need the same few numbers of a model, whether it lies on
the disk or is only a line of the catalogue. Both become a ``ModelCost`` here. Pure.

Decoding reads every matrix once a token. The embedding is no matrix then: one row of it is
looked up, unless it is also the output matrix (tied), which is read as a whole.
"""

from collections.abc import Iterable
from math import prod
from typing import Protocol

import msgspec

from promptai.models.gguf import GgufHeader
from promptai.models.shape import Shape
from promptai.models.tensors import Quant, plan_tensors, tensor_bytes

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
#: One layer in so many sees everything, the others a window, in llama.cpp's loaders (src/models/gemma*.cpp).
_WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6}


class Attention(msgspec.Struct, frozen=True, kw_only=True):
    """
    What is compared for each token that stands before the one being decoded.

    Attributes:
        head: Length of a head; ``192/128`` where keys and values differ.
        query_width, kv_width: Heads, and KV heads, times that length (of a key), summed over the layers.
    """

    head: str
    query_width: int
    kv_width: int


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """
    One model as a load.

    Attributes:
        file_bytes: Size of the file; tensors alone where there is no file yet.
        decode_bytes: Bytes read for each generated token, by ggml type of the matrix.
        prefill_weights: Weights multiplied for each prompt token, by ggml type. Not among them: the output
            matrix, and the last layer behind its attention: llama.cpp computes these for a prompt's last token only.
        layers, width, ffn, vocabulary: As in its shape.
        kv_bytes_per_token: Of f16 cache, all layers; ``None`` where the file does not tell.
        attention: ``None`` where the file does not tell.
        window: Tokens that sliding-window layers look back, and the share of the layers that do.
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
        """Bytes of KV cache that ``context`` tokens take; windows hold what they look back and one batch of 512."""
        return (
            None
            if self.kv_bytes_per_token is None
            else round(self.kv_bytes_per_token * self.mean_cached_tokens(context))
        )

    def mean_cached_tokens(self, tokens: int) -> float:
        """Of so many tokens, those in the cache of a layer: the mean over the layers."""
        if self.window is None:
            return tokens
        length, share = self.window
        return (1 - share) * tokens + share * min(tokens, length + 512)


class _Tensor(Protocol):
    """What a planned tensor and one of a file have in common."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def quantization(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


def cost_of_shape(shape: Shape, quant: Quant) -> ModelCost:
    """The work of a model that need not exist; raises ``KeyError`` for an unknown architecture."""
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
    """The work of a model file, from its header."""
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
