"""The processes of ``gateway_cost.py`` (engine, gateway, LiteLLM's proxy and client), and their CPU time and memory.

LiteLLM is not a dependency of the project. It gets a virtual environment in the cache directory (``routing_http``)
and only the engines' addresses as configuration.
"""

import asyncio
import contextlib
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from benchmarks.gateway_client import LoadPlan, Result
from benchmarks.routing_http import LITELLM_VERSION

from promptai.engine.launch import free_port
from promptai.errors import PromptAIError
from promptai.settings import cache_directory

_HERE = Path(__file__).parent
_START_S, _END_S, _CLIENT_S = 120.0, 5.0, 900.0
#: LiteLLM does not start without a key.
_KEY = f"sk-{secrets.token_hex(32)}"
_TICK = os.sysconf("SC_CLK_TCK")


class Running(NamedTuple):
    """A running server process."""

    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds used so far, including all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def memory(self) -> tuple[int, int]:
        """Resident bytes now, and their peak."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
        return int(found["VmRSS"].split()[0]) * 1024, int(found["VmHWM"].split()[0]) * 1024


@contextlib.asynccontextmanager
async def engine() -> AsyncGenerator[Running, None]:
    """Run the engine without a model."""
    async with _process(sys.executable, str(_HERE / "gateway_engine.py")) as process:
        yield Running(await _line(process, "http"), process.pid)


@contextlib.asynccontextmanager
async def gateway(boards: Sequence[str], folder: Path) -> AsyncGenerator[Running, None]:
    """Run ``promptai serve`` in front of some engines, as users start it, and wait until it has found all of them."""
    options = [word for url in boards for word in ("--board", url)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PROMPTAI_")}
    homes = {"XDG_CONFIG_HOME": str(folder / "config"), "XDG_DATA_HOME": str(folder / "data")}
    command = (sys.executable, "-m", "promptai", "serve", "--quiet", "--port", "0", *options)
    async with _process(*command, environ=clean | homes, cwd=folder) as process:
        url = (await _line(process, "serving at ")).removeprefix("serving at ").removesuffix("/v1")
        await _until_it_answers(url, "/readyz", process)
        yield Running(url, process.pid)


@contextlib.asynccontextmanager
async def litellm(models: dict[str, str], folder: Path) -> AsyncGenerator[Running, None]:
    """Run LiteLLM's proxy with one worker, as in its documentation; ``models`` maps model names to engines."""
    settings, port = folder / "litellm.yaml", free_port()
    entries = [
        f'  - {{model_name: {name}, litellm_params: {{model: openai/{name}, api_base: "{url}/v1", api_key: none}}}}'
        for name, url in models.items()
    ]
    settings.write_text("\n".join(["model_list:", *entries, ""]))
    binary = cache_directory() / "benchmarks" / f"litellm-{LITELLM_VERSION}" / "bin" / "litellm"
    environ = {"PATH": os.defpath, "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environ["LITELLM_MASTER_KEY"] = _KEY
    command = [str(binary), "--config", str(settings), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", "1", "--telemetry", "False"]
    async with _process(*command, environ=environ, cwd=folder) as process:
        url = f"http://127.0.0.1:{port}"
        await _until_it_answers(url, "/health/readiness", process)
        yield Running(url, process.pid)


async def client(plan: LoadPlan) -> Result:
    """Carry out a plan in a separate process."""
    async with _process(sys.executable, str(_HERE / "gateway_client.py")) as process:
        async with asyncio.timeout(_CLIENT_S):
            output, _ = await process.communicate(msgspec.json.encode(msgspec.structs.replace(plan, key=_KEY)))
        if process.returncode != 0:
            raise PromptAIError("the client of the benchmark failed", hint="its traceback is above")
        return msgspec.json.decode(output, type=Result)


@contextlib.asynccontextmanager
async def _process(
    *command: str, environ: dict[str, str] | None = None, cwd: Path | None = None
) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    quiet = command[0] != sys.executable  # LiteLLM is verbose; our own processes print only errors
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL if quiet else asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL if quiet else None,
        env=environ,
        cwd=cwd,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _line(process: asyncio.subprocess.Process, start: str) -> str:
    """The first line of output that begins with ``start``."""
    assert process.stdout is not None  # noqa: S101  for the types
    async with asyncio.timeout(_START_S):
        while line := (await process.stdout.readline()).decode():
            if line.startswith(start):
                return line.strip()
    raise PromptAIError("a process of the benchmark ended during its start", hint="its output is above")


async def _until_it_answers(url: str, path: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(_START_S):
        while process.returncode is None:
            if await asyncio.to_thread(_answers, f"{url}{path}"):
                return
            await asyncio.sleep(0.2)
    raise PromptAIError(f"{url} ended before it answered", hint="start it by hand to see why")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310  loopback
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
