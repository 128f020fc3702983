"""Read a JSON object from a request, within limits of size, time and depth.

A board has little memory: the size is checked while a body arrives, and a client that sends it too slowly is cut off.
JSON that is valid but cannot be encoded again (unlimited nesting) is refused here rather than deeper inside. If a key
occurs twice, its last value counts, as in most JSON parsers.
"""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from promptai.gateway.errors import ApiError
from promptai.wire.malformed import MALFORMED

#: Far above tools with nested schemas; every encoder on the way supports it.
MAX_DEPTH = 100


async def read_json(request: web.Request, *, limit_bytes: int, limit_s: float) -> dict[str, Any]:
    """
    Return the request's body.

    Args:
        limit_bytes: Largest body, after decompression.
        limit_s: Longest time for the whole body to arrive.

    Raises:
        ApiError: 400 (not a JSON object), 408 (too slow) or 413 (too large).
        ConnectionError: The client has disconnected.
    """
    if request.content_length is not None and request.content_length > limit_bytes:
        raise _too_large(limit_bytes)
    try:
        if request.content.is_eof():  # arrived with the head, as nearly every body does
            data = await _read(request, limit_bytes)
        else:
            async with asyncio.timeout(limit_s):
                data = await _read(request, limit_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limit_s:g} s", code="body_timeout", hint="send it faster"
        ) from None
    return decode_object(data)


def decode_object(data: bytes) -> dict[str, Any]:
    """
    Return the JSON object in ``data``; it can be encoded again.

    Raises:
        ApiError: 400; not such an object.
    """
    if not data:
        raise _malformed("the request has no body")
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError:
        raise _malformed("the body is not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except MALFORMED as error:
        raise _malformed(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _malformed(f"the body is {_name(value)}, not a JSON object")
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _too_deep()
    return value


async def _read(request: web.Request, limit_bytes: int) -> bytes:
    data = bytearray()
    try:
        async for chunk in request.content.iter_any():
            data += chunk
            if len(data) > limit_bytes:
                raise _too_large(limit_bytes)
    except web.RequestPayloadError:
        raise _malformed("the body is not encoded as its headers declare") from None
    return bytes(data)


def _deeper_than(value: object, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _malformed(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json", hint="send one JSON object")


def _too_deep() -> ApiError:
    return _malformed(f"the body is nested deeper than {MAX_DEPTH} levels")


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body exceeds the limit of {limit_bytes:,} bytes",
        code="request_too_large",
        hint="shorten the conversation",
    )
