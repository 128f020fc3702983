"""A llama-architecture language model in plain JAX, small enough to train on two CPU cores.

The forward pass is the one llama.cpp runs for `general.architecture = llama`: RMS norm, rotary positions
on interleaved pairs, SiLU-gated feed-forward, tied embeddings. Weights are stacked over layers so that the
optimiser can treat each kind of matrix as one array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import headstart

Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """The shape of the network; every width divides by 32, the block size of Q8_0."""

    vocab: int = 2048
    layers: int = 5
    width: int = 192
    heads: int = 6
    feed: int = 384
    rope_base: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


def init(cfg: Config, tokens: list[str], seed: int) -> Params:
    """Random weights with the head start; other matrices that write to the residual stream start at zero."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0.0, scale, shape).astype(np.float32)

    n, w, f = cfg.layers, cfg.width, cfg.feed
    weights = {
        "embed": headstart.embeddings(tokens, w),
        "out_norm": np.ones((w,), np.float32),
        "attn_norm": np.ones((n, w), np.float32),
        "ffn_norm": np.ones((n, w), np.float32),
        "q": normal(n, w, w, scale=w**-0.5),
        "k": normal(n, w, w, scale=w**-0.5),
        "v": normal(n, w, w, scale=w**-0.5),
        "o": np.zeros((n, w, w), np.float32),
        "gate": normal(n, w, f, scale=w**-0.5),
        "up": normal(n, w, f, scale=w**-0.5),
        "down": np.zeros((n, f, w), np.float32),
    }
    headstart.apply(weights, cfg.heads, cfg.rope_base)
    return {key: jnp.asarray(value) for key, value in weights.items()}


def count(params: Params) -> int:
    """Number of weights."""
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(params))


def rms(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm with a gain and no bias."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rope_tables(cfg: Config, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of shape [length, 1, head_dim / 2]."""
    half = cfg.head_dim // 2
    freq = cfg.rope_base ** (-np.arange(half) * 2.0 / cfg.head_dim)
    angle = np.arange(length)[:, None] * freq[None, :]
    return jnp.asarray(np.cos(angle), jnp.float32)[:, None], jnp.asarray(np.sin(angle), jnp.float32)[:, None]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first half against the second; `export.py` reorders rows into llama.cpp's pairs."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attend(x: jax.Array, p: Params, bias: jax.Array, tables: tuple[jax.Array, jax.Array], cfg: Config) -> jax.Array:
    """Multi-head causal attention within each packed document."""
    b, t, w = x.shape
    qkv = x.reshape(b * t, w) @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
    q, k, v = (part.reshape(b, t, cfg.heads, cfg.head_dim) for part in jnp.split(qkv, 3, axis=-1))
    q, k = rotate(q, *tables), rotate(k, *tables)
    q, k, v = (part.transpose(0, 2, 1, 3) for part in (q * cfg.head_dim**-0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) + bias
    mixed = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), v)
    out: jax.Array = mixed.transpose(0, 2, 1, 3).reshape(b * t, w) @ p["o"]
    return out.reshape(b, t, w)


def feed(x: jax.Array, p: Params) -> jax.Array:
    """SiLU-gated feed-forward."""
    b, t, w = x.shape
    both = x.reshape(b * t, w) @ jnp.concatenate([p["gate"], p["up"]], axis=1)
    gate, up = jnp.split(both, 2, axis=-1)
    out: jax.Array = (jax.nn.silu(gate) * up) @ p["down"]
    return out.reshape(b, t, w)


LAYER_KEYS = ("attn_norm", "ffn_norm", "q", "k", "v", "o", "gate", "up", "down")


def forward(params: Params, tokens: jax.Array, segments: jax.Array, cfg: Config) -> jax.Array:
    """Logits [batch, length, vocab]; tokens see only earlier tokens of their own segment."""
    length = tokens.shape[1]
    tables = rope_tables(cfg, length)
    causal = np.tril(np.ones((length, length), bool))
    same = segments[:, None, :, None] == segments[:, None, None, :]
    bias = jnp.where(same & causal, 0.0, -1e9).astype(jnp.float32)
    x = params["embed"][tokens]
    for i in range(cfg.layers):
        p = {key: params[key][i] for key in LAYER_KEYS}
        x = x + attend(rms(x, p["attn_norm"], cfg.eps), p, bias, tables, cfg)
        x = x + feed(rms(x, p["ffn_norm"], cfg.eps), p)
    logits: jax.Array = rms(x, params["out_norm"], cfg.eps) @ params["embed"].T
    return logits


def loss(params: Params, batch: dict[str, jax.Array], cfg: Config) -> jax.Array:
    """Weighted mean cross-entropy of the next token."""
    logits = forward(params, batch["tokens"][:, :-1], batch["segments"][:, :-1], cfg)
    target, weight = batch["tokens"][:, 1:], batch["weights"][:, 1:]
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(nll * weight) / (jnp.sum(weight) + 1e-6)
