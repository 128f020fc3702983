from pathlib import Path

import pytest

from promptai.advisor.cost import Attention, cost_of_file, cost_of_shape
from promptai.models.gguf import read_header
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from promptai.models.tensors import QUANTS, Quant
from support_gguf import Store, gguf, llama

SHAPE = Shape(2, 512, 4, 2, 1024, 3000)
TIED = Shape(2, 512, 4, 2, 1024, 3000, tied=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Writes bytes to a file."""

    def write(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


def test_the_embedding_is_read_only_if_it_is_also_the_output() -> None:
    """Q6_K holds 256 weights in 210 bytes."""
    untied, tied = cost_of_shape(SHAPE, "q4_0"), cost_of_shape(TIED, "q4_0")

    assert untied.decode_bytes == tied.decode_bytes
    assert tied.decode_bytes["Q6_K"] == 3000 * 512 // 256 * 210
    assert untied.file_bytes - tied.file_bytes == 3000 * 512 // 32 * 18


def test_prefill_skips_the_output_and_the_last_feed_forward() -> None:
    """llama.cpp cuts a batch down to the tokens that need logits before the last layer's feed-forward part."""
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 1024
    last = 512 * 512 + 2 * 256 * 512

    assert cost_of_shape(SHAPE, "q8_0").prefill_weights == {"Q8_0": layer + last}


@pytest.mark.parametrize("quant", QUANTS)
def test_a_file_and_its_shape_have_the_same_cost(tmp_path: Path, quant: Quant) -> None:
    path = write_synthetic(tmp_path / "model.gguf", TIED, name="x", quant=quant)

    from_file, from_shape = cost_of_file(read_header(path)), cost_of_shape(TIED, quant)

    assert from_file.file_bytes > from_shape.file_bytes
    for name in (
        "decode_bytes",
        "prefill_weights",
        "layers",
        "width",
        "ffn",
        "vocabulary",
        "kv_bytes_per_token",
        "attention",
    ):
        assert getattr(from_file, name) == getattr(from_shape, name), name


def test_attention_width_sums_the_heads_of_all_layers() -> None:
    wide = Shape(3, 512, 4, 2, 1024, 3000, head_length=256)

    assert cost_of_shape(wide, "q4_0").attention == Attention(head="256", query_width=3 * 4 * 256, kv_width=3 * 2 * 256)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param(llama(), ("16", 4 * 4 * 16, 4 * 4 * 16), id="as-many-kv-heads-as-heads"),
        pytest.param(llama(attention__head_count_kv=1), ("16", 4 * 4 * 16, 4 * 16), id="one-kv-head"),
        pytest.param(llama(attention__head_count_kv=[2, 0, 1, 2]), ("16", 3 * 4 * 16, 5 * 16), id="layers-without"),
        pytest.param(
            llama(attention__head_count=[4, 0, 2, 4], attention__head_count_kv=[2, 0, 1, 2]),
            ("16", 10 * 16, 5 * 16),
            id="by-layer",
        ),
        pytest.param(
            llama(attention__head_count_kv=2, attention__key_length=24, attention__value_length=8),
            ("24/8", 4 * 4 * 24, 4 * 2 * 24),
            id="values-of-another-length",
        ),
        pytest.param(llama(attention__head_count=0), None, id="none"),
        pytest.param(llama(ssm__state_size=128), None, id="recurrent"),
    ],
)
def test_reads_the_attention_of_each_layer_from_a_file(
    store: Store, entries: list[bytes], expected: tuple[str, int, int] | None
) -> None:
    found = cost_of_file(read_header(store(gguf(entries)))).attention

    assert (found and (found.head, found.query_width, found.kv_width)) == expected


def test_the_kv_cache_takes_two_bytes_per_key_and_value() -> None:
    assert cost_of_shape(SHAPE, "q4_0").kv_bytes(1000) == 1000 * 2 * 2 * (128 * 2) * 2


def test_windowed_layers_keep_at_most_their_window_and_a_batch() -> None:
    """Five of six layers of Gemma 3 look back 512 tokens."""
    shape = Shape(6, 512, 4, 1, 1024, 3000, architecture="gemma3", head_length=256, sliding_window=512)
    cost = cost_of_shape(shape, "q4_0")
    one_layer = 2 * 2 * 256

    assert cost.kv_bytes(512) == 6 * 512 * one_layer
    assert cost.kv_bytes(8192) == (8192 + 5 * 1024) * one_layer
