"""The gateway's API, described once: as an OpenAPI document and as a page for people.

The document is what tests throw at the gateway, so it promises no more than is kept:
fields that go through to an engine are described but not closed, because engines know
more of them than any list. Schemas lie in ``data/schemas.json``; the operations are here.
"""

import functools
import html
import json
from importlib import resources
from string import Template
from typing import Any, NamedTuple

import msgspec

from promptai import __version__
from promptai.gateway.envelope import OPENAI_REQUEST_ID, REQUEST_ID

_STATUSES = {
    400: "The request is malformed, or its prompt is longer than the context.",
    401: "There is no API key, or it is unknown or revoked.",
    403: "The key has no such scope or may not use the model, or a browser may not come here.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    417: "Of Expect only 100-continue is known.",
    429: "The queue is full, or a limit of the key is reached.",
    431: "A header is too long.",
    500: "The gateway failed; its log says why.",
    501: "The engine was started without what this needs.",
    502: "An engine failed, and no other could take over.",
    503: "Nothing is there that could answer now.",
    504: "Nothing answered in time.",
}
_ALWAYS = (400, 403, 417, 431, 500)
_KEYED = (401, 503)
_BODY = (408, 413)
_INFER = (404, *_BODY, 429, 501, 502, 504)

_CHAT = {"model": "auto", "messages": [{"role": "user", "content": "Is cell 12 up?"}], "max_tokens": 64}


