"""``promptai engine simulate``: a simulated llama-server, for tests and for planning."""

import asyncio

import click
import msgspec

from promptai.engine.simulated import Fault, SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.errors import EngineStartError

_RATE = click.FloatRange(min=0, min_open=True)


@click.command(
    epilog="""\b
Examples:
  promptai engine simulate --prefill-tps 60 --decode-tps 10 --port 9001
  promptai engine simulate --fault cut --after-tokens 20
"""
)
@click.option("--prefill-tps", type=_RATE, default=60.0, show_default=True, help="Prompt tokens per second.")
@click.option("--decode-tps", type=_RATE, default=10.0, show_default=True, help="Tokens per second of a single stream.")
@click.option("--slots", type=click.IntRange(min=1), default=1, show_default=True, help="Number of slots.")
@click.option(
    "--context", type=click.IntRange(min=16), default=8192, show_default=True, help="Context of one slot in tokens."
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=512, show_default=True, help="Maximum prompt tokens of one step."
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=1),
    help="Mean length of an answer.  [default: the request's limit]",
)
@click.option(
    "--host-cache",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Size of the prompt cache in tokens.",
)
@click.option("--model", default="simulated", show_default=True, help="Model name.")
@click.option("--load-s", type=float, default=0.0, show_default=True, help="Simulated loading time in seconds.")
@click.option("--time-scale", type=_RATE, default=1.0, show_default=True, help="Speed-up; 10 is ten times as fast.")
@click.option(
    "--fault",
    "kind",
    type=click.Choice(["refuse", "stall", "cut", "malformed", "error", "die"]),
    help="Fault to inject.",
)
@click.option("--after-tokens", type=click.IntRange(min=0), default=0, help="Tokens sent before the fault.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP port; 0 uses a free one.")
def simulate(*, kind: str | None, after_tokens: int, port: int, **fields: object) -> None:
    """Run a simulated llama-server with chosen rates, until Ctrl-C."""
    config = msgspec.convert(fields, SimulationConfig)
    fault = msgspec.convert({"kind": kind, "after_tokens": after_tokens}, Fault) if kind else None
    asyncio.run(_simulate(config, fault, port))


async def _simulate(config: SimulationConfig, fault: Fault | None, port: int) -> None:
    try:
        async with SimulatedEngine(config, port=port, fault=fault) as simulated:
            click.echo(f"simulated engine on {simulated.base_url}, stop with Ctrl-C")
            await asyncio.Event().wait()
    except OSError as error:
        raise EngineStartError(
            f"cannot listen on port {port}: {error.strerror}", hint="choose another with --port"
        ) from None
