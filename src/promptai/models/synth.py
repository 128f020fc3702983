"""Write a synthetic model: a GGUF with a real model's shape and random weights.

Speed and memory depend on a model's shape and quantisation, not on the values of its
weights. So a model can be benchmarked before (or without) downloading gigabytes: this
module writes the file locally, a few megabytes at a time, in bounded memory. Its
metadata has the key ``promptai.synthetic``; code that measures accuracy must reject
such a file.

Shape, vocabulary size and quantisation mix are the real model's. The tokenizer is
promptai-tiny's, with filler tokens up to the vocabulary size, so prompts have the same tokens
in every synthetic model. The generated text is nonsense by design.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from promptai.errors import ModelError
from promptai.models.bundled import bundled_model
from promptai.models.library import readable_size
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

#: The shape of TinyLlama-1.1B, with a context long enough for the bundled workload.
LLAMA_1B = Shape(layers=22, width=2048, heads=32, kv_heads=4, ffn=5632, vocabulary=32_000, context=16_384)

#: Size of promptai-tiny's vocabulary; models with a smaller one get a byte tokenizer.
BORROWED_TOKENS = 2048
_CHUNK_BYTES = 8 * 1024 * 1024
_FILE_TYPES = {"q4_0": "MOSTLY_Q4_0", "q4_k_m": "MOSTLY_Q4_K_M", "q8_0": "MOSTLY_Q8_0", "f16": "MOSTLY_F16"}


class _Scale(NamedTuple):
    """An f16 scale at a byte offset in a block, chosen to turn random bits into weights of about N(0, 0.02)."""

    offset: int
    value: float


# Random bits may fill a block except for its scales, where they could mean NaN or 60,000. Weights are about
# N(0, 0.02), as after initialisation, because larger ones overflow in f16 sums. 0.02 is divided by the standard
# deviation of the scaled values: 4.6 for 0..15, 9.2 for 0..31, 74 for a signed byte.
_SCALES = {
    "Q4_0": (_Scale(0, 0.02 / 4.6),),
    "Q5_0": (_Scale(0, 0.02 / 9.2),),
    "Q8_0": (_Scale(0, 0.02 / 74),),
    # The minimum is 7.5 times the scale, which subtracts the mean of 0..15.
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
    Write a model of ``shape`` with random weights to ``path``, atomically.

    The same seed produces the same bytes.

    Args:
        progress: Called with the size of each chunk written.

    Raises:
        ModelError: Engines cannot load the shape, the disk is too full, or the file cannot be written.
    """
    if not possible(shape, quant):
        raise ModelError(
            f"a model of shape {shape} cannot be written in {quant}",
            hint="width and ffn must be multiples of 32, heads must divide width into even lengths, kv_heads must "
            f"divide heads, vocabulary must be at least 258, architecture must be one of {', '.join(ARCHITECTURES)}",
        )
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path, tensor_bytes(shape, quant))
        _write(part, shape, quant, name, seed, progress or (lambda _size: None))
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)  # NumPy reports short writes without an errno
        raise ModelError(f"cannot write {path}: {reason}", hint="free some space or choose another path") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # a partial file after an error or Ctrl-C; missing after the rename
    return path


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ModelError(
            f"cannot write {path}: it needs {readable_size(needed)}, {readable_size(free)} are free there",
            hint="free some space or choose another disk with -o",
        )


def _write(part: Path, shape: Shape, quant: Quant, name: str, seed: int, progress: Callable[[int], None]) -> None:
    import gguf  # noqa: PLC0415  imports NumPy, 0.2 s
    import numpy as np  # noqa: PLC0415

    tensors = plan_tensors(shape, quant)
    writer = gguf.GGUFWriter(part, shape.architecture)
    try:
        _describe(writer, shape, quant, name)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.quantization]
            # Any dtype except bytes, whose shape the writer would interpret as a shape of blocks.
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
    """Write one tensor's data in chunks, with padding."""
    import numpy as np  # noqa: PLC0415

    weights, block_bytes = BLOCKS[tensor.quantization]
    left = tensor.size_bytes // block_bytes
    while left:
        count = min(left, _CHUNK_BYTES // block_bytes)
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
    # Each architecture reads one of the two.
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
    """Copy promptai-tiny's tokens, merges and template, for a realistic number of tokens per text."""
    import gguf  # noqa: PLC0415

    reader = gguf.GGUFReader(bundled_model())

    def read(key: str) -> Any:
        return reader.get_field(key).contents()

    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    # For names containing "phi-3", llama.cpp looks up these four and exits without a message if one is missing.
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
    """Write a tokenizer with one token per byte, for small test vocabularies."""
    import gguf  # noqa: PLC0415

    tokens = [*_byte_tokens(), "<s>", "</s>"]
    tokens += [f"tok{number}" for number in range(vocabulary - len(tokens))]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in ("<s>", "</s>") else normal for token in tokens])
    writer.add_token_merges(["a b"])  # the loader rejects an empty list
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def _byte_tokens() -> list[str]:
    """Return GPT-2's printable characters for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_in = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_in)) for byte in range(256)]
