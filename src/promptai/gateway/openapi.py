"""Describe the gateway's API once, as an OpenAPI document and as an HTML page.

Tests generate requests from the document, so it promises no more than the gateway does. Fields that are passed on to an
engine are described but allow further properties, because engines accept more fields than any list contains. Schemas
are in ``data/schemas.json``; the operations are here.
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
    401: "The API key is missing, unknown or revoked.",
    403: "The key lacks the scope or does not permit the model, or the web page's origin or host is not allowed.",
    404: "Unknown model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    417: "Unsupported Expect header; only 100-continue is supported.",
    429: "The queue is full, the deadline has passed, or the key has reached a limit.",
    431: "The request line or a header is too long.",
    500: "Internal error of the gateway; see its log.",
    501: "The engine was started without a feature that the request needs.",
    502: "An engine failed, and no other engine could take over.",
    503: "No replica can serve the request now.",
    504: "An engine did not answer in time.",
}
_ANY_OPERATION = (400, 403, 417, 431, 500)
_WITH_KEY = (401, 503)
_WITH_BODY = (408, 413)
_INFERENCE = (404, *_WITH_BODY, 429, 501, 502, 504)

_CHAT = {"model": "auto", "messages": [{"role": "user", "content": "Is cell 12 up?"}], "max_tokens": 64}


class _Operation(NamedTuple):
    """
    One endpoint.

    Attributes:
        content: Schema of a successful response, by its content type.
        scope: Scope that a key needs; empty: no key needed.
        body: Schema of the request.
        codes: Error statuses beyond those that every operation may return.
        routed: Whether the response has the headers about its route.
        headers: The gateway's own request headers that have an effect.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    content: dict[str, dict[str, Any]]
    scope: str = "infer"
    body: str = ""
    example: dict[str, Any] | None = None
    codes: tuple[int, ...] = ()
    routed: bool = False
    headers: tuple[str, ...] = ()


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> dict[str, dict[str, Any]]:
    return {"application/json": _ref(name)}


_STREAM = {
    "text/event-stream": {
        "type": "string",
        "description": (
            "With stream: true. One event per chunk, and data: [DONE] at the end. Before the first chunk, and during "
            "long silences, the stream may contain comments (lines that begin with a colon) or, with "
            "x-promptai-status: 1, events named promptai.status. These contain the stage (queued, loading, prefill, "
            "decode) and, if known, the place in the queue, the percentage done, the replica, and left_s, the "
            "seconds to the first token. A failure after the stream has begun is an event whose data is an error "
            "instead of a chunk; [DONE] follows."
        ),
    }
}

_BUDGET, _DEADLINE, _PRIORITY = "x-promptai-budget", "x-promptai-deadline", "x-promptai-priority"
_QUEUED = (_BUDGET, _DEADLINE, _PRIORITY)
_STREAMED = ("x-promptai-status", *_QUEUED)

_OPERATIONS = (
    _Operation(
        "post", "/v1/chat/completions", "chat", "OpenAI", "Create a chat completion.",
        _json("ChatCompletion") | _STREAM, body="ChatRequest", example=_CHAT, codes=_INFERENCE, routed=True,
        headers=_STREAMED,
    ),
    _Operation(
        "post", "/v1/completions", "complete", "OpenAI", "Create a text completion.",
        _json("Completion") | _STREAM, body="CompletionRequest", codes=_INFERENCE, routed=True,
        headers=_STREAMED,
        example={"model": "auto", "prompt": "Cell 12 is", "max_tokens": 16},
    ),
    _Operation(
        "post", "/v1/embeddings", "embed", "OpenAI", "Create embeddings.",
        _json("EmbeddingList"), body="EmbeddingRequest", codes=_INFERENCE, routed=True,
        headers=_QUEUED,
        example={"model": "auto", "input": "Cell 12 is up"},
    ),
    _Operation("get", "/v1/models", "list_models", "OpenAI", "List the models.", _json("ModelList")),
    _Operation(
        "get", "/v1/models/{model}", "get_model", "OpenAI", "Show one model.", _json("Model"), codes=(404,)
    ),
    _Operation(
        "post", "/api/decide", "decide", "PromptAI", "Show where a request would be routed, and why.",
        _json("Decision"), body="AnyRequest", example=_CHAT, codes=(404, *_WITH_BODY, 429),
        headers=(_BUDGET,),
    ),
    _Operation("get", "/api/fleet", "get_fleet", "PromptAI", "Show all replicas.", _json("Fleet")),
    _Operation(
        "get", "/api/queue", "get_queue", "PromptAI", "Show queued and running requests.", _json("Queue"), "admin"
    ),
    _Operation(
        "get", "/metrics", "get_metrics", "Monitoring", "Metrics for Prometheus; reading them never loads a model.",
        {"text/plain": {"type": "string"}}, "metrics",
    ),
    _Operation(
        "get", "/healthz", "get_health", "Monitoring", "Check that the gateway is running.", _json("Health"), scope=""
    ),
    _Operation(
        "get", "/readyz", "get_readiness", "Monitoring", "Check that a request could be served.",
        _json("Health"), scope="", codes=(503,),
    ),
)  # fmt: skip

