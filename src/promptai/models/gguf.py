"""Read the header of a GGUF file: what it is, how big, whether it is whole.

Loading a damaged or oversized file into an engine costs minutes on a small
board and ends in a log that few can read, or in the out-of-memory killer. The
header answers in milliseconds: the shape, the quantisation, the bytes that the
tensors need, and whether the file really has them.

Written here rather than taken from the ``gguf`` package because its reader
turns every vocabulary entry into NumPy arrays (seconds and hundreds of MB for a
128 k vocabulary) and trusts the counts that a file claims. This one
(``models.ggufbytes``) reads forward once, keeps scalars and short arrays, skips
the rest, and treats every number in the file as hostile. It does not read tensor
data. Of a model in several files it reads the one that it is given; who wants all
asks ``part_names``.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from promptai.errors import ModelFormatError, ModelNotFoundError
from promptai.models.ggufbytes import ByteStream, DamagedHeaderError, HeaderContents, HeaderReader

_MAX_PARTS = 1000
#: A state of fixed size instead of keys and values, in some or all layers (llama.cpp's src/llama-arch.cpp).
_RECURRENT = ("ssm.state_size", "wkv.head_size", "shortconv.l_cache")


class Heads(NamedTuple):
    """Attention heads, summed over the layers, and how many numbers a key and a value of one have."""

    query_heads: int
    kv_heads: int
    key_length: int
    value_length: int


class GgufHeader(HeaderContents, frozen=True, kw_only=True):
    """
    What a GGUF file says of itself.

    Attributes:
        path: Where it was read.
        file_bytes: Size of the file.
    """

    path: str
    file_bytes: int

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
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

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
    def split(self) -> tuple[int, int] | None:
        """Which part (from 0) of how many this file is; ``None`` for a model in one file."""
        number, count = self.metadata.get("split.no"), self.metadata.get("split.count")
        if isinstance(number, int) and isinstance(count, int) and count > 1:
            return number, count
        return None

    @property
    def synthetic(self) -> bool:
        """True when the weights are random: good for speed and memory, void for accuracy."""
        return self.metadata.get("promptai.synthetic") is True

    def kv_bytes_per_token(self, *, bytes_per_value: float = 2.0) -> int | None:
        """
        Bytes of KV cache that one token of context takes, over all layers.

        Keys and values each hold ``kv heads x head length`` numbers a layer; f16
        takes 2 bytes each. ``None`` when the header lacks the shape, and for
        architectures whose cache is not of this form (recurrent ones that do not list
        their layers' heads).
        """
        heads = self.heads
        if heads is None:
            return None
        return round(heads.kv_heads * (heads.key_length + heads.value_length) * bytes_per_value)

    @property
    def heads(self) -> Heads | None:
        """The attention heads of all layers; ``None`` when the header lacks them, or some layers are recurrent."""
        layers, width = self._integer("block_count"), self._integer("embedding_length")
        heads = self._integers("attention.head_count")
        kv_heads = self._integers("attention.head_count_kv") or heads
        if not layers or not width or not heads or max(heads) <= 0 or min(*heads, *kv_heads) < 0:
            return None
        if len(kv_heads) == 1 and any(self._integers(key) for key in _RECURRENT):
            return None  # only some layers keep keys and values, and which ones is the loader's knowledge
        if len(heads) > 1:
            asking = sum(heads)
        else:  # a layer without KV heads attends to nothing
            asking = heads[0] * (layers if len(kv_heads) == 1 else sum(kept > 0 for kept in kv_heads))
        return Heads(
            query_heads=asking,
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
    Read a GGUF header and check that the file holds what it promises.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is empty, not a GGUF, damaged or cut short.
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
    """File names of all the parts of a model that is split over several files, the first first; else its own."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", name, re.DOTALL)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= _MAX_PARTS:
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def join_parts(headers: list[GgufHeader]) -> GgufHeader:
    """One header for a model in several files: what the first says, with the tensors of all."""
    return msgspec.structs.replace(
        headers[0],
        tensors=[tensor for header in headers for tensor in header.tensors],
        file_bytes=sum(header.file_bytes for header in headers),
    )


def parse_header(file: ByteStream, file_bytes: int, where: str) -> GgufHeader:
    """
    Read a GGUF header from whatever gives bytes, and check that the file holds what it promises.

    Args:
        file: At its first byte; is read forwards only.
        file_bytes: Size of the whole file.
        where: Its path or address, for the header and for messages.

    Raises:
        ModelFormatError: It is empty, not a GGUF, damaged or cut short.
    """
    if file_bytes == 0:
        raise ModelFormatError(f"model {where} is empty (0 bytes)", hint="fetch it again")
    try:
        contents = HeaderReader(file, file_bytes).contents()
    except DamagedHeaderError as damage:
        raise ModelFormatError(
            f"model {where} {damage}", hint="fetch it again, or check it against its SHA-256"
        ) from None
    needed = max((contents.data_offset + t.offset + t.size_bytes for t in contents.tensors), default=0)
    if needed > file_bytes:
        raise ModelFormatError(
            f"model {where} is cut short: its tensors end at byte {needed:,}, the file has {file_bytes:,}",
            hint="the download did not finish; fetch it again",
        )
    return GgufHeader(path=where, file_bytes=file_bytes, **msgspec.structs.asdict(contents))
