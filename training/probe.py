"""A quick look at a checkpoint during training, on held-out questions other than the shipped ones.

Greedy decoding gives the right answer exactly when every token of the answer is the most likely one given the
tokens before it, so one forward pass over prompt and answer is enough.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict

import jax
import numpy as np

import corpus
import make_items
import model
import pronouns
import tokenizer

SEED, LENGTH = 77, 192


@functools.partial(jax.jit, static_argnames="cfg")
def log_probs(params: model.Params, tokens: jax.Array, cfg: model.Config) -> jax.Array:
    """Log-probabilities of the next token everywhere."""
    return jax.nn.log_softmax(model.forward(params, tokens, jax.numpy.zeros_like(tokens), cfg))


def run(params: model.Params, cfg: model.Config, rows: list[list[int]]) -> np.ndarray:
    """Log-probabilities of padded rows, in chunks of eight."""
    out = []
    for i in range(0, len(rows), 8):
        tokens = np.zeros((8, LENGTH), np.int32)
        for j, row in enumerate(rows[i : i + 8]):
            tokens[j, : len(row)] = row[:LENGTH]
        out.append(np.asarray(log_probs(params, tokens, cfg))[: len(rows[i : i + 8])])
    return np.concatenate(out)


def short_questions(params: model.Params, cfg: model.Config, n: int) -> dict[str, list[bool]]:
    """Right or wrong, by kind."""
    tok = tokenizer.load()
    right: dict[str, list[bool]] = defaultdict(list)
    asked = make_items.questions(SEED, n, max(5, n // 40))
    rows, starts = [], []
    for item in asked:
        prompt = corpus.chat_document(item["messages"], []).text + corpus.ROLE["assistant"]
        head = tok.encode(prompt, add_special_tokens=False).ids
        rows.append(head + tok.encode(item["answer"] + corpus.END, add_special_tokens=False).ids)
        starts.append(len(head))
    for item, row, start, lp in zip(asked, rows, starts, run(params, cfg, rows), strict=True):
        best = lp[start - 1 : len(row) - 1].argmax(-1)
        right[item["kind"]].append(bool((best == np.array(row[start:])).all()))
    return right


def pronoun_items(params: model.Params, cfg: model.Config, n: int) -> list[bool]:
    """Right or wrong, by the likelihood of the text after the noun."""
    tok, rng = tokenizer.load(), random.Random(SEED)
    rows, starts = [], []
    for i in range(n):
        fill = pronouns.draw(rng, want_held_out=True)
        side = i % 2 == 0
        for head_text, rest in (
            fill.resolved(doer_side=side),
            (fill.resolved(doer_side=not side)[0], fill.resolved(doer_side=side)[1]),
        ):
            head = tok.encode(corpus.BOS + head_text, add_special_tokens=False).ids
            rows.append(head + tok.encode(rest, add_special_tokens=False).ids)
            starts.append(len(head))
    scores = []
    for row, start, lp in zip(rows, starts, run(params, cfg, rows), strict=True):
        scores.append(sum(lp[k - 1, row[k]] for k in range(start, len(row))))
    return [bool(a > b) for a, b in zip(scores[::2], scores[1::2], strict=True)]


def accuracy(params: model.Params, cfg: model.Config) -> str:
    """One line: both scores, and the kinds below nine in ten."""
    by_kind = short_questions(params, cfg, 120)
    flat = [ok for oks in by_kind.values() for ok in oks]
    twins = pronoun_items(params, cfg, 60)
    weak = {k: f"{sum(v)}/{len(v)}" for k, v in by_kind.items() if sum(v) < 0.9 * len(v)}
    return f"PROBE questions {np.mean(flat):.3f} pronouns {np.mean(twins):.3f} weak {weak}"