#: A subset of the accepted times above 0: leading zeros and more digits are accepted, too.
_TIME = {"type": "string", "pattern": r"^([1-9][0-9]{0,5}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9]) ?(ms|s|m)?$"}
#: Request header: schema, example, description.
_REQUEST_HEADERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "x-promptai-status": (
        {"enum": ["1"]},
        "1",
        "For streams: send progress as events named promptai.status instead of comments.",
    ),
    _BUDGET: (
        _TIME,
        "10s",
        "For the model auto: choose the most capable model that is predicted to answer within this time.",
    ),
    _DEADLINE: (
        _TIME,
        "30s",
        "Longest wait for a slot, then HTTP 429. It can only shorten the limit that the gateway is configured with.",
    ),
    _PRIORITY: (
        {"enum": ["batch"]},
        "batch",
        "Queue behind all interactive requests, but for no more than five minutes.",
    ),
}

_RESPONSE_HEADERS = {
    REQUEST_ID: ("string", "Id of the request in the gateway's log; the client's X-Request-Id if it sent one."),
    OPENAI_REQUEST_ID: ("string", "The same id, under the name that OpenAI clients read."),
    "x-promptai-model": ("string", "The model that answered."),
    "x-promptai-replica": ("string", "The replica that answered."),
    "x-promptai-route-reason": ("string", "Why this model and replica were chosen."),
    "x-promptai-cached-tokens": ("integer", "Prompt tokens found in a cache, as known when the response begins."),
    "x-promptai-queue-ms": ("integer", "Milliseconds that the request waited for a slot."),
    "Retry-After": ("integer", "Seconds to wait before a retry."),
    "WWW-Authenticate": ("string", "How to send an API key."),
}


@functools.cache
def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; callers share it and must not change it."""
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
                name: {"schema": {"type": kind}, "description": text}
                for name, (kind, text) in _RESPONSE_HEADERS.items()
            },
            "parameters": {name: _parameter(name) for name in _REQUEST_HEADERS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A key from promptai keys add."},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
            },
        },
    }


def document_json() -> bytes:
    """Return the document as JSON."""
    return msgspec.json.encode(document())


def page(base_url: str = "http://127.0.0.1:8400") -> str:
    """
    Return the API as one HTML page that loads nothing else.

    Args:
        base_url: URL of the gateway in the examples.
    """
    return Template(_data("page.html")).substitute(
        version=html.escape(__version__),
        keys="If the gateway requires API keys, add <code>-H 'Authorization: Bearer pk-...'</code> to the examples.",
        sections="\n".join(_section(operation, base_url) for operation in _OPERATIONS),
    )


def _operation(operation: _Operation) -> dict[str, Any]:
    codes = sorted({*operation.codes, *_ANY_OPERATION, *(_WITH_KEY if operation.scope else ())})
    names = [REQUEST_ID, OPENAI_REQUEST_ID]
    if operation.routed:
        names += [name for name in _RESPONSE_HEADERS if name.startswith("x-promptai-") and name != REQUEST_ID]
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "security": [{}, {"bearer": []}, {"apiKey": []}] if operation.scope else [],
        "responses": {
            "200": {
                "description": "Success.",
                "headers": {name: _header(name) for name in names},
                "content": {kind: {"schema": schema} for kind, schema in operation.content.items()},
            }
        }
        | {str(code): {"$ref": f"#/components/responses/Error{code}"} for code in codes},
    }
    if operation.scope:
        described["description"] = f"An API key needs the scope {operation.scope} or admin."
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.headers:
        described["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in operation.headers]
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
    schema, example, text = _REQUEST_HEADERS[name]
    return {"name": name, "in": "header", "description": text, "schema": schema, "example": example}


def _section(operation: _Operation, base_url: str) -> str:
    curl = f"curl {base_url}{operation.path}"
    if operation.example is not None:
        curl += f" \\\n  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(operation.example)}'"
    needs = f"scope {operation.scope}" if operation.scope else "needs no key"
    headers = "".join(
        f"<p><small><code>{name}: {example}</code> {html.escape(text)}</small></p>\n"
        for name, (_, example, text) in _REQUEST_HEADERS.items()
        if name in operation.headers
    )
    return (
        f"<section>\n<h2><span>{operation.method.upper()}</span> {html.escape(operation.path)}</h2>\n"
        f"<p>{html.escape(operation.summary)} <small>({needs})</small></p>\n"
        f"{headers}<pre><code>{html.escape(curl)}</code></pre>\n</section>"
    )


def _data(name: str) -> str:
    return (resources.files("promptai.gateway") / "data" / name).read_text(encoding="utf-8")
