"""A head start for reading: related tokens start alike, and some heads start with a function.

To answer from the context, one head must copy the preceding tokens to each position, and a later head must find the
place with the same surroundings. From random weights, such pairs emerge after millions of tokens, which is most of
what two CPU cores can afford; initialising them by hand skips that phase. Everything stays trainable. Each look-back
head writes to its own rows of the residual stream, so the matching heads of the next layer read clean copies.
"""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]
CONSTANT = 0.35  # dimension 0, equal for every token; look-back heads rotate it by position
SPACE = 0.05  # dimension 1, whether a token starts with a space
WORDS = slice(2, 96)  # the identity of the token
SHARED, OWN = 0.06, 0.012  # the part that spellings of a word share, and the rest
LOOK_BACK = {1: slice(96, 128), 2: slice(128, 160), 3: slice(160, 192)}  # distance to rows
SHARP, WRITE, COPY = 1.4, 0.03, 0.03
MATCH_SELF, MATCH_PAST = 2.5, 4.5  # gains that make a match stand out against some hundred other tokens
# head by head, what the matching layer compares: 0 is the token itself, otherwise a distance back
MATCHES = ((3, 3), (3, 2), (0, 1), (1, 2), (3, 0))
MATCH_LAYER, SECOND_LOOK_LAYER = 1, 2


def embeddings(tokens: list[str], width: int) -> np.ndarray:
    """Random rows, similar for spellings that differ in a leading space or a capital letter."""
    rng = np.random.default_rng(12)
    bases: dict[str, np.ndarray] = {}
    size = WORDS.stop - WORDS.start
    out = np.zeros((len(tokens), width), np.float32)
    for row, token in enumerate(tokens):
        base = bases.setdefault(token.removeprefix("\u0120").lower(), rng.normal(0.0, SHARED, size))
        out[row, WORDS] = base + rng.normal(0.0, OWN, size)
        out[row, 1] = SPACE if token.startswith("\u0120") else -SPACE
    out[:, WORDS] *= SHARED * np.sqrt(size) / np.linalg.norm(out[:, WORDS], axis=1, keepdims=True)
    out[:, 0] = CONSTANT
    return out


def look_back(weights: Weights, layer: int, head: int, distance: int, geometry: tuple[int, np.ndarray]) -> None:
    """Let a head attend to the token `distance` back, by the position-dependent half of its width."""
    size, freq = geometry
    half, fast, at = size // 2, size // 8, head * size
    for name, phase in (("q", 0.0), ("k", float(distance))):
        block = np.zeros((weights[name].shape[1], size), np.float32)
        block[0, :fast] = SHARP * np.cos(phase * freq[:fast])
        block[0, half : half + fast] = SHARP * np.sin(phase * freq[:fast])
        weights[name][layer, :, at : at + size] = block


def apply(weights: Weights, heads: int, rope_base: float) -> None:
    """Change freshly drawn weights in place."""
    width = weights["embed"].shape[1]
    size = width // heads
    freq = rope_base ** (-np.arange(size // 2) * 2.0 / size)
    rng = np.random.default_rng(11)
    project = np.zeros((width, size), np.float32)
    project[WORDS] = np.linalg.qr(rng.normal(size=(WORDS.stop - WORDS.start, size)))[0]
    for layer in range(1, weights["v"].shape[0]):
        turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
        weights["v"][layer], weights["o"][layer] = turn, COPY * turn.T
    for head, (distance, rows) in enumerate(LOOK_BACK.items()):
        at = head * size
        look_back(weights, 0, head, distance, (size, freq))
        look_back(weights, SECOND_LOOK_LAYER, head, distance, (size, freq))
        weights["v"][0, :, at : at + size] = project
        weights["o"][0, at : at + size] = 0.0
        weights["o"][0, at : at + size, rows] = WRITE * np.eye(size)
    slow = np.r_[size // 4 : size // 2, 3 * size // 4 : size]
    for head, pair in enumerate(MATCHES):
        for name, distance in zip(("q", "k"), pair, strict=True):
            block = project * MATCH_SELF
            if distance:
                block = np.zeros((width, size), np.float32)
                block[LOOK_BACK[distance]] = MATCH_PAST * np.eye(size)
            chosen = np.zeros((width, size), np.float32)
            chosen[:, slow] = block[:, slow]
            weights[name][MATCH_LAYER, :, head * size : (head + 1) * size] = chosen
