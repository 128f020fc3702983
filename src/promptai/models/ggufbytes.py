"""Parse the bytes of a GGUF header, treating every number in it as hostile.

Model files come from untrusted sources, and downloads break off: a count may be
anything. So each length is checked against the remaining bytes before it is used,
everything kept or skipped has a limit, and files that llama.cpp would reject
(duplicate keys, overlapping tensors, an alignment that is not a power of two) are
rejected. Parsing a hostile header takes less than a second and bounded memory.

The reader makes one forward pass in large chunks, so the bytes may come from a network.
It does not open files or read tensor data. ``models.gguf`` explains why the ``gguf``
package is not used.

Format: the GGUF specification in ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

import functools
import math
import struct
from typing import Protocol

import msgspec

_MAGIC = b"GGUF"
# The largest real headers (October 2026) have 20 MB: some 100 keys, 2,000 tensors and a vocabulary of 262 k tokens
# with 515 k merges. The limits leave room above that, and bound the time of a hostile header to a second.
_MAX_HEADER_BYTES = 64 * 1024 * 1024
_MAX_KEYS = 16_384
_MAX_TENSORS = 32_768
_MAX_NAME_BYTES = 65_535
_MAX_STRING_BYTES = 4 * 1024 * 1024  # chat templates are below 100 kB
_MAX_KEPT_BYTES = 16 * 1024 * 1024  # total of names, strings and kept arrays
_MAX_ARRAY = 4_000_000
_MAX_SKIPPED = 2_000_000  # total of skipped strings
_NESTED_COST = 32  # skipping a nested array takes as long as this many strings
_KEPT_ARRAY = 1024  # long enough for per-layer head counts, too short for vocabularies
_KEPT_ITEM_BYTES = 32  # memory of one number in a Python list
_MAX_ARRAY_DEPTH = 2
_READ_BYTES = 256 * 1024

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
#: GGUF value type -> binary format
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_STRING, _ARRAY = 8, 9
#: Rest of a tensor's entry after name and rank, by rank: lengths, type, offset
_TENSORS = [struct.Struct(f"<{rank}QIQ") for rank in range(5)]

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]


class ByteStream(Protocol):
    """A stream that is only read forwards."""

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end."""

    def seek(self, offset: int, whence: int, /) -> int:
        """Skip ``offset`` bytes; ``whence`` is always 1 (from the current position)."""


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """
    One tensor's entry in the header.

    Attributes:
        shape: Elements per dimension, the fastest-varying first, as in GGUF.
        quantization: ggml's type name, e.g. ``Q4_0``.
        offset: Bytes from the start of the data section.
        size_bytes: Size of the tensor's data.
    """

    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    size_bytes: int


class HeaderContents(msgspec.Struct, frozen=True, kw_only=True):
    """
    A parsed header.

    Attributes:
        metadata: Scalars, strings and short arrays by key; long arrays are left out.
        array_lengths: Length of every array, kept or not, by key.
        data_offset: Start of the tensor data, in bytes from the start of the file.
        key_spans: Start and end of each key's entry in the file, for copying it unchanged.
    """

    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    tensors: list[Tensor]
    data_offset: int
    key_spans: dict[str, tuple[int, int]]


class DamagedHeaderError(Exception):
    """The header is malformed; the message completes a sentence that starts with the path (``models.gguf``)."""


