"""What the gateway does with requests of keys that it does not take: it says so, counts them, and writes them down."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from promptai.gateway.auth import Caller, Guard
from promptai.gateway.errors import ApiError
from promptai.gateway.keys import KeyStore, Scope
from promptai.gateway.limits import KeyLimits
from support_clock import run_virtually
from support_gateway import Answer
from support_site import CHAT, EMBED, FAST, TEXT, Door, asking, one, visit

WRONG = "pk-wrong-secret-of-somebody"


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    """A store without keys."""
    return KeyStore(tmp_path / "keys.json")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def access(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the access log, without the ids of requests and without times and tokens."""
    lines = [record.getMessage() for record in caplog.records if record.name == "promptai.access"]
    return [line.split(maxsplit=1)[1].partition(" queue=")[0] for line in lines]


async def counted(at: Door, **fields: Any) -> list[str]:
    """What is counted of requests."""
    page = (await at.ask("/metrics", **fields)).body.decode()
    return [line for line in page.splitlines() if line.startswith("promptai_requests_total{")]


def once(status: int) -> list[str]:
    """One request that nobody took, and no other."""
    return [f'promptai_requests_total{{model="unknown",replica="unknown",status="{status}"}} 1.0']


def line(key: str, status: int, path: str = CHAT) -> str:
    return f"{key} {path} model=- replica=- status={status}"