class _Operation(NamedTuple):
    """
    One endpoint.

    Attributes:
        answer: Content type of a good answer -> its schema.
        body: Schema of the request.
        codes: What goes wrong beside what may go wrong anywhere.
        asked: Headers of ours that a request may carry.
        scope: What a key must open; empty: no key is needed.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    answer: dict[str, dict[str, Any]]
    scope: str = "infer"
    body: str = ""
    example: dict[str, Any] | None = None
    codes: tuple[int, ...] = ()
    routed: bool = False
    asked: tuple[str, ...] = ()


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> dict[str, dict[str, Any]]:
    return {"application/json": _ref(name)}


_STREAM = {
    "text/event-stream": {
        "type": "string",
        "description": (
            "With stream: true. Events of chunks, and data: [DONE] at the end. Before the first chunk, and in every "
            "long silence, comments may come (lines that begin with a colon); with x-promptai-status: 1 events named "
            "promptai.status, which say the stage (queued, loading, prefill, decode) and, where they are known, the "
            "place in the queue, the percent done, the replica, and left_s, the seconds to the first token. What fails "
            "after the stream has begun comes as an event whose data is an error instead of a chunk; [DONE] follows."
        ),
    }
}

_BUDGET, _DEADLINE, _PRIORITY = "x-promptai-budget", "x-promptai-deadline", "x-promptai-priority"
_QUEUED = (_BUDGET, _DEADLINE, _PRIORITY)
_STREAMED = ("x-promptai-status", *_QUEUED)

_OPERATIONS = (
    _Operation(
        "post", "/v1/chat/completions", "chat", "OpenAI", "Answer a conversation.",
        _json("ChatCompletion") | _STREAM, body="ChatRequest", example=_CHAT, codes=_INFER, routed=True,
        asked=_STREAMED,
    ),
    _Operation(
        "post", "/v1/completions", "complete", "OpenAI", "Continue a text.",
        _json("Completion") | _STREAM, body="CompletionRequest", codes=_INFER, routed=True,
        asked=_STREAMED,
        example={"model": "auto", "prompt": "Cell 12 is", "max_tokens": 16},
    ),
    _Operation(
        "post", "/v1/embeddings", "embed", "OpenAI", "Turn texts into vectors.",
        _json("EmbeddingList"), body="EmbeddingRequest", codes=_INFER, routed=True,
        asked=_QUEUED,
        example={"model": "auto", "input": "Cell 12 is up"},
    ),
    _Operation("get", "/v1/models", "list_models", "OpenAI", "List the models.", _json("ModelList")),
    _Operation(
        "get", "/v1/models/{model}", "get_model", "OpenAI", "Tell of one model.", _json("Model"), codes=(404,)
    ),
    _Operation(
        "post", "/api/decide", "decide", "PromptAI", "Say where a request would go, and why, without sending it.",
        _json("Decision"), body="AnyRequest", example=_CHAT, codes=(404, *_BODY, 429),
        asked=(_BUDGET,),
    ),
    _Operation("get", "/api/fleet", "get_fleet", "PromptAI", "Show all replicas.", _json("Fleet")),
    _Operation("get", "/api/queue", "get_queue", "PromptAI", "Show what waits.", _json("Queue"), "admin"),
    _Operation(
        "get", "/metrics", "get_metrics", "Watching", "Metrics for Prometheus; wakes and changes nothing.",
        {"text/plain": {"type": "string"}}, "metrics",
    ),
    _Operation(
        "get", "/healthz", "get_health", "Watching", "Say that the gateway runs.", _json("Health"), scope=""
    ),
    _Operation(
        "get", "/readyz", "get_readiness", "Watching", "Say whether a request could be answered.",
        _json("Health"), scope="", codes=(503,),
    ),
)  # fmt: skip

#: What is surely a time above 0; zeros in front, and more digits, are taken as well.
_TIME = {"type": "string", "pattern": r"^([1-9][0-9]{0,5}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9]) ?(ms|s|m)?$"}
#: Header of a request -> its schema, an example, and what it does.
_ASKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "x-promptai-status": (
        {"enum": ["1"]},
        "1",
        "Of a stream: while it waits, events named promptai.status say how far it is, in place of comments.",
    ),
    _BUDGET: (
        _TIME,
        "10s",
        "For the model auto: it is the most capable one that is predicted to answer within this time.",
    ),
    _DEADLINE: (
        _TIME,
        "30s",
        "The longest wait for a slot; then HTTP 429. It shortens what the gateway is set to and never prolongs it.",
    ),
    _PRIORITY: (
        {"enum": ["batch"]},
        "batch",
        "Behind everybody who waits in person, until it has waited for five minutes.",
    ),
}

_HEADERS = {
    REQUEST_ID: ("string", "Names the request in the gateway's log; the client's X-Request-Id where it sent one."),
    OPENAI_REQUEST_ID: ("string", "The same, under the name that clients made for OpenAI read."),
    "x-promptai-model": ("string", "The model that answered."),
    "x-promptai-replica": ("string", "The replica that answered."),
    "x-promptai-route-reason": ("string", "Why that one."),
    "x-promptai-cached-tokens": ("integer", "Prompt tokens that a cache held, as far as is known when it begins."),
    "x-promptai-queue-ms": ("integer", "Milliseconds that it waited for a slot."),
    "Retry-After": ("integer", "Seconds after which trying again makes sense."),
    "WWW-Authenticate": ("string", "How to send a key."),
}


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document; shared, so not to be changed."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PromptAI gateway",
            "version": __version__,
            "summary": "OpenAI's API in front of a fleet of CPU boards.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(operation.tag for operation in _OPERATIONS)],
        "paths": paths,
        "components": {
            "schemas": json.loads(_data("schemas.json")),
            "responses": {f"Error{status}": _error(status, text) for status, text in _STATUSES.items()},
            "headers": {
                name: {"schema": {"type": kind}, "description": text} for name, (kind, text) in _HEADERS.items()
            },
            "parameters": {name: _parameter(name) for name in _ASKED},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A key of promptai keys add."},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
            },
        },
    }


def document_json() -> bytes:
    """The document as bytes."""
    return msgspec.json.encode(document())


def page(base_url: str = "http://127.0.0.1:8400") -> str:
    """
    One page for people, without anything from elsewhere.

    Args:
        base_url: Where the examples find the gateway.
    """
    return Template(_data("page.html")).substitute(
        version=html.escape(__version__),
        keys="Where keys are demanded, add <code>-H 'Authorization: Bearer pk-...'</code> to the examples.",
        sections="\n".join(_section(operation, base_url) for operation in _OPERATIONS),
    )


def _operation(operation: _Operation) -> dict[str, Any]:
    codes = sorted({*operation.codes, *_ALWAYS, *(_KEYED if operation.scope else ())})
    names = [REQUEST_ID, OPENAI_REQUEST_ID]
    if operation.routed:
        names += [name for name in _HEADERS if name.startswith("x-promptai-") and name != REQUEST_ID]
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "security": [{}, {"bearer": []}, {"apiKey": []}] if operation.scope else [],
        "responses": {
            "200": {
                "description": "It went well.",
                "headers": {name: _header(name) for name in names},
                "content": {kind: {"schema": schema} for kind, schema in operation.answer.items()},
            }
        }
        | {str(code): {"$ref": f"#/components/responses/Error{code}"} for code in codes},
    }
    if operation.scope:
        described["description"] = f"A key needs the scope {operation.scope}, or admin."
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.asked:
        described["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in operation.asked]
    if operation.body:
        content: dict[str, Any] = {"schema": _ref(operation.body)}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _error(status: int, text: str) -> dict[str, Any]:
    names = [REQUEST_ID, OPENAI_REQUEST_ID]
    names += ["Retry-After"] if status in {429, 503} else []
    names += ["WWW-Authenticate"] if status == 401 else []
    return {
        "description": text,
        "headers": {name: _header(name) for name in names},
        "content": {"application/json": {"schema": _ref("Error")}},
    }


def _header(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/headers/{name}"}


def _parameter(name: str) -> dict[str, Any]:
    schema, example, text = _ASKED[name]
    return {"name": name, "in": "header", "description": text, "schema": schema, "example": example}


def _section(operation: _Operation, base_url: str) -> str:
    curl = f"curl {base_url}{operation.path}"
    if operation.example is not None:
        curl += f" \\\n  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(operation.example)}'"
    needs = f"scope {operation.scope}" if operation.scope else "needs no key"
    headers = "".join(
        f"<p><small><code>{name}: {example}</code> {html.escape(text)}</small></p>\n"
        for name, (_, example, text) in _ASKED.items()
        if name in operation.asked
    )
    return (
        f"<section>\n<h2><span>{operation.method.upper()}</span> {html.escape(operation.path)}</h2>\n"
        f"<p>{html.escape(operation.summary)} <small>({needs})</small></p>\n"
        f"{headers}<pre><code>{html.escape(curl)}</code></pre>\n</section>"
    )


def _data(name: str) -> str:
    return (resources.files("promptai.gateway") / "data" / name).read_text(encoding="utf-8")
