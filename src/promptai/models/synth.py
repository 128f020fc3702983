"""Write a GGUF with the true shape of a model and random weights.

How fast a model runs and how much memory it takes depends on its shape and its
quantisation, not on what its weights say. So a model can be benchmarked before
(or without) downloading gigabytes: here the file is written locally, a few
megabytes at a time, in bounded memory. The file says ``promptai.synthetic`` in
its metadata, and whatever measures accuracy must refuse it.

Shape, vocabulary size and quantisation mix are the model's own; the tokenizer is
promptai-tiny's, with the rest of the vocabulary filled up, so that prompts have the same
tokens in every synthetic model. Its text is nonsense by design.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from promptai.errors import ModelError
from promptai.models.bundled import bundled_model
from promptai.models.shape import Shape
from promptai.models.tensors import (
    ALIGNMENT,
    ARCHITECTURES,
    BLOCKS,
    PlannedTensor,
    Quant,
    plan_tensors,
    possible,
    tensor_bytes,
)

#: The shape of TinyLlama-1.1B, with a context that holds the bundled workload.
LLAMA_1B = Shape(layers=22, width=2048, heads=32, kv_heads=4, ffn=5632, vocabulary=32_000, context=16_384)

#: promptai-tiny's 2,048 tokens; smaller vocabularies get the 256 bytes alone.
BORROWED_TOKENS = 2048
_PIECE_BYTES = 8 * 1024 * 1024
_FILE_TYPES = {"q4_0": "MOSTLY_Q4_0", "q4_k_m": "MOSTLY_Q4_K_M", "q8_0": "MOSTLY_Q8_0", "f16": "MOSTLY_F16"}


class _Scale(NamedTuple):
    """An f16 number at a byte of a block, so that random bits become weights of about N(0, 0.02)."""

    offset: int
    value: float


# Random bits are fine everywhere in a block but in its scales, where they would be NaN or 60,000. Weights
# of about N(0, 0.02), as after initialisation: larger ones overflow in f16 sums. 0.02 is divided by the
# deviation of what the scale multiplies: 4.6 for 0..15, 9.2 for 0..31, 74 for a signed byte.
_SCALES = {
    "Q4_0": (_Scale(0, 0.02 / 4.6),),
    "Q5_0": (_Scale(0, 0.02 / 9.2),),
    "Q8_0": (_Scale(0, 0.02 / 74),),
    # The minimum is 7.5 times the scale: it takes the mean of 0..15 out again.
    "Q4_K": (_Scale(0, 0.02 / 257), _Scale(2, 7.5 * 0.02 / 257)),
    "Q6_K": (_Scale(208, 0.02 / (74 * 18.5)),),
}


def write_synthetic(
    path: Path,
    shape: Shape,
    *,
    name: str,
    quant: Quant = "q4_0",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """
    Write a model of ``shape`` with random weights to ``path``.

    The same seed gives the same bytes. The file appears under its name only when whole.

    Args:
        progress: Called with the bytes of each piece that was written.

    Raises:
        ModelError: The shape is impossible, the disk too full or the file cannot be written.
    """
    if not possible(shape, quant):
        raise ModelError(
            f"a model of shape {shape} cannot be written in {quant}",
            hint="width and ffn are multiples of 32, heads divide width into even lengths, kv_heads divide heads, "
            f"vocabulary is at least 258, architecture is one of {', '.join(ARCHITECTURES)}",
        )
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _demand_space(path, tensor_bytes(shape, quant))
        _write(part, shape, quant, name, seed, progress or (lambda _size: None))
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)  # NumPy's short writes carry no errno
        raise ModelError(f"cannot write {path}: {reason}", hint="free some space or choose another path") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # nothing there when it was renamed; half a file after an error or Ctrl-C
    return path


def _demand_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ModelError(
            f"cannot write {path}: it takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there",
            hint="free some space or choose another disk with -o",
        )


def _write(part: Path, shape: Shape, quant: Quant, name: str, seed: int, progress: Callable[[int], None]) -> None:
    import gguf  # noqa: PLC0415  NumPy behind it costs 0.2 s
    import numpy as np  # noqa: PLC0415

    tensors = plan_tensors(shape, quant)
    writer = gguf.GGUFWriter(part, shape.architecture)
    try:
        _describe(writer, shape, quant, name)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.quantization]
            # Any type but bytes: the writer takes the shape of bytes for one of blocks.
            writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.size_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    generator = np.random.default_rng(seed)
    with part.open("ab") as file:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        for tensor in tensors:
            _write_weights(file, tensor, generator, progress)


def _write_weights(file: BinaryIO, tensor: PlannedTensor, generator: Any, progress: Callable[[int], None]) -> None:
    """The data of one tensor, a piece at a time, padded."""
    import numpy as np  # noqa: PLC0415

    weights, block_bytes = BLOCKS[tensor.quantization]
    left = tensor.size_bytes // block_bytes
    while left:
        count = min(left, _PIECE_BYTES // block_bytes)
        data: Any
        if len(tensor.shape) == 1:
            data = np.full(count, 0.0 if tensor.name.endswith(".bias") else 1.0, np.float32)
        elif weights == 1:
            data = (generator.standard_normal(count, np.float32) * 0.02).astype(np.float16)
        else:
            data = np.frombuffer(bytearray(generator.bytes(count * block_bytes)), np.uint8).reshape(count, block_bytes)
            for offset, value in _SCALES[tensor.quantization]:
                data[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        file.write(data.tobytes())
        progress(count * block_bytes)
        left -= count
    file.write(b"\0" * (-tensor.size_bytes % ALIGNMENT))


def _describe(writer: Any, shape: Shape, quant: Quant, name: str) -> None:
    import gguf  # noqa: PLC0415

    writer.add_name(name)
    writer.add_description("random weights in a true shape: for speed and memory, never for accuracy")
    writer.add_bool("promptai.synthetic", True)
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[quant]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.rotated or shape.head)
    # Of the two, architectures read the one that they have.
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    if shape.vocabulary >= BORROWED_TOKENS:
        _borrow_tokenizer(writer, shape.vocabulary)
    else:
        _byte_tokenizer(writer, shape.vocabulary)


def _borrow_tokenizer(writer: Any, vocabulary: int) -> None:
    """promptai-tiny's tokens, merges and template: real text becomes as many tokens as it should."""
    import gguf  # noqa: PLC0415

    reader = gguf.GGUFReader(bundled_model())

    def read(key: str) -> Any:
        return reader.get_field(key).contents()

    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    # llama.cpp looks the four up, and ends without a word if they are not there, when the name contains "phi-3".
    filling = [token for token in ("</s>", "<s>", "<unk>", "<|endoftext|>") if token not in tokens]
    filling += [f"tok{number}" for number in range(vocabulary)]
    extra = vocabulary - len(tokens)
    writer.add_token_list([*tokens, *filling[:extra]])
    writer.add_token_types([*types, *[int(gguf.TokenType.NORMAL)] * extra])
    writer.add_token_merges(read("tokenizer.ggml.merges"))
    writer.add_chat_template(read("tokenizer.chat_template"))
    writer.add_bos_token_id(read("tokenizer.ggml.bos_token_id"))
    writer.add_eos_token_id(read("tokenizer.ggml.eos_token_id"))


def _byte_tokenizer(writer: Any, vocabulary: int) -> None:
    """One token a byte, for vocabularies of toys."""
    import gguf  # noqa: PLC0415

    tokens = [*_byte_tokens(), "<s>", "</s>"]
    tokens += [f"tok{number}" for number in range(vocabulary - len(tokens))]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in ("<s>", "</s>") else normal for token in tokens])
    writer.add_token_merges(["a b"])  # the loader refuses an empty list
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_in = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_in)) for byte in range(256)]
