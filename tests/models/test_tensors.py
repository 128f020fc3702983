from math import prod

import msgspec
import pytest

from promptai.models.shape import Shape
from promptai.models.tensors import (
    ARCHITECTURES,
    QUANTS,
    Quant,
    plan_tensors,
    possible,
    tensor_bytes,
)

LLAMA_2_7B = Shape(32, 4096, 32, 32, 11_008, 32_000)
LLAMA_32_1B = Shape(16, 2048, 32, 8, 8192, 128_256, tied=True)
PHI_2 = Shape(32, 2560, 32, 32, 10_240, 51_200, architecture="phi2", rotated=32)
QWEN_25_05B = Shape(24, 896, 14, 2, 4864, 151_936, architecture="qwen2", tied=True)
EMBEDDING = "token_embd.weight"
#: The same dimensions for every architecture.
PLAIN = Shape(4, 512, 4, 2, 1024, 3000)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "mamba"},
        {"width": 520},
        {"ffn": 1000},
        {"heads": 3},
        {"head_length": 63},
        {"kv_heads": 3},
        {"rotated": 0},
        {"rotated": 256},
        {"vocabulary": 100},
        {"layers": 0},
    ],
    ids=str,
)
def test_shapes_that_engines_cannot_load_are_not_possible(change: dict[str, object]) -> None:
    assert possible(PLAIN, "q4_0")
    assert not possible(Shape(**(msgspec.structs.asdict(PLAIN) | change)), "q4_0")


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        # Numbers of weights from the safetensors metadata of the checkpoints on the hub.
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_32_1B, 1_235_814_400),
        (PHI_2, 2_779_683_840),
        (QWEN_25_05B, 494_032_768),
    ],
    ids=["llama-2-7b", "llama-3.2-1b", "phi-2", "qwen2.5-0.5b"],
)
def test_shapes_of_published_models_have_their_number_of_weights(shape: Shape, published: int) -> None:
    assert sum(tensor.weights for tensor in plan_tensors(shape, "f16")) == published


@pytest.mark.parametrize(
    ("shape", "quant", "published"),
    [
        # Sizes of the files named *.Q4_0.gguf and *.Q4_K_M.gguf on the hub, rounded to 0.01 GB.
        (LLAMA_2_7B, "q4_0", 3.83e9),
        (LLAMA_2_7B, "q4_k_m", 4.08e9),
        (LLAMA_32_1B, "q4_k_m", 0.81e9),
        (PHI_2, "q4_k_m", 1.79e9),
    ],
)
def test_sizes_match_published_files_except_for_their_headers(shape: Shape, quant: Quant, published: float) -> None:
    assert tensor_bytes(shape, quant) == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quant", QUANTS)
def test_sizes_follow_from_bits_per_weight(architecture: str, quant: Quant) -> None:
    """4.5, 8.5 and 16 bits for matrices, 6.56 for tensors that need more, 32 for vectors."""
    tensors = plan_tensors(msgspec.structs.replace(PLAIN, architecture=architecture), quant)
    bits = {"Q4_0": 4.5, "Q4_K": 4.5, "Q6_K": 6.5625, "Q8_0": 8.5, "F16": 16, "F32": 32}

    assert [t.size_bytes for t in tensors] == [prod(t.shape) * bits[t.quantization] / 8 for t in tensors]
    assert {t.quantization for t in tensors if len(t.shape) == 1} == {"F32"}


def test_q4_0_keeps_the_output_matrix_at_six_bits() -> None:
    types = {tensor.name: tensor.quantization for tensor in plan_tensors(PLAIN, "q4_0")}

    assert types["output.weight"] == "Q6_K"
    assert types[EMBEDDING] == "Q4_0"
    assert {kind for name, kind in types.items() if "blk" in name and "norm" not in name} == {"Q4_0"}


def test_a_tied_embedding_is_stored_once_with_the_output_s_type() -> None:
    types = {t.name: t.quantization for t in plan_tensors(msgspec.structs.replace(PLAIN, tied=True), "q4_k_m")}

    assert "output.weight" not in types
    assert types[EMBEDDING] == "Q6_K"


def test_q4_k_m_gives_more_bits_to_the_outer_layers_and_every_third() -> None:
    shape = msgspec.structs.replace(PLAIN, layers=16)
    types = {tensor.name: tensor.quantization for tensor in plan_tensors(shape, "q4_k_m")}

    more = [layer for layer in range(16) if types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert more == [layer for layer in range(16) if types[f"blk.{layer}.attn_v.weight"] == "Q6_K"]


def test_rows_not_divisible_by_256_fall_back_to_blocks_of_32() -> None:
    """As in SmolLM2-135M and Qwen2.5-0.5B."""
    types = {t.name: t.quantization for t in plan_tensors(QWEN_25_05B, "q4_k_m")}

    assert types[EMBEDDING] == "Q8_0"
    assert types["blk.3.attn_q.weight"] == "Q5_0"
    assert types["blk.3.ffn_down.weight"] == "Q4_K"  # 4864 is 19 times 256
