"""The OpenAPI document is valid and consistent, and the HTML page contains all of it."""

import html.parser
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from jsonschema_rs import Draft202012Validator, meta
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from promptai.gateway.auth import scope_of
from promptai.gateway.errors import ApiError
from promptai.gateway.openapi import document, document_json, page
from promptai.router.selection import parse_budget

DOCUMENT = document()
OPERATIONS = [
    (method, path, operation) for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
]
PARAMETERS = DOCUMENT["components"].get("parameters", {})
CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
IDS = [f"{method} {path}" for method, path, _ in OPERATIONS]


def references(node: Any) -> Iterator[str]:
    """Yield every $ref below a node."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def errors_of(schema: str, value: Any) -> list[str]:
    """Return the violations of a schema by a value."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    return [error.message for error in Draft202012Validator(whole).iter_errors(value)]


def test_is_a_valid_openapi_document() -> None:
    OPENAPI_31_VALIDATOR.validate(DOCUMENT)


def test_every_schema_is_valid() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        meta.validate(schema)


@pytest.mark.timeout(30)
def test_schemathesis_loads_every_operation() -> None:
    loaded = schemathesis.openapi.from_dict(json.loads(document_json()))

    assert [type(found).__name__ for found in loaded.get_all_operations()] == ["Ok"] * len(OPERATIONS)


def test_every_reference_resolves_and_every_component_is_used() -> None:
    used = set(references(DOCUMENT))
    defined = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "headers", "parameters")
        for name in DOCUMENT["components"][kind]
    }

    assert used == defined


def test_every_error_response_has_both_request_id_headers() -> None:
    responses = DOCUMENT["components"]["responses"]

    assert responses
    for response in responses.values():
        assert {"x-promptai-request-id", "x-request-id"} <= set(response["headers"])


@pytest.mark.parametrize("schema", ["ChatRequest", "CompletionRequest"])
def test_documents_the_limit_of_answers_per_request(schema: str) -> None:
    described = DOCUMENT["components"]["schemas"][schema]["properties"]["n"]["description"]

    assert all(words in described for words in ("at most", "slots", "HTTP 400"))


def test_operation_ids_are_unique() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
def test_each_operation_documents_its_scope_and_errors(method: str, path: str, operation: dict[str, Any]) -> None:
    scope = scope_of(path)
    responses = operation["responses"]

    assert bool(operation["security"]) == (scope is not None)
    assert scope is None or f"scope {scope}" in operation["description"]
    assert ("401" in responses) == (scope is not None)
    assert {"200", "400", "403", "500"} <= set(responses)
    assert ("requestBody" in operation) == (method == "post") == ("413" in responses)
    assert {"x-promptai-request-id", "x-request-id"} <= set(responses["200"]["headers"])


def request_headers(path: str) -> dict[str, dict[str, Any]]:
    """Return the documented request headers of a path by name."""
    (operation,) = DOCUMENT["paths"][path].values()
    references = [one["$ref"] for one in operation.get("parameters", ()) if "$ref" in one]
    return {found["name"]: found for found in (PARAMETERS[one.rpartition("/")[2]] for one in references)}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (CHAT, {"status", "budget", "deadline", "priority"}),
        (TEXT, {"status", "budget", "deadline", "priority"}),
        (EMBED, {"budget", "deadline", "priority"}),
        ("/api/decide", {"budget"}),
        ("/v1/models", set()),
    ],
)
def test_documents_request_headers_where_they_have_an_effect(path: str, names: set[str]) -> None:
    assert set(request_headers(path)) == {f"x-promptai-{name}" for name in names}


def test_request_headers_are_optional_and_have_valid_examples() -> None:
    headers = request_headers(CHAT)

    assert headers
    for found in headers.values():
        assert (found["in"], found.get("required", False)) == ("header", False)
        assert Draft202012Validator(found["schema"]).is_valid(found["example"])


