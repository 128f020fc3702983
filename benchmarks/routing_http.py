"""Play the same users over real sockets: our gateway and LiteLLM's proxy, each in front of four new engines.

Part of ``make bench-routing``. Engines, gateway and proxy are processes. Engines and users run ``faster`` times as
fast as a board and its users, so a run takes two minutes. Results are in the board's seconds, so a router's own
milliseconds are multiplied by ``faster``. Time in the engines is therefore shown separately, and only that counts
against other routers; on a busy machine even that is too long.

LiteLLM is not a dependency of the project. It gets a virtual environment in the cache directory, only the engines'
addresses as configuration, and shuffles, as is its default.
"""

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from promptai.engine.client import EngineClient
from promptai.engine.launch import free_port
from promptai.engine.simulator import Sent
from promptai.errors import EngineError, PromptAIError
from promptai.settings import cache_directory
from promptai.wire.openai import Message
from support_routing import Answered, Boards, Exchange, Played, Script, play

PROMPTAI = (sys.executable, "-m", "promptai")
LITELLM = "LiteLLM"
#: The release that was reviewed. Releases have carried malware twice (1.82.7 and 1.82.8; 1.107.0), so never use "the
#: newest", and pass on neither our environment nor our home.
LITELLM_VERSION = "1.108.7"
_START_S = 120.0
_WARM_UP = 16
#: LiteLLM does not start without a key.
_KEY = f"sk-{secrets.token_hex(16)}"


class RunResult(NamedTuple):
    """
    One run.

    Attributes:
        engine_s: Seconds from each request's arrival at its engine to its first token; excludes the router's own time
            and its queue.
        busiest: Requests of the busiest engine, as a multiple of its share.
        cached: Cached share of all prompt tokens.
    """

    played: Played
    engine_s: list[float]
    busiest: float
    cached: float


async def measure(
    router: str, script: Script, boards: Boards, *, faster: float, folder: Path, heard: Callable[[Exchange], None]
) -> RunResult:
    """
    Play the script once.

    Args:
        router: One of our strategies, or ``LITELLM``.
        folder: For logs and settings.
    """
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(_engine(boards, faster)) for _ in range(boards.boards)]
        opened = _litellm(engines, folder) if router == LITELLM else _gateway(router, engines, folder)
        url = await stack.enter_async_context(opened)
        client = await stack.enter_async_context(EngineClient(url, api_key=_KEY if router == LITELLM else None))

        for _ in range(_WARM_UP):  # routers that import lazily have done so
            await _ask(client, [Message("user", "ready")], 1)
        begun = time.monotonic()
        played = await play(
            script, lambda messages: _ask(client, messages, script.max_tokens), faster=faster, heard=heard
        )
        notes = [[one for one in await _notes(engine) if one.t_received >= begun] for engine in engines]
    sent = [one for some in notes for one in some]
    return RunResult(
        played,
        [(one.t_chunks[0] - one.t_received) * faster for one in sent if one.t_chunks],
        max(map(len, notes)) * len(notes) / len(sent),
        sum(one.cached_tokens for one in sent) / sum(one.prompt_tokens for one in sent),
    )


async def _ask(client: EngineClient, messages: list[Message], max_tokens: int) -> Answered:
    body = {"model": "simulated", "messages": msgspec.to_builtins(messages), "max_tokens": max_tokens}
    start, first, texts = time.monotonic(), 0.0, list[str]()
    async with contextlib.aclosing(client.stream_chat(body)) as arrivals:
        async for arrival in arrivals:
            if text := arrival.chunk.content:
                first = first or arrival.t - start
                texts.append(text)
    return Answered("".join(texts), first, len(texts), "")


async def _notes(engine: str) -> list[Sent]:
    async with EngineClient(engine) as client:
        reply = await client.get("/simulated/sent")
    return msgspec.json.decode(reply.body, type=list[Sent]) if reply.status == 200 else []


