"""Executables that look like a llama-server and are the simulated engine, at speeds that a test chooses."""

import sys
from pathlib import Path

_TEXT = """#!{python}
import sys

if "--port" not in sys.argv:
    print("" if "--help" in sys.argv else "build 7 (abc) with cc\\nsystem_info: CPU : SSE3 = 1 |")
    sys.exit(1)
if {breaks}:
    sys.exit("error: invalid argument: --cache-ram")
import asyncio
from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig


async def main():
    config = SimulationConfig(prefill_tps={prefill}, decode_tps={decode})
    async with SimulatedEngine(config, port=int(sys.argv[sys.argv.index("--port") + 1])):
        await asyncio.Event().wait()


asyncio.run(main())
"""


def write_fake_engine(path: Path, *, prefill: float, decode: float, breaks: bool = False) -> Path:
    """A llama-server of these rates; one that breaks ends as soon as it is to serve a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_TEXT.format(python=sys.executable, prefill=prefill, decode=decode, breaks=breaks))
    path.chmod(0o755)
    return path
