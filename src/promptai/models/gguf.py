"""Read a GGUF header: a model's shape, quantisation and size, and whether its file is complete.

Loading a damaged or oversized file into an engine takes minutes on a small board and
ends in an obscure log or with the out-of-memory killer. The header yields the same
answer in milliseconds: the shape, the quantisation, the bytes that the tensors need,
and whether the file has them.

Why not the reader of the ``gguf`` package: it turns every vocabulary entry into NumPy
arrays (seconds and hundreds of MB for a 128 k vocabulary) and trusts the counts in the
file. This reader (``models.ggufbytes``) makes one forward pass, keeps scalars and short
arrays, skips the rest, and treats every number in the file as hostile. It does not read
tensor data. For a split model it reads the given file only; ``part_names`` lists all parts.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from promptai.errors import ModelFormatError, ModelNotFoundError
from promptai.models.ggufbytes import ByteStream, DamagedHeaderError, HeaderContents, HeaderReader

_MAX_PARTS = 1000
#: Keys of architectures with layers that hold a fixed-size state instead of a KV cache (llama.cpp's
#: src/llama-arch.cpp).
_RECURRENT = ("ssm.state_size", "wkv.head_size", "shortconv.l_cache")


class Heads(NamedTuple):
    """Attention heads summed over the layers, and the length of one head's key and value."""

    query_heads: int
    kv_heads: int
    key_length: int
    value_length: int


class GgufHeader(HeaderContents, frozen=True, kw_only=True):
    """
    The header of a GGUF file.

    Attributes:
        path: Path or address that the header was read from.
        file_bytes: Size of the file.
    """

    path: str
    file_bytes: int

    @property
    def architecture(self) -> str:
        """E.g. ``llama``, ``qwen3``; ``unknown`` when the file does not declare it."""
        return self._text("general.architecture") or "unknown"

    @property
    def name(self) -> str:
        """Declared name of the model; the file's stem when there is none."""
        return self._text("general.name") or Path(self.path).stem

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Total size of the tensor data."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        """Type with the largest share of the bytes, e.g. ``Q4_K``; ``unknown`` without tensors."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            held[tensor.quantization] = held.get(tensor.quantization, 0) + tensor.size_bytes
        return max(held, key=lambda kind: held[kind]) if held else "unknown"

    @property
    def context_length(self) -> int | None:
        """Context length that the model was trained for, in tokens."""
        return self._integer("context_length")

    @property
    def sliding_window(self) -> int | None:
        """Tokens that sliding-window layers attend to; ``None`` for models without them."""
        return self._integer("attention.sliding_window")

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens."""
        return self.array_lengths.get("tokenizer.ggml.tokens")

    @property
    def chat_template(self) -> str | None:
        """Jinja template of a conversation; without one, engines fall back to ChatML."""
        return self._text("tokenizer.chat_template")

    @property
    def split(self) -> tuple[int, int] | None:
        """Index of this part (from 0) and number of parts; ``None`` for a model in one file."""
        number, count = self.metadata.get("split.no"), self.metadata.get("split.count")
        if isinstance(number, int) and isinstance(count, int) and count > 1:
            return number, count
        return None

    @property
    def synthetic(self) -> bool:
        """Whether the weights are random: valid for speed and memory, meaningless for accuracy."""
        return self.metadata.get("promptai.synthetic") is True

    def kv_bytes_per_token(self, *, bytes_per_value: float = 2.0) -> int | None:
        """
        Return the KV cache size per token of context, over all layers.

        Keys and values each hold ``KV heads x head length`` numbers per layer, of 2 bytes each in f16.
        ``None`` when the header lacks the shape, and for recurrent architectures that do not list the
        heads of each layer.
        """
        heads = self.heads
        if heads is None:
            return None
        return round(heads.kv_heads * (heads.key_length + heads.value_length) * bytes_per_value)

    @property
    def heads(self) -> Heads | None:
        """
        Attention heads of all layers.

        ``None`` when the header lacks them, and when some layers are recurrent and heads are not listed per layer.
        """
        layers, width = self._integer("block_count"), self._integer("embedding_length")
        heads = self._integers("attention.head_count")
        kv_heads = self._integers("attention.head_count_kv") or heads
        if not layers or not width or not heads or max(heads) <= 0 or min(*heads, *kv_heads) < 0:
            return None
        if len(kv_heads) == 1 and any(self._integers(key) for key in _RECURRENT):
            return None  # only some layers have a KV cache; the header does not list which, the loader knows
        if len(heads) > 1:
            query_heads = sum(heads)
        else:  # layers without KV heads have no attention
            query_heads = heads[0] * (layers if len(kv_heads) == 1 else sum(count > 0 for count in kv_heads))
        return Heads(
            query_heads=query_heads,
            kv_heads=kv_heads[0] * layers if len(kv_heads) == 1 else sum(kv_heads),
            key_length=self._integer("attention.key_length") or width // max(heads),
            value_length=self._integer("attention.value_length") or width // max(heads),
        )

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
    Read a file's GGUF header, and check that the file contains all tensors.

    Raises:
        ModelNotFoundError: The file does not exist or cannot be read.
        ModelFormatError: The file is empty, not a GGUF, damaged or truncated.
    """
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise ModelNotFoundError(f"model {path} {what}", hint="give the path of a .gguf file")
        with path.open("rb", buffering=0) as file:
            return parse_header(file, path.stat().st_size, str(path))
    except OSError as error:
        raise ModelNotFoundError(
            f"model {str(path)[:300]} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from None


def part_names(name: str) -> list[str]:
    """Return the file names of all parts of a split model, in order; ``[name]`` for a model in one file."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", name, re.DOTALL)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= _MAX_PARTS:
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def join_parts(headers: list[GgufHeader]) -> GgufHeader:
    """Combine the headers of a split model: metadata of the first part, tensors of all."""
    return msgspec.structs.replace(
        headers[0],
        tensors=[tensor for header in headers for tensor in header.tensors],
        file_bytes=sum(header.file_bytes for header in headers),
    )


def parse_header(file: ByteStream, file_bytes: int, where: str) -> GgufHeader:
    """
    Read a GGUF header from a byte stream, and check that the file contains all tensors.

    Args:
        file: Positioned at the file's first byte; only read forwards.
        file_bytes: Size of the whole file.
        where: Path or address, for the header and for messages.

    Raises:
        ModelFormatError: The file is empty, not a GGUF, damaged or truncated.
    """
    if file_bytes == 0:
        raise ModelFormatError(f"model {where} is empty (0 bytes)", hint="download it again")
    try:
        contents = HeaderReader(file, file_bytes).contents()
    except DamagedHeaderError as damage:
        raise ModelFormatError(
            f"model {where} {damage}", hint="download it again, or check it against its SHA-256"
        ) from None
    needed = max((contents.data_offset + t.offset + t.size_bytes for t in contents.tensors), default=0)
    if needed > file_bytes:
        raise ModelFormatError(
            f"model {where} is truncated: its tensors end at byte {needed:,}, the file has {file_bytes:,}",
            hint="the download did not finish; download it again",
        )
    return GgufHeader(path=where, file_bytes=file_bytes, **msgspec.structs.asdict(contents))
