"""GGUF files as bytes, written by hand: well-formed or damaged."""

import struct
from collections.abc import Callable
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_F32, TYPE_Q4_0 = 0, 2
PACKED = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

Store = Callable[[bytes], Path]
TracedPeak = Callable[[], Callable[[], int]]


def text(value: str | bytes) -> bytes:
    """A string in GGUF's encoding."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: float | str) -> bytes:
    """One key with a scalar or a string."""
    packed = text(value) if isinstance(value, str) else struct.pack(f"<{PACKED[kind]}", value)
    return text(key) + struct.pack("<I", kind) + packed


def array(key: str, kind: int, items: list[bytes], *, claimed: int | None = None) -> bytes:
    """One key with an array; ``claimed`` overrides the length in its header."""
    length = len(items) if claimed is None else claimed
    return text(key) + struct.pack("<IIQ", ARRAY, kind, length) + b"".join(items)


def integers(key: str, values: list[int]) -> bytes:
    """One key with an array of 32-bit numbers."""
    return array(key, I32, [struct.pack("<i", value) for value in values])


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0, *, rank: int | None = None) -> bytes:
    """One line of the tensor table."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape) if rank is None else rank, *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def gguf(
    entries: list[bytes],
    tensors: list[bytes] | None = None,
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A file with these entries and tensors, aligned to 32 bytes, and ``data`` bytes of weights."""
    tensors = tensors or []
    tensor_count, key_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(entries + tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


def llama(**shape: int | list[int]) -> list[bytes]:
    """Entries of a llama of 4 layers, width 64 and 4 heads, plus the keys in ``shape``."""
    facts: dict[str, int | list[int]] = {"block_count": 4, "embedding_length": 64, "attention.head_count": 4}
    facts |= {key.replace("__", "."): value for key, value in shape.items()}
    return [
        entry("general.architecture", STRING, "llama"),
        *(
            integers(f"llama.{key}", value) if isinstance(value, list) else entry(f"llama.{key}", I32, value)
            for key, value in facts.items()
        ),
    ]


#: Every value type, nested and long arrays, and two tensors.
RICH = gguf(
    [
        *llama(context_length=8192, attention__sliding_window=512, attention__head_count_kv=[2, 0, 2, 2]),
        *(entry(f"x.{kind}", kind, 1) for kind in PACKED),
        entry("tokenizer.chat_template", STRING, "{{ messages }}"),
        array("tokenizer.ggml.tokens", STRING, [text(f"token {number}") for number in range(100)]),
        array("x.scores", F32, [struct.pack("<f", number) for number in range(1025)]),
        array("x.nested", ARRAY, [struct.pack("<IQ", U8, 2) + b"ab", struct.pack("<IQ", STRING, 1) + text("c")]),
    ],
    [tensor("token_embd.weight", (64, 4), TYPE_Q4_0), tensor("output_norm.weight", (64,), TYPE_F32, 160)],
    data=160 + 256,
)
