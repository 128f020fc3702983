"""A head start for reading: related tokens start alike, and a few heads start with a job.

Answering from the context needs two heads in a row: one that tells each token what stood shortly before it, and
one that looks for places with the same surroundings. Random weights need millions of tokens to find the pair,
which is most of what two CPU cores can afford; set by hand, training starts behind that point. Everything stays
trainable.
"""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]
CONSTANT = 0.35  # the part of every embedding that is the same, in dimension 0
SHARED, OWN = 0.045, 0.022  # how much of an embedding a word shares with its other spellings
LOOK_BACK = ((1, 0.95), (2, 0.95), (3, 0.45), (4, 0.45), (1, 0.95))  # distance and sharpness, head by head
MATCH_LAYERS = (1, 2)
MATCH_HEADS = (0, 2, 3)
WRITE, MATCH, COPY = 0.012, 0.3, 0.03


def embeddings(tokens: list[str], width: int) -> np.ndarray:
    """Random rows, alike for spellings that differ in a leading space or a capital letter."""
    rng = np.random.default_rng(12)
    bases: dict[str, np.ndarray] = {}
    rows = []
    for token in tokens:
        name = token.removeprefix("\u0120").lower()
        base = bases.setdefault(name, rng.normal(0.0, SHARED, width))
        rows.append(base + rng.normal(0.0, OWN, width))
    out = np.stack(rows).astype(np.float32)
    out[:, 0] = CONSTANT
    return out


def apply(weights: Weights, heads: int, rope_base: float) -> None:
    """Change freshly drawn weights in place."""
    width = weights["embed"].shape[1]
    size = width // heads
    half, fast = size // 2, size // 4
    freq = rope_base ** (-np.arange(half) * 2.0 / size)
    rng = np.random.default_rng(11)
    for head, (offset, sharp) in enumerate(LOOK_BACK):
        at = head * size
        for name, phase in (("q", 0.0), ("k", float(offset))):
            block = np.zeros((width, size), np.float32)
            block[0, :fast] = sharp * np.cos(phase * freq[:fast])
            block[0, half : half + fast] = sharp * np.sin(phase * freq[:fast])
            weights[name][0, :, at : at + size] = block
        weights["v"][0, 0, at : at + size] = 0.0
        weights["o"][0, at : at + size] = rng.normal(0.0, WRITE, (size, width))
    for layer in range(1, weights["v"].shape[0]):
        turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
        weights["v"][layer], weights["o"][layer] = turn, COPY * turn.T
    slow = np.r_[fast:half, half + fast : size]
    for layer in MATCH_LAYERS:
        for head in MATCH_HEADS:
            at = head * size
            past = np.linalg.pinv(weights["o"][0, at : at + size]) * MATCH
            own = weights["v"][0, :, at : at + size]
            seek, keep = {0: (own, past), 2: (past * 0.5, past), 3: (past, own)}[head]
            for name, block in (("q", seek), ("k", keep)):
                weights[name][layer, :, at : at + size] = 0.0
                weights[name][layer][:, at + slow] = block[:, slow]
