"""Prove that the engine runs the network that was trained: `python verify.py`.

Two checks: llama-server's /tokenize gives the ids of tokenizer.json on 500 varied strings, and the engine's
most likely next token is the training code's on more than 98 in 100 positions of fresh text.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import corpus
import model
import tokenizer
import train
from evaluate import MODEL, Engine

HERE = Path(__file__).resolve().parent
N_STRINGS, N_DOCUMENTS, SEED, AGREE = 500, 16, 99, 0.98
ODD = (
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\nnewline\r\n\r\nend\n",
    "0 1 12 123 1234 12345 3.14 -40 1e9 007",
    "don't we're I'll they'd it's can't DON'T",
    "naïve café Zürich Ωμέγα привет 你好 こんにちは 안녕 مرحبا",
    "emoji 😀👩‍🚀🇩🇪 ½ ² ٣ Ⅷ",
    "<s><|system|>a<|end|><|user|>b<|end|><|assistant|>c<|end|>",
    "<|en d|> <|user |> <s",
    '{"key": [1, 2.5, null]} # code\n    def f(x):\n\t\treturn x**2',
    "trailing space ",
    "\n\n\n",
    "a\u00a0b\u2003c\u200bd",
    "CamelCaseIDs_and-hyphens/paths\\back",
    "......!!!???;;;:::",
    "e\u0301 combining",
    "\u0000\u0001\u007f",
)


def strings() -> list[str]:
    """Hand-picked oddities, generated text, and random mixtures of both."""
    rng = random.Random(SEED)
    out = list(ODD)
    out += [d.text for d in itertools.islice(corpus.documents(SEED, corpus.SHORT + corpus.LONG), 200)]
    pieces = [*ODD, *(d.text for d in itertools.islice(corpus.documents(SEED + 1, corpus.SHORT), 50))]
    while len(out) < N_STRINGS:
        parts = []
        for _ in range(rng.randint(1, 6)):
            text = rng.choice(pieces)
            start = rng.randrange(len(text) + 1)
            parts.append(text[start : start + rng.randint(1, 12)])
            parts.append(
                chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x2FFF), rng.randrange(0x1F300, 0x1F640))))
            )
        out.append("".join(parts))
    return out[:N_STRINGS]


def same_tokens(engine: Engine) -> int:
    """How many strings give the same ids."""
    tok, same = tokenizer.load(), 0
    for text in strings():
        ours = tok.encode(text, add_special_tokens=False).ids
        theirs = engine.tokenize(text, bos=False)
        same += ours == theirs
        if ours != theirs:
            print(f"differs: {text!r}: {ours} / {theirs}")
    return same


def same_top(engine: Engine, checkpoint: Path) -> tuple[int, int]:
    """Positions where the most likely next token is the same, and all positions."""
    params, _ = train.load(checkpoint)
    tok, cfg, same, total = tokenizer.load(), model.Config(), 0, 0
    for document in itertools.islice(corpus.documents(SEED + 2, corpus.SHORT + corpus.LONG), N_DOCUMENTS):
        ids, _ = corpus.encode(document, tok)
        tokens = jnp.asarray([ids], jnp.int32)
        best = np.asarray(model.forward(params, tokens, jnp.zeros_like(tokens), cfg))[0].argmax(-1)
        for i in range(1, len(ids)):
            body = {"prompt": ids[:i], "n_predict": 1, "temperature": 0, "n_probs": 1, "cache_prompt": True}
            first = engine.post("/completion", body)["completion_probabilities"][0]
            same += int(first["id"]) == int(best[i - 1])
            total += 1
    return same, total


def main() -> None:
    """Run both checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint.npz")
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    engine = Engine(args.model)
    tokens = same_tokens(engine)
    print(f"same token ids: {tokens}/{N_STRINGS} strings")
    same, total = same_top(engine, args.checkpoint)
    print(f"same most likely token: {same}/{total} positions = {same / total:.4f}")
    raise SystemExit(0 if tokens == N_STRINGS and same > AGREE * total else 1)


if __name__ == "__main__":
    main()
