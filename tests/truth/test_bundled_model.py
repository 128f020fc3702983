"""The bundled model as a canary: these tests fail with a broken engine, tokenizer, template or scorer."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import locate
from promptai.engine.scoring import continuation_logprobs
from promptai.models.bundled import bundled_model
from promptai.models.gguf import read_header

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "training" / "heldout-questions.jsonl"
PRONOUNS = ROOT / "src" / "promptai" / "bench" / "data" / "edge-pronouns.jsonl"
CARD = ROOT / "docs" / "concepts" / "promptai-tiny.md"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@asynccontextmanager
async def tiny(log: Path) -> AsyncIterator[EngineClient]:
    flags = EngineFlags(model=str(bundled_model()), port=free_port(), threads=1, context=4096)
    async with RunningEngine(locate(), flags, log=log) as engine, EngineClient(engine.base_url) as client:
        yield client


def test_is_small_and_has_the_checksum_of_its_card() -> None:
    data = bundled_model().read_bytes()

    assert len(data) <= 5_000_000
    assert hashlib.sha256(data).hexdigest() in CARD.read_text()


def test_the_header_describes_the_model() -> None:
    header = read_header(bundled_model())

    assert header.architecture == "llama"
    assert header.name == "promptai-tiny"
    assert 1_000_000 < header.parameters < 5_000_000
    assert 2048 <= (header.vocabulary or 0) <= 4096
    assert header.chat_template is not None
    assert not header.synthetic


async def answer(client: EngineClient, messages: list[dict[str, str]]) -> str:
    """The greedy answer; empty unless it ends with a stop token."""
    body = {"messages": messages, "max_tokens": 32, "temperature": 0, "top_k": 1, "samplers": ["top_k"]}
    chunks = [arrival.chunk async for arrival in client.stream_chat(body)]
    ended = [reason for chunk in chunks for reason in chunk.finish_reasons]
    return "".join(chunk.content for chunk in chunks).strip() if ended == ["stop"] else ""


def test_answers_90_percent_of_200_held_out_questions_exactly(tmp_path: Path) -> None:
    async def score() -> list[bool]:
        async with tiny(tmp_path / "engine.log") as client:
            return [await answer(client, item["messages"]) == item["answer"] for item in read(QUESTIONS)]

    right = asyncio.run(score())

    assert len(right) == 200
    assert sum(right) >= 180


async def likelihood(client: EngineClient, item: dict[str, Any], option: str) -> float:
    """Log-likelihood of the text after the blank, with ``option`` in the blank."""
    before, after = item["sentence"].split("_")
    head = await client.tokenize(before + option, add_special=True)
    whole = await client.tokenize(before + option + after, add_special=True)
    assert whole[: len(head)] == head, item["id"]
    return sum(await continuation_logprobs(client, head, whole[len(head) :]))


def test_resolves_90_percent_of_held_out_pronouns_by_likelihood(tmp_path: Path) -> None:
    """Every third pair of twins, so that both answers and both positions occur equally often."""
    pairs = sorted({item["pair"] for item in read(PRONOUNS)})[::3]
    items = [item for item in read(PRONOUNS) if item["pair"] in pairs]

    async def score() -> list[bool]:
        async with tiny(tmp_path / "engine.log") as client:
            return [
                (await likelihood(client, item, item["option1"]) > await likelihood(client, item, item["option2"]))
                == (item["answer"] == "1")
                for item in items
            ]

    right = asyncio.run(score())

    assert len(right) >= 100
    assert sum(item["answer"] == "1" for item in items) * 2 == len(items)
    assert sum(right) >= 0.9 * len(right)


def test_a_trailing_assistant_message_is_continued(tmp_path: Path) -> None:
    """The answer continues after its first word, where it was cut, and repeats nothing."""
    item = read(QUESTIONS)[0]

    async def play() -> tuple[str, str]:
        async with tiny(tmp_path / "engine.log") as client:
            whole = await answer(client, item["messages"])
            start = whole.partition(" ")[0]
            rest = await answer(client, [*item["messages"], {"role": "assistant", "content": start}])
            return whole, f"{start} {rest}"

    whole, joined = asyncio.run(play())

    assert " " in whole
    assert whole == joined
