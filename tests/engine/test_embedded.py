"""The wheel's real llama.cpp, on one thread, with a small model of random weights."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from promptai.engine.client import Arrival, EngineClient
from promptai.engine.embedded import EXIT_NO_WHEEL
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineRefusedError
from promptai.wire.llamaserver import GenerationSettings, Slot, Timings
from promptai.wire.openai import PromptTokensDetails, Usage
from support_engine import chat, text_of

pytestmark = pytest.mark.real

PROMPT = "is cell 12 up?"
#: The model has no template of its own, so that llama.cpp falls back to ChatML, one token a byte.
RENDERED = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"

Use = Callable[[EngineClient], Awaitable[Any]]


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, embedded: EngineBinary
) -> Iterator[RunningEngine]:
    """One engine for all tests: two slots share 512 tokens of context; the file is read, not mapped."""
    flags = EngineFlags(model=str(small_model), port=free_port(), threads=1, context=512, slots=2, mmap=False)
    running = RunningEngine(embedded, flags, log=tmp_path_factory.mktemp("engine") / "engine.log")
    asyncio.run(running.__aenter__())
    yield running
    running.stop()


def ask(engine: RunningEngine, use: Use) -> Any:
    """Run ``use`` with a client of the engine."""

    async def play() -> Any:
        async with EngineClient(engine.base_url) as client:
            return await use(client)

    return asyncio.run(play())


def greedy(engine: RunningEngine, *, tokens: int = 8, cache: bool = False, prompt: str = PROMPT) -> list[Arrival]:
    """Return a greedy answer of exactly that many tokens."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": cache,
    }
    found: list[Arrival] = ask(engine, lambda client: chat(client, body))
    return found


def account(arrivals: list[Arrival]) -> tuple[Usage, Timings]:
    """Return usage and timings of the last chunk."""
    last = arrivals[-1].chunk
    assert last.usage is not None
    assert last.timings is not None
    return last.usage, last.timings


def test_refuses_a_prompt_longer_than_a_slot(engine: RunningEngine) -> None:
    """With llama-server's error type; the engine continues."""
    with pytest.raises(EngineRefusedError, match="exceeds the available context size") as caught:
        greedy(engine, prompt="x" * 600)

    assert (caught.value.status, caught.value.kind) == (400, "exceed_context_size_error")
    assert ask(engine, lambda client: client.healthy())


def test_exits_with_its_own_code_without_the_wheel(tmp_path: Path) -> None:
    """The last line of the log is the reason; here another module shadows the wheel."""
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")

    done = subprocess.run(
        [sys.executable, "-m", "promptai.engine.embedded", "--probe"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    expected = (EXIT_NO_WHEEL, "cannot import xllamacpp: libgomp.so.1: cannot open shared object file\n")
    assert expected == (done.returncode, done.stderr)


def test_reports_its_flags(engine: RunningEngine) -> None:
    """The slots share the context, and the name is never a path."""
    props = ask(engine, lambda client: client.props())

    assert (2, GenerationSettings(256), "small") == (
        props.total_slots,
        props.default_generation_settings,
        props.model_alias,
    )
    assert [Slot(0, n_ctx=256), Slot(1, n_ctx=256)] == ask(engine, lambda client: client.slots())
    assert ask(engine, lambda client: client.models()) == ["small"]
    assert "llamacpp:prompt_tokens_total" in ask(engine, lambda client: client.metrics())


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_maps_or_reads_the_file_as_configured(
    tmp_path: Path,
    small_model: Path,
    embedded: EngineBinary,
    mmap: bool,  # noqa: FBT001  a table
) -> None:
    """This decides whether the weights are page cache that the kernel may drop."""
    flags = EngineFlags(model=str(small_model), port=free_port(), threads=1, context=256, mmap=mmap)

    async def play() -> str:
        async with RunningEngine(embedded, flags, log=tmp_path / "engine.log") as running:
            return Path(f"/proc/{running.pid}/maps").read_text()

    assert (str(small_model) in asyncio.run(play())) is mmap


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", []), ("hi", [104, 105]), ("ü", [195, 188]), ("a</s>b", [97, 257, 98])],
    ids=["empty", "letters", "two-bytes", "special"],
)
def test_tokenizes_with_the_models_vocabulary(engine: RunningEngine, text: str, tokens: list[int]) -> None:
    """One byte per token, and special tokens by name."""
    assert tokens == ask(engine, lambda client: client.tokenize(text))


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_counts_tokens_exactly(engine: RunningEngine, tokens: int) -> None:
    """Usage, timings, the tokenizer and the number of bytes agree."""
    arrivals = greedy(engine, tokens=tokens)
    usage, timings = account(arrivals)

    assert Usage(len(RENDERED), tokens, PromptTokensDetails(0)) == usage
    assert len(RENDERED) == len(ask(engine, lambda client: client.tokenize(RENDERED)))
    assert (0, len(RENDERED), tokens) == (timings.cache_n, timings.prompt_n, timings.predicted_n)
    assert timings.prompt_ms > 0
    assert timings.predicted_ms >= 0
    assert arrivals[-2].chunk.finish_reasons == ["length"]


def test_does_not_use_a_cache_that_is_off(engine: RunningEngine) -> None:
    """With the cache on, all but the last tokens of a repeated prompt come from it."""
    assert [account(greedy(engine))[1].cache_n for _ in range(3)] == [0, 0, 0]

    greedy(engine, cache=True)
    usage, timings = account(greedy(engine, cache=True))

    assert timings.cache_n is not None
    assert len(RENDERED) // 2 < timings.cache_n < len(RENDERED)
    assert usage.prompt_tokens_details == PromptTokensDetails(timings.cache_n)
    assert len(RENDERED) == timings.cache_n + timings.prompt_n


def test_greedy_runs_return_the_same_text(engine: RunningEngine) -> None:
    """And another prompt returns another text."""
    one, two, other = (text_of(greedy(engine, tokens=40, prompt=prompt)) for prompt in (PROMPT, PROMPT, "and now?"))

    assert one == two
    assert one != other


def test_arrival_times_never_decrease(engine: RunningEngine) -> None:
    """On the monotonic clock, chunk by chunk."""
    times = [arrival.t for arrival in greedy(engine, tokens=40)]

    assert times == sorted(times)


def test_exits_at_unknown_flags(small_model: Path) -> None:
    """Before it loads a model with other settings than intended."""
    flags = msgspec.to_builtins(EngineFlags(model=str(small_model), port=1, threads=1, context=1)) | {"gpu_layers": 1}

    done = subprocess.run(
        [sys.executable, "-m", "promptai.engine.embedded", msgspec.json.encode(flags).decode()],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert done.returncode != 0
    assert "unknown field `gpu_layers`" in done.stderr