@pytest.mark.parametrize("name", ["x-promptai-budget", "x-promptai-deadline"])
@pytest.mark.parametrize("value", ["10s", "1500ms", "2m", "10", "0.5s", "1.25 m", "999999.999m", "0.001ms", "100"])
def test_every_documented_time_is_accepted(name: str, value: str) -> None:
    assert Draft202012Validator(request_headers(CHAT)[name]["schema"]).is_valid(value)
    assert parse_budget(value) > 0


@pytest.mark.parametrize("name", ["x-promptai-budget", "x-promptai-deadline"])
@pytest.mark.parametrize("value", ["", "0", "0s", "0.0s", "-1s", "1e3", "9" * 400, "10h", "soon", "s", ".5s"])
def test_no_invalid_time_is_documented(name: str, value: str) -> None:
    assert not Draft202012Validator(request_headers(CHAT)[name]["schema"]).is_valid(value)
    with pytest.raises(ValueError, match="invalid duration"):
        parse_budget(value)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_documents_comments_status_events_and_errors_in_streams(path: str) -> None:
    content = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    stream = content["text/event-stream"]["schema"]["description"]

    assert all(word in stream for word in ("comments", "promptai.status", "error", "[DONE]"))


def test_examples_are_valid() -> None:
    contents = [
        operation["requestBody"]["content"]["application/json"]
        for _, _, operation in OPERATIONS
        if "requestBody" in operation
    ]

    assert contents
    for content in contents:
        assert errors_of(content["schema"]["$ref"].rpartition("/")[2], content["example"]) == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"content": "hello"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": "a"}], "stream": "yes"},
        {"messages": [{"role": "user", "content": "a"}], "temperature": -1},
    ],
    ids=str,
)
def test_the_schema_rejects_invalid_chat_requests(body: dict[str, Any]) -> None:
    assert errors_of("ChatRequest", body) != []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": None, "stop": None, "stream": None, "max_tokens": None, "tools": None, "response_format": None},
        {"stop": ["a"], "stream": True, "stream_options": {"include_usage": True}, "cache_prompt": True, "mirostat": 2},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"},
    ],
    ids=str,
)
def test_the_schema_accepts_requests_of_common_clients(fields: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": parts, "name": "b"}]

    assert errors_of("ChatRequest", {"messages": messages, **fields}) == []


def test_the_schema_matches_the_error_envelope() -> None:
    for error in (ApiError(400, "a"), ApiError(429, "a", code=1, param="model", hint="b", details={"n_ctx": 3})):
        assert errors_of("Error", json.loads(error.body())) == []
    assert errors_of("Error", {"error": "a"}) != []


class _Page(html.parser.HTMLParser):
    """Checks that elements are closed; collects links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "link"}:
            self.stack.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_lists_every_endpoint_and_loads_nothing_else() -> None:
    reader = _Page()
    reader.feed(page())

    assert reader.stack == []
    assert set(reader.links) == {"data:,", "/openapi.json"}
    assert all(f"{method.upper()} {path}" in reader.text for method, path, _ in OPERATIONS)
    assert "prefers-color-scheme: dark" in page()
    assert "width=device-width" in page()


def test_the_page_lists_the_request_headers() -> None:
    reader = _Page()
    reader.feed(page())
    headers = request_headers(CHAT)

    assert headers
    for found in headers.values():
        assert f"{found['name']}: {found['example']}" in reader.text
        assert found["description"] in reader.text


def test_the_pages_examples_have_valid_json_and_the_gateways_url() -> None:
    reader = _Page()
    reader.feed(page("http://pi.lan:8400"))

    bodies = re.findall(r"-d '(.*)'", reader.text)
    assert len(bodies) == len([one for one in OPERATIONS if "requestBody" in one[2]])
    assert all(isinstance(json.loads(body), dict) for body in bodies)
    assert reader.text.count("curl http://pi.lan:8400/") == len(OPERATIONS)


def test_the_page_escapes_its_url() -> None:
    assert "<script>" not in page("http://<script>")
