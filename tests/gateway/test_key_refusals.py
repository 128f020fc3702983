"""Requests refused because of their key are counted and logged, and release the tokens they reserved."""

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

WRONG = "pk-wrong-secret"


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    """A store without keys."""
    return KeyStore(tmp_path / "keys.json")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def access(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of the access log without request ids, times and tokens."""
    lines = [record.getMessage() for record in caplog.records if record.name == "promptai.access"]
    return [line.split(maxsplit=1)[1].partition(" queue=")[0] for line in lines]


async def request_counters(at: Door, **fields: Any) -> list[str]:
    """Return the series of promptai_requests_total."""
    page = (await at.ask("/metrics", **fields)).body.decode()
    return [line for line in page.splitlines() if line.startswith("promptai_requests_total{")]


def once(status: int) -> list[str]:
    """Return the series of one refused request."""
    return [f'promptai_requests_total{{model="unknown",replica="unknown",status="{status}"}} 1.0']


def access_line(key: str, status: int, path: str = CHAT) -> str:
    return f"{key} {path} model=- replica=- status={status}"


@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED])
@pytest.mark.parametrize("header", [{}, bearer(WRONG), {"x-api-key": WRONG}], ids=["none", "bearer", "header"])
def test_a_request_without_a_valid_key_is_counted_and_logged_without_the_key(
    store: KeyStore, path: str, header: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, admin = store.add("admin", scopes=("admin",))

    async def use(at: Door) -> tuple[int, list[str]]:
        return (await at.chat(path, headers=header)).status, await request_counters(at, headers=bearer(admin))

    assert visit(one(), use, guard=Guard(store, open=False)) == (401, once(401))
    assert access(caplog) == [access_line("-", 401, path)]
    assert WRONG not in caplog.text


def test_a_request_without_the_infer_scope_is_logged_with_its_key_id(
    store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scopes: tuple[Scope, ...] = ("metrics",)
    key, secret = store.add("prometheus", scopes=scopes)

    async def use(at: Door) -> tuple[int, list[str]]:
        headers = bearer(secret)
        return (await at.chat(headers=headers)).status, await request_counters(at, headers=headers)

    assert visit(one(), use, guard=Guard(store, open=False)) == (403, once(403))
    assert access(caplog) == [access_line(key.id, 403)]
    assert secret not in caplog.text


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}], ids=str)
def test_a_refused_foreign_page_is_counted_and_logged(
    headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def use(at: Door) -> tuple[int, list[str]]:
        return (await at.chat(headers=headers)).status, await request_counters(at)

    assert visit(one(), use) == (403, once(403))
    assert access(caplog) == [access_line("-", 403)]


@pytest.mark.parametrize(("debt", "expected"), [(0, "1"), (2, "3"), (1.4, "3"), (-0.75, "1")])
def test_hint_and_retry_after_agree(debt: float, expected: str) -> None:
    """For a key with one token per second."""

    async def play() -> ApiError:
        guard, caller = Guard(None, open=True), Caller(limits=KeyLimits(tokens_per_min=60))
        guard.charge(caller, 60)
        guard.meter._tokens["local"].left -= debt
        with pytest.raises(ApiError) as caught:
            guard.reserve(caller, 1)
        return caught.value

    refused = run_virtually(play())

    assert refused.response().headers["Retry-After"] == expected
    assert refused.hint == f"try again in {expected} s"


def test_a_request_beyond_a_limit_is_logged_with_its_key_id(store: KeyStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    key, secret = store.add("a", limits=KeyLimits(requests_per_min=1))

    async def use(at: Door) -> list[int]:
        return [(await at.chat(headers=bearer(secret))).status for _ in range(3)]

    assert visit(one(FAST), use, guard=Guard(store, open=False)) == [200, 429, 429]
    assert access(caplog)[1:] == [access_line(key.id, 429)] * 2


def test_a_request_refused_while_draining_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def use(at: Door) -> tuple[int, list[str]]:
        await at.gateway.drain(1)
        return (await at.chat()).status, await request_counters(at)

    assert visit(one(), use) == (503, once(503))
    assert access(caplog) == [access_line("local", 503)]


def test_counts_only_refused_inference_requests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def use(at: Door) -> list[str]:
        for path in ("/nowhere", CHAT, "/v1/models/none"):
            assert (await at.ask(path)).status in {404, 405}
        assert (await at.ask("/api/decide", "POST", json={"model": "none"})).status == 404
        assert (await at.chat(messages=[{"role": "user", "content": "cell " * 5000}])).status == 400
        return await request_counters(at)

    found = visit(one(msgspec.structs.replace(FAST, context=4800)), use)

    assert found == ['promptai_requests_total{model="yi",replica="a",status="400"} 1.0']
    assert len(access(caplog)) == 1


def limited(store: KeyStore, tokens_per_min: int) -> dict[str, str]:
    return bearer(store.add("a", limits=KeyLimits(tokens_per_min=tokens_per_min))[1])


def test_concurrent_requests_cannot_exceed_the_token_limit(store: KeyStore) -> None:
    headers = limited(store, 100)

    async def use(at: Door) -> list[Answer]:
        return await asyncio.gather(
            *[at.chat(TEXT, prompt=[7] * 30, max_tokens=20, headers=headers) for _ in range(40)]
        )

    answers = visit(one(), use, guard=Guard(store, open=False))

    assert sorted(answer.status for answer in answers) == [200] * 2 + [429] * 38
    messages = {answer.error["message"] for answer in answers if answer.status == 429}
    assert messages == {"this API key is limited to 100 tokens per minute (try again in 1 s)"}


def test_requests_with_late_bodies_cannot_exceed_the_token_limit(store: KeyStore) -> None:
    """All of them pass the guard before the first one is admitted."""
    headers = limited(store, 100)
    body = msgspec.json.encode(asking(TEXT, {"prompt": [7] * 30, "max_tokens": 70}))
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def use(at: Door) -> list[bytes]:
        parts = (f"{head}{lines}\r\n".encode(), body)
        return await asyncio.gather(*[at.raw(*parts, pause_s=2.0) for _ in range(10)])

    answers = visit(one(FAST), use, guard=Guard(store, open=False))

    assert sorted(answer.split()[1] for answer in answers) == [b"200"] + [b"429"] * 9


def test_releases_reserved_tokens_that_were_not_used(store: KeyStore) -> None:
    """An answer with 200 expected tokens generates about 20; meanwhile no tokens are left."""
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


def test_releases_all_reserved_tokens_of_a_request_that_was_never_sent(store: KeyStore) -> None:
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


def test_the_gateway_stays_closed_when_the_key_file_is_removed(store: KeyStore) -> None:
    async def use(at: Door) -> list[tuple[int, str | None]]:
        seen = [await at.ask("/api/queue")]
        _, secret = KeyStore(store.path).add("first", scopes=("admin",))
        for event in (lambda: None, store.path.unlink, lambda: KeyStore(store.path).add("second")):
            event()
            await asyncio.sleep(1.1)
            seen += [await at.ask("/api/queue"), await at.ask("/api/queue", headers=bearer(secret))]
        return [(answer.status, None if answer.status == 200 else str(answer.error["code"])) for answer in seen]

    no_key, bad_key = (401, "missing_api_key"), (401, "invalid_api_key")
    assert visit(one(), use, guard=Guard(store, open=True)) == [
        *((200, None), no_key, (200, None)),
        *(no_key, bad_key),
        *(no_key, bad_key),
    ]
