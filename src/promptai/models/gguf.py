"""Read the header of a GGUF file: what it is, how big, whether it is whole.

Loading a damaged or oversized file into an engine costs minutes on a small
board and ends in a log that few can read, or in the out-of-memory killer. The
header answers in milliseconds: the shape, the quantisation, the bytes that the
tensors need, and whether the file really has them.

Written here rather than taken from the ``gguf`` package because its reader
turns every vocabulary entry into NumPy arrays (seconds and hundreds of MB for a
128 k vocabulary) and trusts the counts that a file claims. This one reads
forward once, keeps scalars and short arrays, skips the rest, and treats every
number in the file as hostile. It does not read tensor data.

Format: the GGUF specification in ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import msgspec

from promptai.errors import ModelFormatError, ModelNotFoundError

_MAGIC = b"GGUF"
_MAX_KEYS = 65_536
_MAX_TENSORS = 262_144
_MAX_STRING_BYTES = 4 * 1024 * 1024  # the longest real ones, chat templates, are below 100 kB
_MAX_KEPT_BYTES = 16 * 1024 * 1024  # all names and texts together; real headers keep below 1 MB
_MAX_ARRAY = 4_000_000  # the largest real ones, merges of a 256 k vocabulary, are below 600 k
_KEPT_ARRAY = 1024  # per-layer head counts are kept, vocabularies are not
_MAX_ARRAY_DEPTH = 2

#: GGUF value type -> (struct format, bytes)
_SCALARS = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_STRING, _ARRAY = 8, 9

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]


class Tensor(msgspec.Struct, frozen=True):
    """
    One tensor as the header describes it.

    Attributes:
        shape: Elements per dimension, the fastest-varying first, as in GGUF.
        quantization: ggml's type name, e.g. ``Q4_0``.
        offset: Bytes from the start of the data section.
        size_bytes: Bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    size_bytes: int


class GgufHeader(msgspec.Struct, frozen=True):
    """
    What a GGUF file says of itself.

    Attributes:
        metadata: Scalars, strings and short arrays by key; long arrays are left out.
        array_lengths: Length of every array, kept or not, by key.
        data_offset: Where tensor data starts, bytes from the start of the file.
        file_bytes: Size of the file.
    """

    path: str
    file_bytes: int
    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    tensors: list[Tensor]
    data_offset: int

    @property
    def architecture(self) -> str:
        """E.g. ``llama``, ``qwen3``; ``unknown`` when the file does not say."""
        return self._text("general.architecture") or "unknown"

    @property
    def name(self) -> str:
        """The model's own name; the file's stem when it has none."""
        return self._text("general.name") or Path(self.path).stem

    @property
    def parameters(self) -> int:
        """Number of weights."""
        total = 0
        for tensor in self.tensors:
            count = 1
            for length in tensor.shape:
                count *= length
            total += count
        return total

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        """The type that holds most of the bytes, e.g. ``Q4_K``; ``unknown`` without tensors."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            held[tensor.quantization] = held.get(tensor.quantization, 0) + tensor.size_bytes
        return max(held, key=lambda kind: held[kind]) if held else "unknown"

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for."""
        return self._integer("context_length")

    @property
    def sliding_window(self) -> int | None:
        """Tokens that attention looks back where that is less than everything; ``None`` for most models."""
        return self._integer("attention.sliding_window")

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens."""
        return self.array_lengths.get("tokenizer.ggml.tokens")

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the turns; engines fall back to ChatML without one."""
        return self._text("tokenizer.chat_template")

    @property
    def synthetic(self) -> bool:
        """True when the weights are random: good for speed and memory, void for accuracy."""
        return self.metadata.get("promptai.synthetic") is True

    def kv_bytes_per_token(self, *, bytes_per_value: float = 2.0) -> int | None:
        """
        Bytes of KV cache that one token of context takes, over all layers.

        Keys and values each hold ``kv heads x head length`` numbers a layer; f16
        takes 2 bytes each. ``None`` when the header lacks the shape, and for
        architectures whose cache is not of this form (recurrent ones).
        """
        layers, width = self._integer("block_count"), self._integer("embedding_length")
        heads = self._integers("attention.head_count")
        kv_heads = self._integers("attention.head_count_kv") or heads
        if not layers or not width or not heads or max(heads) <= 0 or min(kv_heads) < 0:
            return None
        key = self._integer("attention.key_length") or width // max(heads)
        value = self._integer("attention.value_length") or width // max(heads)
        total_heads = kv_heads[0] * layers if len(kv_heads) == 1 else sum(kv_heads)
        return round(total_heads * (key + value) * bytes_per_value)

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None

    def _integers(self, key: str) -> list[int]:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            return [item for item in value if isinstance(item, int)]
        return [value] if isinstance(value, int) else []

    def _integer(self, key: str) -> int | None:
        found = self._integers(key)
        return found[0] if found else None


