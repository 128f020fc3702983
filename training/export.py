"""Write a checkpoint as GGUF: `python export.py`, to the file that the package ships.

Matrices become Q8_0 and norms stay F32. llama.cpp rotates neighbouring rows of q and k where the training
code rotates halves, so the rows of both are reordered here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np

import model
import tokenizer
import train
from corpus import BOS, END, SPECIALS

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "src" / "promptai" / "models" / "data" / "promptai-tiny.gguf"
VERSION = "1.0.0"
CONTEXT = 8192
DESCRIPTION = (
    "A very small model of a made-up network edge, for demos and tests of the whole chain. Not for real decisions."
)
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if not loop.last or message['role'] != 'assistant' or add_generation_prompt -%}"
    "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Vocabulary, merges, special tokens and chat template."""
    data = json.loads(tokenizer.PATH.read_text("utf-8"))["model"]
    vocab: dict[str, int] = data["vocab"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    kinds = [gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.NORMAL for t in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocab[BOS])
    writer.add_eos_token_id(vocab[END])
    writer.add_eot_token_id(vocab[END])
    writer.add_pad_token_id(vocab[END])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(TEMPLATE)


def add_shape(writer: gguf.GGUFWriter, cfg: model.Config) -> None:
    """General and architecture metadata."""
    writer.add_type("model")
    writer.add_name("promptai-tiny")
    writer.add_version(VERSION)
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_size_label("2.2M")
    writer.add_languages(["en"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(cfg.width)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.feed)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.heads)
    writer.add_layer_norm_rms_eps(cfg.eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_base)
    writer.add_vocab_size(cfg.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def interleave(weight: np.ndarray, cfg: model.Config) -> np.ndarray:
    """Rows of q or k from (first half, second half) per head to neighbouring pairs."""
    half = cfg.head_dim // 2
    return weight.reshape(cfg.heads, 2, half, cfg.width).swapaxes(1, 2).reshape(cfg.width, cfg.width)


def add_matrix(writer: gguf.GGUFWriter, name: str, weight: np.ndarray) -> None:
    """A matrix as Q8_0; `weight` is [out, in]."""
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(np.ascontiguousarray(weight, np.float32), kind)
    writer.add_tensor(name, packed, raw_dtype=kind)


def export(checkpoint: Path, out: Path) -> None:
    """Read the checkpoint and write the file."""
    cfg = model.Config()
    params = {key: np.asarray(value, np.float32) for key, value in train.load(checkpoint)[0].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "llama")
    add_shape(writer, cfg)
    add_tokenizer(writer)
    add_matrix(writer, "token_embd.weight", params["embed"])
    writer.add_tensor("output_norm.weight", params["out_norm"])
    for i in range(cfg.layers):
        block = f"blk.{i}."
        writer.add_tensor(f"{block}attn_norm.weight", params["attn_norm"][i])
        writer.add_tensor(f"{block}ffn_norm.weight", params["ffn_norm"][i])
        add_matrix(writer, f"{block}attn_q.weight", interleave(params["q"][i].T, cfg))
        add_matrix(writer, f"{block}attn_k.weight", interleave(params["k"][i].T, cfg))
        names = {"v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
        for key, name in names.items():
            add_matrix(writer, f"{block}{name}.weight", params[key][i].T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Export and print the size and the hash."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint.npz")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    partial = args.out.with_suffix(".part")
    export(args.checkpoint, partial)
    partial.replace(args.out)
    data = args.out.read_bytes()
    print(f"{args.out.name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