@contextlib.asynccontextmanager
async def _process(
    *command: str, log: Path | None = None, environ: Mapping[str, str] = os.environ
) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    """Run a child process that ends with the block."""
    with contextlib.ExitStack() as files:
        out = files.enter_context(log.open("wb")) if log is not None else asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT if log is not None else asyncio.subprocess.DEVNULL,
            env=dict(environ),
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.communicate(), 10)
            except TimeoutError:
                process.kill()
                await process.communicate()


@contextlib.asynccontextmanager
async def _engine(boards: Boards, faster: float) -> AsyncGenerator[str, None]:
    config = boards.config
    options = {
        "--prefill-tps": config.prefill_tps,
        "--decode-tps": config.decode_tps,
        "--slots": config.slots,
        "--host-cache": config.host_cache,
        "--answer-tokens": config.answer_tokens,
        "--time-scale": faster,
    }
    words = [str(word) for option in options.items() for word in option]
    async with _process(*PROMPTAI, "engine", "simulate", *words) as process:
        assert process.stdout is not None  # noqa: S101  it is a pipe
        line = (await asyncio.wait_for(process.stdout.readline(), _START_S)).decode()
        yield next(word.rstrip(",") for word in line.split() if word.startswith("http://"))


@contextlib.asynccontextmanager
async def _gateway(strategy: str, engines: list[str], folder: Path) -> AsyncGenerator[str, None]:
    """Run ``promptai serve`` in front of these engines, configured with their addresses only."""
    port = free_port()
    fleet = [word for engine in engines for word in ("--board", engine)]
    command = [*PROMPTAI, "serve", "--quiet", "--port", str(port), "--strategy", strategy, *fleet]
    log = folder / f"{strategy}.log"
    async with _process(*command, log=log) as process:
        url = f"http://127.0.0.1:{port}"
        await _until_it_lists(url, process, log, fleet=len(engines))
        yield url


@contextlib.asynccontextmanager
async def _litellm(engines: list[str], folder: Path) -> AsyncGenerator[str, None]:
    settings, log, port = folder / "litellm.yaml", folder / "litellm.log", free_port()
    entries = [
        f'  - {{model_name: simulated, litellm_params: {{model: openai/simulated, api_base: "{url}/v1", api_key: x}}}}'
        for url in engines
    ]
    settings.write_text("\n".join(["model_list:", *entries, ""]))
    command = [str(_environment() / "bin" / "litellm"), "--config", str(settings), "--host", "127.0.0.1"]
    environ = {
        "PATH": os.defpath,
        "HOME": str(folder),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MASTER_KEY": _KEY,
    }
    command += ["--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    async with _process(*command, log=log, environ=environ) as process:
        url = f"http://127.0.0.1:{port}"
        await _until_it_lists(url, process, log, key=_KEY)
        yield url


async def _until_it_lists(
    url: str, process: asyncio.subprocess.Process, log: Path, *, key: str | None = None, fleet: int = 0
) -> None:
    """Wait until the router lists the model and, for our gateway, until all boards are ready."""
    limit = time.monotonic() + _START_S
    async with EngineClient(url, api_key=key) as client:
        while time.monotonic() < limit and process.returncode is None:
            with contextlib.suppress(EngineError):
                ready = "simulated" in await client.models()
                if ready and (not fleet or (await client.get("/api/fleet")).body.count(b'"ready"') >= fleet):
                    return
            await asyncio.sleep(0.3)
    last = log.read_text(errors="replace").strip().splitlines()[-3:]
    raise PromptAIError(f"{log.stem} did not start: {' / '.join(last)}", hint="its log is gone with the run")


def _environment() -> Path:
    return cache_directory() / "benchmarks" / f"litellm-{LITELLM_VERSION}"


def install_litellm() -> bool:
    """Create LiteLLM's environment unless it exists; return whether it exists."""
    folder = _environment()
    python, wanted = folder / "bin" / "python", f"litellm[proxy]=={LITELLM_VERSION}"
    done = folder / ".installed"
    try:
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted]
            subprocess.run(pip, check=True, capture_output=True)
            done.touch()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True