def read_header(path: Path) -> GgufHeader:
    """
    Read a GGUF header and check that the file holds what it promises.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is empty, not a GGUF, damaged or cut short.
    """
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise ModelNotFoundError(f"model {path} {what}", hint="give the path of a .gguf file")
        file_bytes = path.stat().st_size
        if file_bytes == 0:
            raise ModelFormatError(f"model {path} is empty (0 bytes)", hint="fetch it again")
        with path.open("rb", buffering=1 << 20) as file:
            header = _Reader(file, file_bytes).header(str(path))
    except _Damaged as damage:
        raise ModelFormatError(
            f"model {path} {damage}", hint="fetch it again, or check it against its SHA-256"
        ) from None
    except OSError as error:
        raise ModelNotFoundError(
            f"model {str(path)[:300]} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from None
    needed = max((header.data_offset + t.offset + t.size_bytes for t in header.tensors), default=0)
    if needed > file_bytes:
        raise ModelFormatError(
            f"model {path} is cut short: its tensors end at byte {needed:,}, the file has {file_bytes:,}",
            hint="the download did not finish; fetch it again",
        )
    return header


class _Damaged(Exception):  # noqa: N818  an inner signal, translated in read_header
    """What is wrong with the bytes, as the end of a sentence that starts with the path."""


def _brief(value: object) -> str:
    """A name from the file as it may stand in a message: quoted, escaped, short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


class _Reader:
    """Reads forward through a header, checking every length before it is used."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        self._left = file_bytes
        self._kept = 0

    def header(self, path: str) -> GgufHeader:
        total = self._left
        if self._take(4, "magic") != _MAGIC:
            raise _Damaged("is not a GGUF file (it does not start with the letters GGUF)")
        version = self._number("<I", "version")
        if version not in (2, 3):
            raise _Damaged(f"has GGUF version {version}; versions 2 and 3 are known")
        tensor_count = self._bounded(self._number("<Q", "tensor count"), _MAX_TENSORS, "tensors")
        key_count = self._bounded(self._number("<Q", "key count"), _MAX_KEYS, "metadata keys")
        metadata: dict[str, Value] = {}
        array_lengths: dict[str, int] = {}
        for _ in range(key_count):
            key = self._string("key")
            kind = self._number("<I", key)
            if kind == _ARRAY:
                kept, array_lengths[key] = self._array(key, depth=1)
                if kept is not None:
                    metadata[key] = kept
            else:
                metadata[key] = self._scalar(kind, key)
        tensors = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise _Damaged(f"has an impossible alignment of {_brief(alignment)}")
        used = total - self._left
        return GgufHeader(
            path=path,
            file_bytes=total,
            version=version,
            metadata=metadata,
            array_lengths=array_lengths,
            tensors=tensors,
            data_offset=-(-used // alignment) * alignment,
        )

    def _tensor(self) -> Tensor:
        name = self._string("tensor name")
        rank = self._bounded(self._number("<I", name), 4, f"dimensions of {_brief(name)}")
        shape = tuple(self._number("<Q", name) for _ in range(rank))
        kind = self._number("<I", name)
        offset = self._number("<Q", name)
        label, block, block_bytes = _quantization(kind, name)
        count = 1
        for length in shape:
            count *= length
        # Blocks lie within rows, the first dimension.
        if (shape and shape[0] % block) or count > 1 << 44:
            raise _Damaged(f"has an impossible shape {shape} for tensor {_brief(name)} of type {label}")
        return Tensor(
            name=name, shape=shape, quantization=label, offset=offset, size_bytes=count // block * block_bytes
        )

    def _array(self, key: str, *, depth: int) -> tuple[list[Scalar] | None, int]:
        kind = self._number("<I", key)
        length = self._bounded(self._number("<Q", key), _MAX_ARRAY, f"items in {_brief(key)}")
        if kind == _ARRAY:
            if depth >= _MAX_ARRAY_DEPTH:
                raise _Damaged(f"nests arrays too deeply in {_brief(key)}")
            for _ in range(length):
                self._array(key, depth=depth + 1)
            return None, length
        if length <= _KEPT_ARRAY and kind != _STRING:
            return [self._scalar(kind, key) for _ in range(length)], length
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._bounded(self._number("<Q", key), _MAX_STRING_BYTES, f"bytes in {_brief(key)}"), key)
        else:
            self._skip(length * self._format(kind, key)[1], key)
        return None, length

    def _scalar(self, kind: int, key: str) -> Scalar:
        if kind == _STRING:
            return self._string(key)
        pattern, size = self._format(kind, key)
        value: Scalar = struct.unpack(pattern, self._take(size, key))[0]
        return value

    def _format(self, kind: int, key: str) -> tuple[str, int]:
        if kind not in _SCALARS:
            raise _Damaged(f"has an unknown value type {kind} at {_brief(key)}")
        return _SCALARS[kind]

    def _string(self, what: str) -> str:
        length = self._bounded(self._number("<Q", what), _MAX_STRING_BYTES, f"bytes in {_brief(what)}")
        self._kept += length
        self._bounded(self._kept, _MAX_KEPT_BYTES, "bytes of text")
        return self._take(length, what).decode("utf-8", "replace")

    def _number(self, pattern: str, what: str) -> int:
        value: int = struct.unpack(pattern, self._take(struct.calcsize(pattern), what))[0]
        return value

    def _bounded(self, value: int, limit: int, what: str) -> int:
        if value > limit:
            raise _Damaged(f"claims {value:,} {what}; more than {limit:,} is taken for damage")
        return value

    def _take(self, size: int, what: str) -> bytes:
        if size > self._left:
            raise _Damaged(f"is cut short inside its header, at {_brief(what)}")
        self._left -= size
        data = self._file.read(size)
        if len(data) != size:
            raise _Damaged(f"became shorter while it was read, at {_brief(what)}")
        return data

    def _skip(self, size: int, what: str) -> None:
        if size > self._left:
            raise _Damaged(f"is cut short inside its header, at {_brief(what)}")
        self._left -= size
        self._file.seek(size, 1)


def _quantization(kind: int, name: str) -> tuple[str, int, int]:
    """Type name, elements a block and bytes a block of a ggml type number."""
    # Imported here: NumPy behind it costs 0.2 s, which `promptai --help` must not pay.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    try:
        known = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise _Damaged(f"has an unknown tensor type {kind} at {_brief(name)}") from None
    return str(known.name), int(block), int(block_bytes)
