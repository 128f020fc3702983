"""The map from errors to HTTP: complete, and with the right status for each class."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator

import msgspec
import pytest

import promptai
from promptai import errors
from promptai.errors import PromptAIError
from promptai.gateway.errors import _BY_CLASS, ApiError, api_error, engine_refusal, error_type


def error_classes() -> set[type[PromptAIError]]:
    """Return every error class of the package, wherever it is defined."""
    for module in pkgutil.walk_packages(promptai.__path__, "promptai."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return {cls for cls in subclasses(PromptAIError) if cls.__module__.partition(".")[0] == "promptai"}


def subclasses(cls: type[PromptAIError]) -> Iterator[type[PromptAIError]]:
    """Yield a class and all its subclasses, recursively."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from subclasses(subclass)


def unmapped(classes: Iterable[type[PromptAIError]]) -> list[str]:
    """Return the names of the classes without an entry of their own in the map."""
    return sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in classes if cls not in _BY_CLASS)


@pytest.mark.timeout(30)
def test_every_error_class_has_a_status() -> None:
    classes = error_classes()

    assert classes >= {PromptAIError, errors.BrokenOffError, errors.EngineRefusedError}
    assert unmapped(classes) == []


def test_an_unmapped_subclass_is_reported() -> None:
    class NewError(errors.RoutingError):
        """An error class that was added without a status."""

    (name,) = unmapped([*_BY_CLASS, NewError])  # type: ignore[list-item]

    assert name.endswith("NewError")
    assert NewError in subclasses(PromptAIError)
    # Until then it gets the status of its base class.
    assert api_error(NewError("new")).status == 500


def refused_by_engine(status: int | None, retry_after_s: float | None = None) -> errors.EngineRefusedError:
    return errors.EngineRefusedError("refused", status=status, kind=None, retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("error", "status", "code", "src"),
    [
        (errors.SaturatedError("full", retry_after_s=3.0), 429, "saturated", "gateway"),
        (errors.NoCapacityError("down"), 503, "no_capacity", "gateway"),
        (errors.RequestRefusedError("no", status=404, code="model_not_found"), 404, "model_not_found", "gateway"),
        (errors.RequestRefusedError("no"), 400, None, "gateway"),
        (errors.BrokenOffError("lost"), 502, "broken_off", "engine"),
        (errors.ModelNotFoundError("no model"), 404, "model_not_found", "gateway"),
        (errors.EngineDiedError("died"), 502, None, "engine"),
        (errors.EngineProtocolError("odd"), 502, None, "engine"),
        (errors.EngineError("down"), 503, None, "engine"),
        (errors.EngineNotFoundError("none"), 503, None, "engine"),
        (errors.EngineStartError("not started"), 503, None, "engine"),
        *(
            (cls("failed"), 500, None, "gateway")
            for cls in (
                *(PromptAIError, errors.SettingsError, errors.RoutingError, errors.WorkloadError, errors.RunError),
                *(errors.ModelError, errors.ModelFormatError, errors.ModelTooLargeError),
                *(errors.ModelChecksumError, errors.LibraryError),
                *(errors.HubError, errors.HubNotFoundError, errors.HubGatedError, errors.HubUnreachableError),
            )
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PromptAIError) else None,
)
def test_each_error_has_its_status_code_and_source(
    error: PromptAIError, status: int, code: str | None, src: str
) -> None:
    found = api_error(error)

    assert (found.status, found.code, found.src, found.message) == (status, code, src, error.message)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, status) for status in (400, 404, 409, 413, 422, 429, 501, 503)),
        *((status, 502) for status in (401, 403, 407, 500, 502, 504, 599)),
        (None, 502),
    ],
)
def test_an_engines_refusal_keeps_its_status_unless_it_blames_the_wrong_side(status: int | None, expected: int) -> None:
    found = api_error(refused_by_engine(status))

    assert (found.status, found.src) == (expected, "engine")


def test_keeps_fields_and_retry_after() -> None:
    refused = api_error(errors.RequestRefusedError("no", param="model", hint="see /v1/models"))
    seconds = [
        api_error(error).retry_after_s
        for error in (
            errors.SaturatedError("full", retry_after_s=3.0),
            errors.NoCapacityError("down", retry_after_s=4.0),
            errors.NoCapacityError("down"),
            refused_by_engine(503, 5.0),
            refused_by_engine(400, 5.0),
        )
    ]

    assert (refused.param, refused.hint) == ("model", "see /v1/models")
    assert seconds == [3.0, 4.0, None, 5.0, None]


def test_an_api_error_is_returned_unchanged() -> None:
    error = ApiError(418, "teapot")

    assert api_error(error) is error


@pytest.mark.parametrize(
    ("status", "answered"),
    [(400, 400), (401, 502), (403, 502), (404, 404), (422, 422), (429, 429), (500, 502), (501, 501), (503, 503)],
)
def test_passes_on_an_engines_status_unless_it_blames_the_wrong_side(status: int, answered: int) -> None:
    """The key that an engine refuses is the gateway's, and a failing engine is not a failing gateway."""
    body = b'{"error": {"code": 500, "type": "strange_error", "message": "no"}}'
    error = engine_refusal(status, body)

    assert (answered, "engine", "no") == (error.status, error.src, error.message)
    assert (error.type, error.code) == ("strange_error", 500)


def test_keeps_the_numbers_of_a_too_long_prompt() -> None:
    sent = {"type": "exceed_context_size_error", "message": "m", "n_prompt_tokens": 9, "n_ctx": 4}

    error = msgspec.json.decode(engine_refusal(400, msgspec.json.encode({"error": {"code": 400, **sent}})).body())[
        "error"
    ]

    assert sent == {name: error[name] for name in sent}


@pytest.mark.parametrize(
    ("kind", "code", "answered"),
    [
        ("exceed_context_size_error", 400, "context_length_exceeded"),
        ("exceed_context_size_error", None, "context_length_exceeded"),
        ("exceed_context_size_error", "context_length_exceeded", "context_length_exceeded"),
        ("invalid_request_error", 400, 400),
        ("invalid_request_error", "invalid_prompt", "invalid_prompt"),
        (None, None, None),
    ],
)
def test_a_too_long_prompt_has_openais_code(
    kind: str | None, code: int | str | None, answered: int | str | None
) -> None:
    """The same code as when the gateway refuses the prompt; other codes are the engine's."""
    body = msgspec.json.encode({"error": {"type": kind, "code": code, "message": "m"}})

    assert engine_refusal(400, body).code == answered


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"\xff", b"[" * 5000, b'{"error": {"message": ""}}'])
def test_an_unreadable_engine_error_is_reported_with_its_status(body: bytes) -> None:
    assert engine_refusal(500, body).message == "the engine answered HTTP 500 without a reason"


def test_does_not_repeat_the_hint_of_another_gateway() -> None:
    remote = ApiError(429, "the queue is full", hint="wait", param="model")

    local = msgspec.json.decode(engine_refusal(429, remote.body()).body())["error"]

    assert (local["message"], local["param"]) == ("the queue is full (wait)", "model")


def test_error_type() -> None:
    kinds = {status: error_type(status) for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 502, 503, 504)}

    assert kinds == {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "timeout_error",
        413: "invalid_request_error",
        429: "rate_limit_error",
        500: "server_error",
        502: "server_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
