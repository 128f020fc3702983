"""Rewrite a GGUF with other tensor types, without llama.cpp: with the ``gguf`` package, in bounded memory.

For machines that cannot compile llama.cpp. The tensors that keep their type are
llama.cpp's (``tensor_allows_quantization`` in src/llama-quant.cpp, release 0.5.0-dev of
2026): one-dimensional ones, norms, expert gates and other small ones. Where llama.cpp
uses Q6_K for the output matrix, this module uses Q8_0, because the package cannot write
K-quants: slightly better and slightly larger.

Metadata is copied byte for byte without parsing vocabularies, and only a chunk of one
tensor is in memory at a time. The expert tensors of models with eight experts follow the same rule.
"""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from promptai.errors import ModelError
from promptai.models.gguf import GgufHeader
from promptai.models.ggufbytes import Tensor

if TYPE_CHECKING:
    import numpy as np

#: Types that this module can write -> file type number in llama.h.
_FILE_TYPES = {"q4_0": 2, "q8_0": 7, "f16": 1}
OFFERED = tuple(_FILE_TYPES)
_BLOCK = 32
#: A chunk takes 4 MB as f32, and a few times that during conversion.
_CHUNK_WEIGHTS = 1 << 20
_U32, _STRING = 4, 8
#: Largest weight that a type can represent: F16's maximum, times the levels that it scales.
_LARGEST = {"F16": 65504.0, "Q4_0": 8 * 65504.0, "Q8_0": 127 * 65504.0}
#: Parts of tensor names that llama.cpp does not quantise: small tensors that need their precision.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *(f"time_mix_{one}.weight" for one in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight"),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_WHOLE = frozenset(("position_embd.weight", "token_types.weight"))


def converted(tensor: Tensor) -> bool:
    """Return whether llama.cpp's quantiser changes the type of this tensor."""
    dimensions = max((place + 1 for place, length in enumerate(tensor.shape) if length > 1), default=1)
    name = tensor.name
    return (
        dimensions > 1
        and name.endswith("weight")
        and name not in _KEPT_WHOLE
        and not any(part in name for part in _KEPT)
    )


def target_type(tensor: Tensor, kind: str, *, tied: bool, experts: int = 0) -> str:
    """
    Return a tensor's type in the result.

    Args:
        tied: Whether the model uses its embedding as the output matrix.
        experts: Number of experts; llama.cpp uses better types for the attention of models with eight.
    """
    if not converted(tensor):
        return tensor.quantization
    if kind == "f16" or tensor.shape[0] % _BLOCK:
        return "F16"
    output = tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight")
    attention = experts == 8 and any(part in tensor.name for part in ("attn_k.weight", "attn_v.weight"))
    return "Q8_0" if output or attention else kind.upper()


def rewrite(
    source: Path,
    header: GgufHeader,
    target: Path,
    kind: str,
    notes: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    """
    Write ``source`` to ``target`` as ``kind``, with ``notes`` as additional metadata.

    Args:
        kind: One of ``OFFERED``.
        advance: Called with the number of tensor bytes of each chunk done.

    Raises:
        ModelError: A weight is not finite, or too large for the type.
        OSError: The source cannot be read, or the target cannot be written.
    """
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    experts = header.metadata.get(f"{header.architecture}.expert_count")
    types = [
        target_type(tensor, kind, tied=tied, experts=experts if isinstance(experts, int) else 0)
        for tensor in header.tensors
    ]
    alignment = header.metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)  # noqa: S101  checked by the header reader
    with source.open("rb") as old, target.open("wb") as new:
        new.write(_head(old, header, types, notes, _FILE_TYPES[kind], alignment))
        for tensor, wanted in zip(header.tensors, types, strict=True):
            new.write(bytes(-new.tell() % alignment))
            old.seek(header.data_offset + tensor.offset)
            for chunk in _chunks(old, tensor, wanted, header.path, advance):
                new.write(chunk)
        new.write(bytes(-new.tell() % alignment))
        new.flush()
        os.fsync(new.fileno())


def _head(
    old: BinaryIO, header: GgufHeader, types: list[str], notes: Mapping[str, str], file_type: int, alignment: int
) -> bytes:
    """Return all bytes before the tensor data: unchanged old keys, new keys, and the tensor table."""
    numbers = {"general.file_type": file_type, "general.quantization_version": 2}
    head = bytearray()
    kept = [span for key, span in header.key_spans.items() if key not in notes and key not in numbers]
    for start, end in kept:
        old.seek(start)
        head += old.read(end - start)
    for key, number in numbers.items():
        head += _text(key) + struct.pack("<II", _U32, number)
    for key, note in notes.items():
        head += _text(key) + struct.pack("<I", _STRING) + _text(note)
    offset = 0
    for tensor, wanted in zip(header.tensors, types, strict=True):
        head += _text(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        head += struct.pack("<IQ", _number(wanted), offset)
        offset += _bytes_of(prod(tensor.shape), wanted)
        offset += -offset % alignment
    counts = struct.pack("<IQQ", 3, len(header.tensors), len(kept) + len(numbers) + len(notes))
    return b"GGUF" + counts + bytes(head)


def _chunks(old: BinaryIO, tensor: Tensor, wanted: str, path: str, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield a tensor's converted data; row boundaries do not matter, because blocks never cross rows."""
    import gguf  # noqa: PLC0415  imports NumPy, 0.2 s
    import numpy as np  # noqa: PLC0415

    left = prod(tensor.shape)
    while left:
        weights = min(left, _CHUNK_WEIGHTS)
        size = _bytes_of(weights, tensor.quantization)
        data = old.read(size)
        if len(data) != size:
            raise ModelError(f"{path} shrank while it was read", hint="download it again")
        if wanted == tensor.quantization:
            yield data
        else:
            numbers = _numbers(data, tensor.quantization)
            with np.errstate(all="ignore"):
                fits = bool((np.abs(numbers) <= _LARGEST[wanted]).all())  # false for NaN
                new = gguf.quants.quantize(numbers.reshape(1, -1), gguf.GGMLQuantizationType[wanted])
            if not fits:
                raise ModelError(
                    f"{path}: {tensor.name!r:.80} contains numbers that {wanted} cannot represent",
                    hint="download it again, or check it against its SHA-256",
                )
            yield new.tobytes()
        advance(size)
        left -= weights


def _numbers(data: bytes, quantization: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    import gguf  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    plain = {"F32": np.float32, "F16": np.float16}
    array = np.frombuffer(data, plain.get(quantization, np.uint8))
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = gguf.quants.dequantize(
        array, gguf.GGMLQuantizationType[quantization]
    )
    return found


def _number(quantization: str) -> int:
    import gguf  # noqa: PLC0415

    return int(gguf.GGMLQuantizationType[quantization])


def _bytes_of(weights: int, quantization: str) -> int:
    import gguf  # noqa: PLC0415

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization]]
    return int(weights // block * size)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
