"""Write a GGUF with the true shape of a model and random weights.

How fast a model runs and how much memory it takes depends on its shape and its
quantisation, not on what its weights say. So a model can be benchmarked before
(or without) downloading gigabytes: here the file is written locally, one tensor
at a time, in bounded memory. The file says ``promptai.synthetic`` in its
metadata, and whatever measures accuracy must refuse it.

Only the llama architecture in Q4_0 for now; its text is nonsense by design.
"""

import contextlib
from pathlib import Path
from typing import Any

from promptai.errors import ModelError
from promptai.models.shape import Shape

_Q4_0_BLOCK = 32
_Q4_0_BLOCK_BYTES = 18


#: The shape of TinyLlama-1.1B, with a context that holds the bundled workload at one token a byte.
LLAMA_1B = Shape(layers=22, width=2048, heads=32, kv_heads=4, ffn=5632, vocabulary=32_000, context=16_384)


def write_synthetic(path: Path, shape: Shape, *, name: str, seed: int = 0) -> Path:
    """
    Write a model of ``shape`` with random Q4_0 weights to ``path``.

    The same seed gives the same bytes. The file appears under its name only when whole.

    Raises:
        ModelError: The shape is impossible or the file cannot be written.
    """
    if not _possible(shape):
        raise ModelError(
            f"a model of shape {shape} cannot be written",
            hint="width and ffn are multiples of 32, heads divide width into even lengths, kv_heads divide heads, "
            "vocabulary is at least 258",
        )
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(part, shape, name, seed)
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)  # NumPy's short writes carry no errno
        raise ModelError(f"cannot write {path}: {reason}", hint="free some space or choose another path") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # nothing there when it was renamed; half a file after an error or Ctrl-C
    return path


def _possible(shape: Shape) -> bool:
    """Whether an engine could load it; a head of odd length cannot be rotated."""
    counts = (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.ffn, shape.context)
    return (
        min(counts) > 0
        and shape.vocabulary >= 258
        and shape.width % _Q4_0_BLOCK == 0
        and shape.ffn % _Q4_0_BLOCK == 0
        and shape.width % (2 * shape.heads) == 0
        and shape.heads % shape.kv_heads == 0
    )


def _write(part: Path, shape: Shape, name: str, seed: int) -> None:
    import gguf  # noqa: PLC0415  NumPy behind it costs 0.2 s
    import numpy as np  # noqa: PLC0415

    writer = gguf.GGUFWriter(part, "llama")
    try:
        _describe(writer, shape, name)
        matrices = list(_matrices(shape))
        norms = ["output_norm.weight"]
        for layer in range(shape.layers):
            norms += [f"blk.{layer}.attn_norm.weight", f"blk.{layer}.ffn_norm.weight"]
        for tensor, rows, columns in matrices:
            row_bytes = columns // _Q4_0_BLOCK * _Q4_0_BLOCK_BYTES
            writer.add_tensor_info(
                tensor, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, gguf.GGMLQuantizationType.Q4_0
            )
        for tensor in norms:
            writer.add_tensor_info(tensor, (shape.width,), np.dtype(np.float32), shape.width * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        generator = np.random.default_rng(seed)
        # Weights of about N(0, 0.02), as after initialisation: larger ones overflow in f16 sums.
        scale = np.frombuffer(np.float16(0.02 / 4.6).tobytes(), np.uint8)
        for _, rows, columns in matrices:
            blocks = np.empty((rows, columns // _Q4_0_BLOCK, _Q4_0_BLOCK_BYTES), np.uint8)
            blocks[..., :2] = scale
            blocks[..., 2:] = generator.integers(0, 256, blocks[..., 2:].shape, dtype=np.uint8)
            writer.write_tensor_data(blocks.reshape(rows, -1))
        for _ in norms:
            writer.write_tensor_data(np.ones(shape.width, np.float32))
    finally:
        writer.close()


def _matrices(shape: Shape) -> list[tuple[str, int, int]]:
    """Name, rows and columns of every quantised tensor, in file order."""
    width, kv_width = shape.width, shape.width // shape.heads * shape.kv_heads
    found = [("token_embd.weight", shape.vocabulary, width), ("output.weight", shape.vocabulary, width)]
    for layer in range(shape.layers):
        for tensor, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", kv_width, width),
            ("attn_v", kv_width, width),
            ("attn_output", width, width),
            ("ffn_gate", shape.ffn, width),
            ("ffn_up", shape.ffn, width),
            ("ffn_down", width, shape.ffn),
        ):
            found.append((f"blk.{layer}.{tensor}.weight", rows, columns))
    return found


def _describe(writer: Any, shape: Shape, name: str) -> None:
    import gguf  # noqa: PLC0415

    writer.add_name(name)
    writer.add_description("random weights in a true shape: for speed and memory, never for accuracy")
    writer.add_bool("promptai.synthetic", True)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    tokens = [*_byte_tokens(), "<s>", "</s>"]
    tokens += [f"tok{number}" for number in range(shape.vocabulary - len(tokens))]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
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
