"""The document is a valid one, holds together, and is the page's only source."""

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
    """Every $ref below a node."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def errors_of(schema: str, value: Any) -> list[str]:
    """What is wrong with a value by one of the schemas."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    return [error.message for error in Draft202012Validator(whole).iter_errors(value)]


def test_it_is_an_openapi_document() -> None:
    OPENAPI_31_VALIDATOR.validate(DOCUMENT)


def test_every_schema_is_one() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        meta.validate(schema)


@pytest.mark.timeout(30)
def test_a_tool_for_testing_apis_understands_all_of_it() -> None:
    loaded = schemathesis.openapi.from_dict(json.loads(document_json()))

    assert [type(found).__name__ for found in loaded.get_all_operations()] == ["Ok"] * len(OPERATIONS)


def test_every_reference_leads_somewhere_and_every_part_is_used() -> None:
    used = set(references(DOCUMENT))
    there = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "headers", "parameters")
        for name in DOCUMENT["components"][kind]
    }

    assert used == there


def test_every_refusal_names_the_request_in_both_headers() -> None:
    for response in DOCUMENT["components"]["responses"].values():
        assert {"x-promptai-request-id", "x-request-id"} <= set(response["headers"])


@pytest.mark.parametrize("schema", ["ChatRequest", "CompletionRequest"])
def test_it_says_how_many_answers_an_engine_gives_to_one_request(schema: str) -> None:
    described = DOCUMENT["components"]["schemas"][schema]["properties"]["n"]["description"]

    assert all(words in described for words in ("at most", "slots", "HTTP 400"))


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
def test_each_operation_says_which_key_it_wants_and_what_goes_wrong(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    scope = scope_of(path)
    responses = operation["responses"]

    assert bool(operation["security"]) == (scope is not None)
    assert scope is None or f"scope {scope}" in operation["description"]
    assert ("401" in responses) == (scope is not None)
    assert {"200", "400", "403", "500"} <= set(responses)
    assert ("requestBody" in operation) == (method == "post") == ("413" in responses)
    assert {"x-promptai-request-id", "x-request-id"} <= set(responses["200"]["headers"])


def asked_of(path: str) -> dict[str, dict[str, Any]]:
    """The headers that a request may carry."""
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
def test_headers_are_described_where_they_change_something(path: str, names: set[str]) -> None:
    assert set(asked_of(path)) == {f"x-promptai-{name}" for name in names}


def test_headers_have_examples_that_fit_and_nobody_must_send_them() -> None:
    for found in asked_of(CHAT).values():
        assert (found["in"], found.get("required", False)) == ("header", False)
        assert Draft202012Validator(found["schema"]).is_valid(found["example"])


@pytest.mark.parametrize("name", ["x-promptai-budget", "x-promptai-deadline"])
@pytest.mark.parametrize("value", ["10s", "1500ms", "2m", "10", "0.5s", "1.25 m", "999999.999m", "0.001ms", "100"])
def test_a_time_that_is_described_is_taken(name: str, value: str) -> None:
    assert Draft202012Validator(asked_of(CHAT)[name]["schema"]).is_valid(value)
    assert parse_budget(value) > 0


@pytest.mark.parametrize("name", ["x-promptai-budget", "x-promptai-deadline"])
@pytest.mark.parametrize("value", ["", "0", "0s", "0.0s", "-1s", "1e3", "9" * 400, "10h", "soon", "s", ".5s"])
def test_a_time_that_is_refused_is_not_described(name: str, value: str) -> None:
    assert not Draft202012Validator(asked_of(CHAT)[name]["schema"]).is_valid(value)
    with pytest.raises(ValueError, match="a budget is"):
        parse_budget(value)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_it_says_what_comes_in_a_stream_beside_chunks(path: str) -> None:
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
def test_what_is_no_chat_request_is_not_described_as_one(body: dict[str, Any]) -> None:
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
def test_what_clients_send_is_described(fields: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": parts, "name": "b"}]

    assert errors_of("ChatRequest", {"messages": messages, **fields}) == []


def test_the_envelope_is_described() -> None:
    for error in (ApiError(400, "a"), ApiError(429, "a", code=1, param="model", hint="b", details={"n_ctx": 3})):
        assert errors_of("Error", json.loads(error.body())) == []
    assert errors_of("Error", {"error": "a"}) != []


class _Page(html.parser.HTMLParser):
    """Whether every element is closed, and what is fetched from elsewhere."""

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


def test_the_page_lists_every_endpoint_and_fetches_nothing() -> None:
    reader = _Page()
    reader.feed(page())

    assert reader.stack == []
    assert set(reader.links) == {"data:,", "/openapi.json"}
    assert all(f"{method.upper()} {path}" in reader.text for method, path, _ in OPERATIONS)
    assert "prefers-color-scheme: dark" in page()
    assert "width=device-width" in page()


def test_the_page_shows_the_headers_that_a_request_may_carry() -> None:
    reader = _Page()
    reader.feed(page())

    for found in asked_of(CHAT).values():
        assert f"{found['name']}: {found['example']}" in reader.text
        assert found["description"] in reader.text


def test_the_pages_examples_carry_valid_json_and_the_address_of_the_gateway() -> None:
    reader = _Page()
    reader.feed(page("http://pi.lan:8400"))

    bodies = re.findall(r"-d '(.*)'", reader.text)
    assert len(bodies) == len([one for one in OPERATIONS if "requestBody" in one[2]])
    assert all(isinstance(json.loads(body), dict) for body in bodies)
    assert reader.text.count("curl http://pi.lan:8400/") == len(OPERATIONS)


def test_an_address_cannot_smuggle_in_a_script() -> None:
    assert "<script>" not in page("http://<script>")
