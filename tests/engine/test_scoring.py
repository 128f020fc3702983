import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest

from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary
from promptai.engine.scoring import continuation_logprobs
from promptai.errors import EngineProtocolError
from support_engine import answer, raw_server

VOCABULARY = 512


def score(*answers: bytes, context: Sequence[int] = (1, 2), continuation: Sequence[int] = (7, 8)) -> list[float]:
    """Score against a server that sends these responses."""
    return score_and_listen(*answers, context=context, continuation=continuation)[0]


def score_and_listen(
    *answers: bytes, context: Sequence[int] = (1, 2), continuation: Sequence[int] = (7, 8)
) -> tuple[list[float], list[dict[str, object]]]:
    """Score, and return the requests that the server received, too."""

    async def play() -> tuple[list[float], list[dict[str, object]]]:
        async with raw_server(*answers) as server, EngineClient(server.url) as client:
            found = await continuation_logprobs(client, context, continuation)
            return found, [json.loads(request.partition(b"\r\n\r\n")[2]) for request in server.requests]

    return asyncio.run(play())


def token(number: int, logprob: float) -> bytes:
    """The response of a server that was forced to generate this token."""
    return answer(
        "200 OK", b'{"content": "x", "completion_probabilities": [{"id": %d, "logprob": %f}]}' % (number, logprob)
    )


def test_rejects_an_empty_context() -> None:
    """A begin token is the minimum."""
    with pytest.raises(ValueError, match="at least one token"):
        score(token(7, -1.0), context=())


@pytest.mark.parametrize(
    "reply",
    [answer("200 OK", b'{"content": "x"}'), token(9, -1.0)],
    ids=["no-probabilities", "another-token"],
)
def test_rejects_a_server_that_cannot_be_forced(reply: bytes) -> None:
    """The probability of another token is a wrong answer, not a small error."""
    with pytest.raises(EngineProtocolError, match="did not report the probability"):
        score(reply)


def test_forces_each_token_after_its_predecessors() -> None:
    """One request per token, greedy, with the cache on."""
    found, asked = score_and_listen(token(7, -1.5), token(8, -0.25))

    assert found == [-1.5, -0.25]
    assert [(body["prompt"], body["logit_bias"]) for body in asked] == [
        ([1, 2], [[7, 1000.0]]),
        ([1, 2, 7], [[8, 1000.0]]),
    ]
    assert {(1, 0, 1, True, False)} == {
        (body["n_predict"], body["temperature"], body["n_probs"], body["cache_prompt"], body["stream"])
        for body in asked
    }
    assert score(token(7, -1.0), continuation=()) == []


@pytest.mark.real
@pytest.mark.parametrize(
    "continuation",
    [[108, 300, 111], [108, 257], [108, 195, 188, 111]],
    ids=["letters", "end-of-text", "a-letter-of-two-tokens"],
)
def test_scores_match_the_real_engines_softmax(
    tmp_path: Path, small_model: Path, embedded: EngineBinary, continuation: list[int]
) -> None:
    """Each token against the full distribution, which sums to one; half a character is a token like any other."""
    flags = EngineFlags(model=str(small_model), port=free_port(), threads=1, context=256)
    context = [104, 101]

    async def play() -> tuple[list[float], list[dict[int, float]]]:
        async with RunningEngine(embedded, flags, log=tmp_path / "engine.log") as engine:
            whole = []
            for position in range(len(continuation)):
                # A letter is forced because llama-server reports nothing for a token that ends inside a character.
                body: dict[str, object] = {"n_predict": 1, "n_probs": VOCABULARY, "logit_bias": [[108, 1000]]}
                body["prompt"] = context + continuation[:position]
                async with aiohttp.request("POST", f"{engine.base_url}/completion", json=body) as response:
                    top = (await response.json())["completion_probabilities"][0]["top_logprobs"]
                whole.append({entry["id"]: entry["logprob"] for entry in top})
            async with EngineClient(engine.base_url) as client:
                return await continuation_logprobs(client, context, continuation), whole

    scored, whole = asyncio.run(play())

    assert [sum(map(math.exp, softmax.values())) for softmax in whole] == pytest.approx([1.0] * len(whole), abs=1e-4)
    expected = [softmax[target] for softmax, target in zip(whole, continuation, strict=True)]
    assert scored == pytest.approx(expected, abs=1e-4)