def _brief(value: object) -> str:
    """Quote, escape and shorten an untrusted value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _bounded(value: int, limit: int, what: str, where: str = "") -> int:
    if value > limit:
        place = f" at {_brief(where)}" if where else ""
        raise DamagedHeaderError(f"claims {value:,} {what}{place}, above the limit of {limit:,}")
    return value


class HeaderReader:
    """Parses a header in one forward pass, checking every length before using it."""

    def __init__(self, file: ByteStream, file_bytes: int) -> None:
        self._file = file
        self._total = file_bytes
        self._unread = file_bytes  # bytes of the file after the buffer
        self._buffer = b""
        self._at = 0
        self._kept = 0
        self._skipped = 0

    @property
    def _position(self) -> int:
        return self._total - self._unread - len(self._buffer) + self._at

    def contents(self) -> HeaderContents:
        """
        Parse the header; may be called once.

        Raises:
            DamagedHeaderError: The header is malformed or incomplete.
        """
        version, tensor_count, key_count = self._counts()
        metadata: dict[str, Value] = {}
        array_lengths: dict[str, int] = {}
        key_spans: dict[str, tuple[int, int]] = {}
        for _ in range(key_count):
            start = self._position
            key = self._name("key")
            if not key or key in key_spans:
                raise DamagedHeaderError(f"has the key {_brief(key)} twice" if key else "has an empty key")
            kind = self._number(_U32, key)
            if kind == _ARRAY:
                kept, array_lengths[key] = self._array(key, depth=1)
                if kept is not None:
                    metadata[key] = kept
            else:
                metadata[key] = self._text(key) if kind == _STRING else self._scalars(kind, 1, key)[0]
            key_spans[key] = (start, self._position)
        alignment = metadata.get("general.alignment", 32)
        # llama.cpp requires a power of two.
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise DamagedHeaderError(f"has an invalid alignment of {_brief(alignment)}")
        return HeaderContents(
            version=version,
            metadata=metadata,
            array_lengths=array_lengths,
            tensors=self._tensors(tensor_count, alignment),
            data_offset=_aligned(self._position, alignment),
            key_spans=key_spans,
        )

    def _counts(self) -> tuple[int, int, int]:
        """Read the version, the number of tensors and the number of keys."""
        if self._take(4, "magic") != _MAGIC:
            raise DamagedHeaderError("is not a GGUF file (it does not start with the letters GGUF)")
        version = self._number(_U32, "version")
        if version and not version & 0xFFFF:
            raise DamagedHeaderError("is a big-endian GGUF file, for another processor architecture")
        if version not in (2, 3):
            raise DamagedHeaderError(f"has GGUF version {version} (supported: 2 and 3)")
        tensors = _bounded(self._number(_U64, "tensor count"), _MAX_TENSORS, "tensors")
        return version, tensors, _bounded(self._number(_U64, "key count"), _MAX_KEYS, "metadata keys")

    def _tensors(self, count: int, alignment: int) -> list[Tensor]:
        """Read the tensor table; as in llama.cpp, each tensor must start where the previous one ends."""
        found: dict[str, Tensor] = {}
        end = 0
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in found:
                raise DamagedHeaderError(f"has the tensor {_brief(tensor.name)} twice")
            if tensor.offset != end:
                raise DamagedHeaderError(
                    f"has the tensor {_brief(tensor.name)} at offset {tensor.offset:,}, expected {end:,}"
                )
            end = _aligned(end + tensor.size_bytes, alignment)
            found[tensor.name] = tensor
        return list(found.values())

    def _tensor(self) -> Tensor:
        name = self._name("tensor name")
        rank = _bounded(self._number(_U32, name), 4, "dimensions", name)
        *shape, kind, offset = _TENSORS[rank].unpack(self._take(_TENSORS[rank].size, name))
        if kind not in _quantizations():
            raise DamagedHeaderError(f"has an unknown type {kind} for tensor {_brief(name)}")
        label, block, block_bytes = _quantizations()[kind]
        count = math.prod(shape)
        # Blocks never cross rows (the first dimension).
        if (shape and shape[0] % block) or max((count, *shape)) > 1 << 44:
            raise DamagedHeaderError(f"has an invalid shape {tuple(shape)} for tensor {_brief(name)} of type {label}")
        return Tensor(
            name=name, shape=tuple(shape), quantization=label, offset=offset, size_bytes=count // block * block_bytes
        )

    def _array(self, key: str, *, depth: int) -> tuple[list[Scalar] | None, int]:
        kind = self._number(_U32, key)
        length = _bounded(self._number(_U64, key), _MAX_ARRAY, "items", key)
        if kind == _ARRAY:
            if depth >= _MAX_ARRAY_DEPTH:
                raise DamagedHeaderError(f"nests arrays too deeply in {_brief(key)}")
            self._count_skipped(length * _NESTED_COST, key)
            for _ in range(length):
                self._array(key, depth=depth + 1)
        elif kind == _STRING:
            self._count_skipped(length, key)
            self._skip_texts(length, key)
        elif length <= _KEPT_ARRAY and depth == 1:
            self._count_kept(length * _KEPT_ITEM_BYTES, key)
            return self._scalars(kind, length, key), length
        else:
            self._skip(length * _scalar(kind, key).size, key)
        return None, length

    def _scalars(self, kind: int, length: int, key: str) -> list[Scalar]:
        form = _scalar(kind, key)
        return [value for (value,) in form.iter_unpack(self._take(length * form.size, key))]

    def _text(self, key: str, limit: int = _MAX_STRING_BYTES) -> str:
        length = _bounded(self._number(_U64, key), limit, "bytes", key)
        self._count_kept(length, key)
        return self._take(length, key).decode("utf-8", "replace")

    def _name(self, what: str) -> str:
        name = self._text(what, _MAX_NAME_BYTES)
        if "\0" in name:
            raise DamagedHeaderError(f"has a NUL character in the {what} {_brief(name)}")
        return name

    def _count_kept(self, size: int, key: str) -> None:
        self._kept += size
        _bounded(self._kept, _MAX_KEPT_BYTES, "bytes of strings and arrays in total", key)

    def _count_skipped(self, items: int, key: str) -> None:
        self._skipped += items
        _bounded(self._skipped, _MAX_SKIPPED, "items in total", key)

    def _skip_texts(self, count: int, key: str) -> None:
        """Skip strings; there may be a million, so the inner loop does one step per buffered string."""
        length_at = _U64.unpack_from
        while count:
            buffer, at, end = self._buffer, self._at, len(self._buffer)
            while count and at + 8 <= end and (following := at + 8 + length_at(buffer, at)[0]) <= end:
                at, count = following, count - 1
            self._at = at
            if count:
                self._skip(_bounded(self._number(_U64, key), _MAX_STRING_BYTES, "bytes", key), key)
                count -= 1

    def _number(self, form: struct.Struct, what: str) -> int:
        start = self._advance(form.size, what)
        value: int = form.unpack_from(self._buffer, start)[0]
        return value

    def _take(self, size: int, what: str) -> bytes:
        start = self._advance(size, what)
        return self._buffer[start : start + size]

    def _advance(self, size: int, what: str) -> int:
        """Consume ``size`` bytes, reading them into the buffer if needed; returns their start in the buffer."""
        missing = size - (len(self._buffer) - self._at)
        if missing > 0:
            self._check_left(missing, what)
            data = self._file.read(min(max(missing, _READ_BYTES), self._unread))
            if len(data) < missing:
                raise DamagedHeaderError(f"shrank while it was read, at {_brief(what)}")
            self._unread -= len(data)
            self._buffer, self._at = self._buffer[self._at :] + data, 0
        start = self._at
        self._at += size
        return start

    def _skip(self, size: int, what: str) -> None:
        beyond = size - (len(self._buffer) - self._at)
        if beyond <= 0:
            self._at += size
            return
        self._check_left(beyond, what)
        self._file.seek(beyond, 1)
        self._unread -= beyond
        self._buffer, self._at = b"", 0

    def _check_left(self, size: int, what: str) -> None:
        if size > self._unread:
            raise DamagedHeaderError(f"is truncated inside its header, at {_brief(what)}")
        if self._total - self._unread + size > _MAX_HEADER_BYTES:
            raise DamagedHeaderError(f"has a header larger than {_MAX_HEADER_BYTES >> 20} MiB, at {_brief(what)}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _scalar(kind: int, key: str) -> struct.Struct:
    if kind not in _SCALARS:
        raise DamagedHeaderError(f"has an unknown value type {kind} at {_brief(key)}")
    return _SCALARS[kind]


@functools.cache
def _quantizations() -> dict[int, tuple[str, int, int]]:
    """Return ggml's types: number -> name, elements per block, bytes per block."""
    # Imported here: it imports NumPy, which would add 0.2 s to `promptai --help`.
    from gguf import GGML_QUANT_SIZES  # noqa: PLC0415

    return {int(kind): (str(kind.name), int(n), int(size)) for kind, (n, size) in GGML_QUANT_SIZES.items()}
