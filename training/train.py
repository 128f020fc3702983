"""Train promptai-tiny from nothing: `python train.py` writes checkpoint.npz, in under an hour on two cores.

The text is drawn as it is needed from fixed seeds. The rate warms up, stays, and falls to zero over the last
third. Rows are short because attention costs most on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import corpus
import model
import optimizer
import tokenizer
from probe import accuracy

HERE = Path(__file__).resolve().parent
STEPS, WARMUP, DECAY_FROM = 2400, 60, 0.5
SHORT_ROWS, SHORT_LENGTH = 16, 128
FIRST_STEPS = 150
LONG_ROWS, LONG_LENGTH, LONG_EVERY = 5, 384, 6
MUON_LR, ADAM_LR = 0.005, 0.0015
SEED = 1


def rate(step: int, steps: int, decay_from: float) -> float:
    """The schedule in 0..1: warm-up, plateau, straight line to zero."""
    left = (steps - step) / (steps * (1.0 - decay_from))
    return max(0.0, min(1.0, (step + 1) / WARMUP, left))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnums=(0, 1))
def train_step(
    params: model.Params,
    state: optimizer.State,
    batch: dict[str, jax.Array],
    pace: optimizer.Pace,
    cfg: model.Config,
) -> tuple[model.Params, optimizer.State, jax.Array]:
    """Gradient and update."""
    value, grads = jax.value_and_grad(model.loss)(params, batch, cfg)
    params, state = optimizer.update(params, grads, state, pace)
    return params, state, value


def save(path: Path, params: model.Params, state: optimizer.State | None = None) -> None:
    """Weights, and if given the optimiser's moments, as one npz file."""
    arrays = {f"p.{k}": np.asarray(v) for k, v in params.items()}
    for part in ("first", "second"):
        arrays |= {f"{part}.{k}": np.asarray(v) for k, v in (state or {}).get(part, {}).items()}
    partial = path.with_suffix(".part.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def load(path: Path) -> tuple[model.Params, optimizer.State]:
    """Read a file written by `save`."""
    out: dict[str, dict[str, Any]] = {"p": {}, "first": {}, "second": {}}
    with np.load(path) as file:
        for name in file.files:
            part, key = name.split(".", 1)
            out[part][key] = jnp.asarray(file[name])
    return out["p"], {"first": out["first"], "second": out["second"]}


def rows(steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Look-ups first, then all kinds; from then on every sixth batch is long rows of longer answers."""
    tok = tokenizer.load()
    first = corpus.batches(corpus.documents(corpus.FIRST_SEED, corpus.FIRST), tok, SHORT_ROWS, SHORT_LENGTH)
    short = corpus.batches(corpus.documents(corpus.SHORT_SEED, corpus.SHORT), tok, SHORT_ROWS, SHORT_LENGTH)
    longer = corpus.batches(corpus.documents(corpus.LONG_SEED, corpus.LONG), tok, LONG_ROWS, LONG_LENGTH)
    for step in range(steps):
        if step < FIRST_STEPS:
            yield next(first)
        elif step % LONG_EVERY == LONG_EVERY - 1:
            yield next(longer)
        else:
            yield next(short)


def main() -> None:
    """Train, with periodic checkpoints and probes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decay-from", type=float, default=DECAY_FROM)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint.npz")
    parser.add_argument("--start", type=int, default=0, help="resume --out at this step")
    parser.add_argument("--probe-every", type=int, default=200)
    args = parser.parse_args()
    cfg = model.Config()
    params = model.init(cfg, tokenizer.tokens(), SEED)
    state = optimizer.init(params)
    if args.start:
        params, state = load(args.out)
    print(f"{model.count(params)} weights", flush=True)
    began = time.monotonic()
    for step, batch in enumerate(rows(args.steps)):
        if step < args.start:
            continue
        scale = rate(step, args.steps, args.decay_from)
        pace = optimizer.Pace(jnp.float32(step + 1), jnp.float32(scale * MUON_LR), jnp.float32(scale * ADAM_LR))
        params, state, value = train_step(params, state, batch, pace, cfg)
        if step % 20 == 0:
            spent = time.monotonic() - began
            print(f"step {step} loss {float(value):.4f} rate {scale:.2f} {spent:.0f} s", flush=True)
        if (step + 1) % args.probe_every == 0 or step + 1 == args.steps:
            save(args.out, params, state)
            print(accuracy(params, cfg), flush=True)


if __name__ == "__main__":
    main()
