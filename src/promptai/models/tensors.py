"""Derive a model's tensors from its shape: names, sizes and quantisation of each.

A model's size, speed and memory follow from its tensors, and "Q4_K_M" is not one type
but a rule that assigns a type to each tensor. This module implements the rule of
llama.cpp's quantiser without an importance matrix (``llama_tensor_get_type_impl`` in
src/llama-quant.cpp, release 0.5.0-dev of 2026); ``benchmarks/quantisation_mix.py``
compares it with the real one. Tensor names and dimensions are those of llama.cpp's
loaders (src/models/). Pure.

Only dense decoders of the listed architectures: no experts, no state space layers.
"""

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple, get_args

from promptai.models.shape import Shape

Quant = Literal["q4_0", "q4_k_m", "q8_0", "f16"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
#: Tensor data in a GGUF file is aligned to this many bytes.
ALIGNMENT = 32

#: ggml type -> (weights per block, bytes per block), from ggml-common.h.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}
_MAIN = {"q4_0": "Q4_0", "q4_k_m": "Q4_K", "q8_0": "Q8_0", "f16": "F16"}
#: Types used when a row is not a multiple of 256.
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


class _Form(NamedTuple):
    """How an architecture's layers differ from llama's."""

    fused_qkv: bool = False
    qkv_bias: bool = False
    all_biases: bool = False
    qk_norm: bool = False
    norm_bias: bool = False
    post_norms: bool = False
    ffn_norm: bool = True
    ffn: Literal["gated", "fused", "plain"] = "gated"


_FORMS = {
    "llama": _Form(),
    "smollm3": _Form(),
    "internlm2": _Form(),
    "gemma": _Form(),
    "gemma2": _Form(post_norms=True),
    "gemma3": _Form(post_norms=True, qk_norm=True),
    "qwen2": _Form(qkv_bias=True),
    "qwen3": _Form(qk_norm=True),
    "phi2": _Form(fused_qkv=True, all_biases=True, norm_bias=True, ffn_norm=False, ffn="plain"),
    "phi3": _Form(fused_qkv=True, ffn="fused"),
    "stablelm": _Form(norm_bias=True),
}
ARCHITECTURES = tuple(_FORMS)


class PlannedTensor(NamedTuple):
    """
    One tensor of a planned model.

    Attributes:
        shape: Elements per dimension, the fastest-varying (the row) first, as in GGUF.
        quantization: ggml's type name, e.g. ``Q4_0``.
    """

    name: str
    shape: tuple[int, ...]
    quantization: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size of the tensor's data."""
        block, block_bytes = BLOCKS[self.quantization]
        return self.weights // block * block_bytes


def plan_tensors(shape: Shape, quant: Quant) -> list[PlannedTensor]:
    """
    List the tensors of a model of ``shape`` in file order, with llama.cpp's quantisation.

    Raises:
        KeyError: The architecture is not in ``ARCHITECTURES``.
    """
    return [PlannedTensor(name, size, _type_of(name, size, shape, quant)) for name, size in _sizes(shape)]


def tensor_bytes(shape: Shape, quant: Quant) -> int:
    """Return the size of all tensor data with padding: the file without its header (tokenizer: 1 to 15 MB)."""
    return sum(-(-tensor.size_bytes // ALIGNMENT) * ALIGNMENT for tensor in plan_tensors(shape, quant))


def possible(shape: Shape, quant: Quant) -> bool:
    """Return whether engines can load such a model: known architecture, whole blocks, heads of even length."""
    counts = (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.ffn, shape.context)
    if shape.architecture not in _FORMS or min(counts) <= 0 or shape.vocabulary < 258:
        return False
    block = BLOCKS[_MAIN[quant]][0] if quant != "q4_k_m" else 32  # falls back to blocks of 32
    return (
        all(length % block == 0 for length in (shape.width, shape.ffn, shape.head * shape.heads))
        and shape.head > 0
        and shape.head % 2 == 0
        and (shape.head_length is not None or shape.width % shape.heads == 0)
        and shape.heads % shape.kv_heads == 0
        and (shape.rotated is None or 0 < shape.rotated <= shape.head)
    )


def _sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    form, width = _FORMS[shape.architecture], shape.width
    yield "token_embd.weight", (width, shape.vocabulary)
    if not shape.tied:
        yield "output.weight", (width, shape.vocabulary)
        if form.all_biases:
            yield "output.bias", (shape.vocabulary,)
    yield from _norm("output_norm", width, form)
    for layer in range(shape.layers):
        for name, size in _layer(shape, form):
            yield f"blk.{layer}.{name}", size


def _layer(shape: Shape, form: _Form) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, query, key = shape.width, shape.head * shape.heads, shape.head * shape.kv_heads
    yield from _norm("attn_norm", width, form)
    if form.fused_qkv:
        yield from _matrix("attn_qkv", width, query + 2 * key, bias=form.qkv_bias or form.all_biases)
    else:
        for name, rows in (("attn_q", query), ("attn_k", key), ("attn_v", key)):
            yield from _matrix(name, width, rows, bias=form.qkv_bias or form.all_biases)
    if form.qk_norm:
        yield "attn_q_norm.weight", (shape.head,)
        yield "attn_k_norm.weight", (shape.head,)
    yield from _matrix("attn_output", query, width, bias=form.all_biases)
    if form.post_norms:
        yield "post_attention_norm.weight", (width,)
    if form.ffn_norm:
        yield from _norm("ffn_norm", width, form)
    if form.ffn == "gated":
        yield from _matrix("ffn_gate", width, shape.ffn, bias=form.all_biases)
    yield from _matrix("ffn_up", width, shape.ffn * (2 if form.ffn == "fused" else 1), bias=form.all_biases)
    yield from _matrix("ffn_down", shape.ffn, width, bias=form.all_biases)
    if form.post_norms:
        yield "post_ffw_norm.weight", (width,)


def _norm(name: str, width: int, form: _Form) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    if form.norm_bias:
        yield f"{name}.bias", (width,)


def _matrix(name: str, columns: int, rows: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (columns, rows)
    if bias:
        yield f"{name}.bias", (rows,)


def _type_of(name: str, size: tuple[int, ...], shape: Shape, quant: Quant) -> str:
    if len(size) == 1:
        return "F32"
    wanted = _MAIN[quant]
    is_output = name == "output.weight" or (shape.tied and name == "token_embd.weight")
    if is_output and quant in ("q4_0", "q4_k_m"):
        # llama.cpp considers Q6_K only if the main type's block divides the row.
        wanted = "Q6_K" if size[0] % BLOCKS[wanted][0] == 0 else "Q8_0"
    elif quant == "q4_k_m" and any(part in name for part in ("attn_v.", "attn_qkv.", "ffn_down.")):
        layer = int(name.split(".")[1])
        wanted = "Q6_K" if _more_bits(layer, shape.layers) else wanted
    return wanted if size[0] % BLOCKS[wanted][0] == 0 else _FALLBACK[wanted]


def _more_bits(layer: int, layers: int) -> bool:
    """Return true for the first and last eighth of the layers, and for every third layer between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
