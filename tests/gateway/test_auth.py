"""Keys, scopes, limits and models; and protection from web pages."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from promptai.gateway.auth import CALLER, Caller, Guard, host_name, is_loopback, scope_of
from promptai.gateway.errors import ApiError
from promptai.gateway.keys import KeyStore, Scope
from promptai.gateway.limits import KeyLimits
from support_engine import until
from support_gateway import Answer, Site, visit

CHAT = "/v1/chat/completions"
ADMIN: tuple[Scope, ...] = ("admin",)


async def caller_name(request: web.Request) -> web.Response:
    """Respond with the name of the caller."""
    return web.Response(text=request[CALLER].name)


ROUTES = [
    *(
        web.get(path, caller_name)
        for path in ("/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/{model}")
    ),
    *(web.get(path, caller_name) for path in ("/api/fleet", "/api/queue")),
    web.post("/api/decide", caller_name),
    web.post(CHAT, caller_name),
]


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    """A store without keys."""
    return KeyStore(tmp_path / "keys.json")


def request(guard: Callable[[], Guard], path: str, method: str = "GET", **headers: str) -> Answer:
    async def use(site: Site) -> Answer:
        return await site.ask(path, method, headers={name.replace("_", "-"): text for name, text in headers.items()})

    answer: Answer = visit(ROUTES, use, guard)
    return answer


def open_gateway(**fields: Any) -> Callable[[], Guard]:
    return lambda: Guard(None, open=True, **fields)


def with_keys(store: KeyStore | None) -> Callable[[], Guard]:
    return lambda: Guard(store, open=False, bind="0.0.0.0")  # noqa: S104  only compared


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/api/fleet"])
def test_refuses_every_request_beyond_loopback_while_no_key_exists(store: KeyStore, path: str) -> None:
    assert [request(with_keys(it), path, Authorization="Bearer pk-x").status for it in (None, store)] == [401, 401]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic cGs6cGs="},
        {"x_api_key": ""},
    ],
    ids=str,
)
def test_a_request_without_a_key_gets_instructions(store: KeyStore, headers: dict[str, str]) -> None:
    store.add("a")

    answer = request(with_keys(store), "/v1/models", **headers)

    assert (*answer.line[:2], answer.error["code"]) == (401, "authentication_error", "missing_api_key")
    assert answer.headers["www-authenticate"] == 'Bearer realm="promptai"'
    assert "Authorization: Bearer" in answer.error["message"]


def test_a_wrong_key_is_neither_returned_nor_logged(store: KeyStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key, secret = store.add("a")
    store.revoke(key.id)

    for wrong in ("pk-wrong-secret", secret):
        answer = request(with_keys(store), "/v1/models", Authorization=f"Bearer {wrong}")
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        assert wrong not in answer.body.decode() + caplog.text


@pytest.mark.parametrize(
    ("scope", "permitted"),
    [
        ("infer", {CHAT, "/v1/models", "/v1/models/a", "/api/decide", "/api/fleet"}),
        ("metrics", {"/metrics"}),
        ("admin", {CHAT, "/v1/models", "/v1/models/a", "/api/decide", "/metrics", "/api/fleet", "/api/queue"}),
    ],
)
def test_a_key_permits_exactly_its_scope(store: KeyStore, scope: Scope, permitted: set[str]) -> None:
    _, secret = store.add("a", scopes=(scope,))
    paths = [CHAT, "/v1/models", "/v1/models/a", "/api/decide", "/metrics", "/api/fleet", "/api/queue"]

    async def use(site: Site) -> dict[str, Answer]:
        headers = {"Authorization": f"bearer {secret}"}
        return {
            path: await site.ask(path, "POST" if path in {CHAT, "/api/decide"} else "GET", headers=headers)
            for path in paths
        }

    answers = visit(ROUTES, use, with_keys(store))

    assert permitted == {path for path, answer in answers.items() if answer.status == 200}
    refused = [answer for path, answer in answers.items() if path not in permitted]
    assert all((answer.status, answer.error["code"]) == (403, "missing_scope") for answer in refused)


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
def test_probes_need_no_key(store: KeyStore, path: str) -> None:
    store.add("a")

    assert request(with_keys(store), path).status == 200


def test_unknown_routes_require_admin() -> None:
    assert [scope_of(route) for route in ("/anything", "/api/decide/x", "/healthz/x", "/v2/x")] == ["admin"] * 4


def test_an_unknown_path_is_not_found_without_a_key(store: KeyStore) -> None:
    store.add("a")

    assert [request(with_keys(store), path).status for path in ("/nothing", "/api//fleet", "/v1/../nothing")] == [
        404
    ] * 3


@pytest.mark.parametrize("header", ["Authorization", "x_api_key"])
def test_accepts_a_key_in_either_header(store: KeyStore, header: str) -> None:
    _, secret = store.add("laptop")
    value = f"Bearer {secret}" if header == "Authorization" else secret

    answer = request(with_keys(store), "/v1/models", **{header: value})

    assert answer.body == b"laptop"


def test_loopback_without_keys_is_open_and_ignores_keys(store: KeyStore) -> None:
    """Some clients always send a key, such as a dummy."""
    answers = [
        request(lambda: Guard(store, open=True), "/api/fleet"),
        request(open_gateway(), CHAT, "POST", Authorization="Bearer sk-dummy"),
    ]

    assert [answer.body for answer in answers] == [b"local", b"local"]


def test_revoking_the_last_key_does_not_open_the_gateway(store: KeyStore) -> None:
    key, _ = store.add("a")
    assert request(lambda: Guard(store, open=True), "/v1/models").status == 401
    store.revoke(key.id)
    assert request(lambda: Guard(store, open=True), "/v1/models").status == 401


def test_an_unreadable_key_file_closes_the_gateway(store: KeyStore, caplog: pytest.LogCaptureFixture) -> None:
    _, secret = store.add("a")
    store.path.chmod(0o644)

    answer = request(lambda: Guard(store, open=True), "/v1/models", Authorization=f"Bearer {secret}")

    assert (answer.status, answer.error["code"]) == (503, "keys_unreadable")
    assert str(store.path) not in answer.body.decode()
    assert str(store.path) in caplog.text


def test_a_key_beyond_its_limit_gets_retry_after(store: KeyStore) -> None:
    _, secret = store.add("a", limits=KeyLimits(requests_per_min=2))

    async def use(site: Site) -> list[Answer]:
        headers = {"Authorization": f"Bearer {secret}"}
        seen = [await site.ask("/v1/models", headers=headers) for _ in range(5)]
        return seen + [await site.ask(CHAT, "POST", headers=headers) for _ in range(3)]

    answers = visit(ROUTES, use, with_keys(store))

    assert [answer.status for answer in answers] == [200] * 7 + [429]
    assert (answers[-1].error["type"], answers[-1].headers["retry-after"]) == ("rate_limit_error", "30")
    assert "limited to 2 requests per minute" in answers[-1].error["message"]


def test_counts_concurrent_requests_until_they_end_or_are_cancelled(store: KeyStore) -> None:
    key, secret = store.add("a", limits=KeyLimits(concurrent=1))
    guards: list[Guard] = []

    def guard() -> Guard:
        guards.append(Guard(store, open=False))
        return guards[-1]

    async def runs(number: int) -> bool:
        return guards[0].meter.running(key.id) == number

    async def hang(_request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async def use(site: Site) -> list[int]:
        headers = {"Authorization": f"Bearer {secret}"}
        first = asyncio.create_task(site.ask(CHAT, "POST", headers=headers))
        await until(lambda: runs(1))
        second = await site.ask(CHAT, "POST", headers=headers)
        first.cancel()
        await until(lambda: runs(0))
        return [second.status]

    assert visit([web.post(CHAT, hang)], use, guard) == [429]


def test_charges_tokens_to_the_key(store: KeyStore) -> None:
    _, secret = store.add("a", limits=KeyLimits(tokens_per_min=10))
    guards: list[Guard] = []

    def guard() -> Guard:
        guards.append(Guard(store, open=False))
        return guards[-1]

    async def spend(request: web.Request) -> web.Response:
        guards[0].charge(request[CALLER], 15)
        return web.Response()

    async def use(site: Site) -> list[Answer]:
        return [await site.ask(CHAT, "POST", headers={"x-api-key": secret}) for _ in range(2)]

    answers = visit([web.post(CHAT, spend)], use, guard)

    assert [answer.status for answer in answers] == [200, 429]
    assert "10 tokens per minute" in answers[1].error["message"]


def test_refuses_a_model_that_the_key_does_not_permit() -> None:
    caller = Caller(limits=KeyLimits(models=("small", "tiny")))
    caller.check_model("tiny")

    with pytest.raises(ApiError, match="may not use large") as caught:
        caller.check_model("large")

    assert (
        caught.value.status,
        caught.value.code,
        caught.value.hint,
    ) == (403, "model_not_allowed", "it may use: small, tiny")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8400", 200),
        ("localhost.", 200),
        ("127.0.0.1:8400", 200),
        ("127.8.9.1", 200),
        ("[::1]:8400", 200),
        ("evil.example", 403),
        ("evil.example:8400", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.5:8400", 403),
        ("0.0.0.0", 403),  # noqa: S104  not bound
        ("[::1", 403),
        ("localhost@evil.example", 403),
        ("", 403),
    ],
)
def test_loopback_accepts_only_loopback_hosts(host: str, status: int) -> None:
    """A page whose host name resolves to loopback still sends its own name as Host."""
    assert request(open_gateway(), "/healthz", Host=host).status == status


def test_accepts_its_own_address_and_configured_hosts() -> None:
    guard = open_gateway(bind="127.0.0.2", hosts=["ai.lan"])

    assert [request(guard, "/healthz", Host=host).status for host in ("127.0.0.2:8400", "AI.lan", "b.lan")] == [
        200,
        200,
        403,
    ]


def test_accepts_any_host_beyond_loopback() -> None:
    guard = open_gateway(bind="0.0.0.0")  # noqa: S104  only compared

    assert request(guard, "/healthz", Host="promptai.lan").status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "file://"])
def test_refuses_posts_from_foreign_pages(origin: str) -> None:
    """Browsers send a form without a preflight; it could keep the board busy for hours."""
    answer = request(open_gateway(), CHAT, "POST", Origin=origin)

    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_accepts_posts_from_its_own_page() -> None:
    answer = request(open_gateway(), CHAT, "POST", Origin="http://localhost:8400", Host="localhost:8400")

    assert answer.status == 200


@pytest.mark.parametrize("allowed", ["https://ui.example", "https://UI.example/", "*"])
def test_accepts_posts_from_an_allowed_origin(allowed: str) -> None:
    answer = request(open_gateway(cors_origins=[allowed]), CHAT, "POST", Origin="https://ui.example")

    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://ui.example")
    assert "x-promptai-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"


def test_an_allowed_origin_can_read_refusals(store: KeyStore) -> None:
    store.add("a")
    guard = lambda: Guard(store, open=True, cors_origins=["https://ui.example"])  # noqa: E731

    answer = request(guard, "/v1/models", Origin="https://ui.example")

    assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, "https://ui.example")


@pytest.mark.parametrize("path", [CHAT, "/healthz", "/nothing"])
def test_a_preflight_needs_no_key(store: KeyStore, path: str) -> None:
    store.add("a")
    guard = lambda: Guard(store, open=True, cors_origins=["https://ui.example"])  # noqa: E731

    answer = request(
        guard,
        path,
        "OPTIONS",
        Origin="https://ui.example",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization, content-type,x-stainless-os",
        Access_Control_Request_Private_Network="true",
    )

    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "https://ui.example"
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type,x-stainless-os"
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "POST" in answer.headers["access-control-allow-methods"]


def test_refuses_a_preflight_from_a_foreign_origin() -> None:
    answer = request(
        open_gateway(cors_origins=["https://ui.example"]),
        CHAT,
        "OPTIONS",
        Origin="https://evil.example",
        Access_Control_Request_Method="POST",
    )

    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers


def test_a_preflight_does_not_echo_invalid_header_names() -> None:
    answer = request(
        open_gateway(cors_origins=["*"]),
        CHAT,
        "OPTIONS",
        Origin="https://ui.example",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="<script>",
    )

    assert "access-control-allow-headers" not in answer.headers


@pytest.mark.parametrize(
    ("host", "name"),
    [("A.b:1", "a.b"), ("[::1]:2", "::1"), ("a:b:c", ""), ("a b", ""), ("::1", ""), ("a/b", ""), ("a.", "a")],
)
def test_host_name_parses_the_header(host: str, name: str) -> None:
    assert host_name(host) == name


def test_is_loopback() -> None:
    here = ["localhost", "127.0.0.1", "::1", "127.255.255.254"]
    elsewhere = ["0.0.0.0", "::", "10.0.0.1", "promptai.lan", "", "localhost.lan"]  # noqa: S104  not bound

    assert [is_loopback(host) for host in here + elsewhere] == [True] * len(here) + [False] * len(elsewhere)