@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED])
@pytest.mark.parametrize("header", [{}, bearer(WRONG), {"x-api-key": WRONG}], ids=["none", "bearer", "header"])
def test_a_request_without_a_good_key_is_counted_and_logged_without_what_it_had_instead(
    store: KeyStore, path: str, header: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, admin = store.add("admin", scopes=("admin",))

    async def use(at: Door) -> tuple[int, list[str]]:
        return (await at.chat(path, headers=header)).status, await counted(at, headers=bearer(admin))

    assert visit(one(), use, guard=Guard(store, open=False)) == (401, once(401))
    assert access(caplog) == [line("-", 401, path)]
    assert WRONG not in caplog.text


def test_a_request_whose_key_may_not_infer_is_logged_with_the_id_of_the_key(
    store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scopes: tuple[Scope, ...] = ("metrics",)
    key, secret = store.add("prometheus", scopes=scopes)

    async def use(at: Door) -> tuple[int, list[str]]:
        headers = bearer(secret)
        return (await at.chat(headers=headers)).status, await counted(at, headers=headers)

    assert visit(one(), use, guard=Guard(store, open=False)) == (403, once(403))
    assert access(caplog) == [line(key.id, 403)]
    assert secret not in caplog.text


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}], ids=str)
def test_a_page_from_elsewhere_that_is_refused_is_counted_and_logged(
    headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def use(at: Door) -> tuple[int, list[str]]:
        return (await at.chat(headers=headers)).status, await counted(at)

    assert visit(one(), use) == (403, once(403))
    assert access(caplog) == [line("-", 403)]


@pytest.mark.parametrize(("debt", "told"), [(0, "1"), (2, "3"), (1.4, "3"), (-0.75, "1")])
def test_the_hint_and_the_header_tell_the_same_time(debt: float, told: str) -> None:
    """Of a key that gets a token a second."""

    async def play() -> ApiError:
        guard, caller = Guard(None, open=True), Caller(limits=KeyLimits(tokens_per_min=60))
        guard.charge(caller, 60)
        guard.meter._tokens["local"].left -= debt
        with pytest.raises(ApiError) as caught:
            guard.reserve(caller, 1)
        return caught.value

    refused = run_virtually(play())

    assert refused.response().headers["Retry-After"] == told
    assert refused.hint == f"try again in {told} s"


def test_a_request_beyond_a_limit_is_logged_with_the_id_of_the_key(
    store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    key, secret = store.add("a", limits=KeyLimits(requests_per_min=1))

    async def use(at: Door) -> list[int]:
        return [(await at.chat(headers=bearer(secret))).status for _ in range(3)]

    assert visit(one(FAST), use, guard=Guard(store, open=False)) == [200, 429, 429]
    assert access(caplog)[1:] == [line(key.id, 429)] * 2


def test_a_request_that_comes_while_it_drains_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def use(at: Door) -> tuple[int, list[str]]:
        await at.gateway.drain(1)
        return (await at.chat()).status, await counted(at)

    assert visit(one(), use) == (503, once(503))
    assert access(caplog) == [line("local", 503)]


def test_what_is_no_inference_or_was_accepted_is_not_counted_as_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def use(at: Door) -> list[str]:
        for path in ("/nowhere", CHAT, "/v1/models/none"):
            assert (await at.ask(path)).status in {404, 405}
        assert (await at.ask("/api/decide", "POST", json={"model": "none"})).status == 404
        assert (await at.chat(messages=[{"role": "user", "content": "cell " * 5000}])).status == 400
        return await counted(at)

    found = visit(one(msgspec.structs.replace(FAST, context=4800)), use)

    assert found == ['promptai_requests_total{model="yi",replica="a",status="400"} 1.0']
    assert len(access(caplog)) == 1


def limited(store: KeyStore, tokens_per_min: int) -> dict[str, str]:
    return bearer(store.add("a", limits=KeyLimits(tokens_per_min=tokens_per_min))[1])


def test_of_many_requests_at_once_only_so_many_are_taken_as_tokens_are_left(store: KeyStore) -> None:
    headers = limited(store, 100)

    async def use(at: Door) -> list[Answer]:
        return await asyncio.gather(
            *[at.chat(TEXT, prompt=[7] * 30, max_tokens=20, headers=headers) for _ in range(40)]
        )

    answers = visit(one(), use, guard=Guard(store, open=False))

    assert sorted(answer.status for answer in answers) == [200] * 2 + [429] * 38
    told = {answer.error["message"] for answer in answers if answer.status == 429}
    assert told == {"this API key is limited to 100 tokens a minute (try again in 1 s)"}


def test_of_many_requests_whose_bodies_come_late_no_more_are_taken(store: KeyStore) -> None:
    """All of them are let in before the first one is accepted."""
    headers = limited(store, 100)
    body = msgspec.json.encode(asking(TEXT, {"prompt": [7] * 30, "max_tokens": 70}))
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def use(at: Door) -> list[bytes]:
        parts = (f"{head}{lines}\r\n".encode(), body)
        return await asyncio.gather(*[at.raw(*parts, pause_s=2.0) for _ in range(10)])

    answers = visit(one(FAST), use, guard=Guard(store, open=False))

    assert sorted(answer.split()[1] for answer in answers) == [b"200"] + [b"429"] * 9


def test_tokens_that_were_reserved_and_not_used_are_there_again(store: KeyStore) -> None:
    """Of an answer that is expected to have 200 tokens, some 20 are generated; meanwhile nothing is left."""
    headers = limited(store, 150)

    async def use(at: Door) -> list[int]:
        leaving = asyncio.create_task(at.stream(max_tokens=5000, headers=headers))
        await asyncio.sleep(2)
        seen = [(await at.chat(headers=headers)).status]
        leaving.cancel()
        await asyncio.wait([leaving])
        await asyncio.sleep(0.5)
        return [*seen, (await at.chat(headers=headers)).status]

    assert visit(one(), use, guard=Guard(store, open=False)) == [429, 200]


def test_what_was_never_sent_gives_back_all_that_was_reserved(store: KeyStore) -> None:
    headers = {**limited(store, 1000), "x-promptai-deadline": "1s"}
    _, other = store.add("b")

    async def use(at: Door) -> list[str]:
        async def code() -> str:
            return str((await at.chat(TEXT, prompt=[7] * 900, max_tokens=600, headers=headers)).error["code"])

        busy = asyncio.create_task(at.chat(max_tokens=100, headers=bearer(other)))
        await asyncio.sleep(0.5)
        waiting = asyncio.create_task(code())
        await asyncio.sleep(0.5)
        seen = [await code(), await waiting, await code()]
        assert (await busy).status == 200
        return seen

    assert visit(one(), use, guard=Guard(store, open=False)) == ["rate_limit_exceeded", "saturated", "saturated"]


def test_an_open_gateway_that_had_a_key_stays_closed_when_the_file_goes(store: KeyStore) -> None:
    async def use(at: Door) -> list[tuple[int, str | None]]:
        seen = [await at.ask("/api/queue")]
        _, secret = KeyStore(store.path).add("first", scopes=("admin",))
        for happens in (lambda: None, store.path.unlink, lambda: KeyStore(store.path).add("second")):
            happens()
            await asyncio.sleep(1.1)
            seen += [await at.ask("/api/queue"), await at.ask("/api/queue", headers=bearer(secret))]
        return [(answer.status, None if answer.status == 200 else str(answer.error["code"])) for answer in seen]

    no_key, bad_key = (401, "missing_api_key"), (401, "invalid_api_key")
    assert visit(one(), use, guard=Guard(store, open=True)) == [
        *((200, None), no_key, (200, None)),
        *(no_key, bad_key),
        *(no_key, bad_key),
    ]
