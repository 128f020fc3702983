import asyncio
import json
import math
from collections.abc import Sequence

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
    """What comes of a server that answers this."""
    return score_and_listen(*answers, context=context, continuation=continuation)[0]


def score_and_listen(
    *answers: bytes, context: Sequence[int] = (1, 2), continuation: Sequence[int] = (7, 8)
) -> tuple[list[float], list[dict[str, object]]]:
    """The same, and what it was asked."""

    async def play() -> tuple[list[float], list[dict[str, object]]]:
        async with raw_server(*answers) as server, EngineClient(server.url) as client:
            found = await continuation_logprobs(client, context, continuation)
            return found, [json.loads(request.partition(b"\r\n\r\n")[2]) for request in server.requests]

    return asyncio.run(play())


def token(number: int, logprob: float) -> bytes:
    """The answer of a server that was made to say this token."""
    return answer(
        "200 OK", b'{"content": "x", "completion_probabilities": [{"id": %d, "logprob": %f}]}' % (number, logprob)
    )


def test_nothing_to_condition_on_is_an_error() -> None:
    """A begin token at least."""
    with pytest.raises(ValueError, match="at least one token"):
        score(token(7, -1.0), context=())


@pytest.mark.parametrize(
    "reply",
    [answer("200 OK", b'{"content": "x"}'), token(9, -1.0)],
    ids=["no-probabilities", "another-token"],
)
def test_a_server_that_cannot_be_forced_gives_no_score(reply: bytes) -> None:
    """The probability of another token is not a small error but a wrong answer."""
    with pytest.raises(EngineProtocolError, match="did not report the probability"):
        score(reply)


def test_each_token_is_forced_after_those_before_it() -> None:
    """One request a token, greedy, with the cache on."""
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
def test_the_real_engine_gives_the_probabilities_of_its_whole_softmax(
    tmp_path_factory: pytest.TempPathFactory, small_model: object, embedded: EngineBinary
) -> None:
    """Each token against the full distribution, which sums up to one."""
    flags = EngineFlags(model=str(small_model), port=free_port(), threads=1, context=256)
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    context, continuation = [104, 101], [108, 300, 111]

    async def play() -> tuple[list[float], list[dict[int, float]]]:
        async with RunningEngine(embedded, flags, log=log) as engine:
            async with EngineClient(engine.base_url) as client:
                scored = await continuation_logprobs(client, context, continuation)
            whole = []
            for position in range(len(continuation)):
                body = {"prompt": context + continuation[:position], "n_predict": 1, "n_probs": VOCABULARY}
                async with aiohttp.request("POST", f"{engine.base_url}/completion", json=body) as response:
                    top = (await response.json())["completion_probabilities"][0]["top_logprobs"]
                whole.append({entry["id"]: entry["logprob"] for entry in top})
            return scored, whole

    scored, whole = asyncio.run(play())

    assert pytest.approx([sum(map(math.exp, softmax.values())) for softmax in whole], abs=1e-4) == [1.0] * 3
    expected = [softmax[target] for softmax, target in zip(whole, continuation, strict=True)]
    assert expected == pytest.approx(scored, abs=1e-4)
