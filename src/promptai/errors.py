"""The tree of errors that PromptAI raises on purpose.

A person in front of a board at night needs one line: what happened, to what, and what to do next. So every error
carries a ``message`` (what happened, to what) and a ``hint`` (what to do next); the command line prints these two and
exits with ``exit_code``, and ``gateway.errors`` maps each class to an HTTP status. An exception outside this tree is a
bug and may show a traceback.

    PromptAIError                  1
    ├── SettingsError              2   same as a wrong option
    ├── ModelError                 3
    │   ├── ModelNotFoundError
    │   ├── ModelFormatError
    │   ├── ModelTooLargeError
    │   ├── ModelChecksumError
    │   └── LibraryError
    ├── EngineError                4
    │   ├── EngineNotFoundError
    │   ├── EngineStartError
    │   ├── EngineDiedError
    │   ├── EngineRefusedError
    │   └── EngineProtocolError
    ├── WorkloadError              5
    ├── RunError                   6
    ├── HubError                   7
    │   ├── HubNotFoundError
    │   ├── HubGatedError
    │   └── HubUnreachableError
    └── RoutingError               8
        ├── SaturatedError
        ├── NoCapacityError
        ├── RequestRefusedError
        └── BrokenOffError
    interrupted (Ctrl-C)         130   by convention, 128 + SIGINT

Exceptions of libraries are translated where the library is called, never here.
"""


class PromptAIError(Exception):
    """
    An error that the user can understand and act on.

    Attributes:
        message: What happened, to what, in one line.
        hint: What to do next, in one line; empty if there is nothing to do.
        exit_code: Exit code of the command line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SettingsError(PromptAIError):
    """A setting or option is unknown, of the wrong type or out of range."""

    exit_code = 2


class ModelError(PromptAIError):
    """A model file cannot be used."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """A model file does not exist."""


class ModelFormatError(ModelError):
    """A file is not a GGUF file, or is damaged."""


class ModelTooLargeError(ModelError):
    """A model needs more memory than is available on this machine."""


class ModelChecksumError(ModelError):
    """A file does not match the checksum of its source."""


class LibraryError(ModelError):
    """The library has no space left, or cannot be read or written."""


class EngineError(PromptAIError):
    """A llama-server cannot be found, started, reached or understood."""

    exit_code = 4


class EngineNotFoundError(EngineError):
    """An engine does not exist at the configured path, or none is installed."""


class EngineStartError(EngineError):
    """An engine exited or did not respond while it was starting."""


class EngineDiedError(EngineError):
    """An engine cannot be reached, broke off, or did not answer in time."""


class EngineRefusedError(EngineError):
    """
    An engine answered a request with an error.

    Attributes:
        status: HTTP status, or the code of an error event; ``None``: unknown.
        kind: The ``type`` in the error envelope, e.g. ``exceed_context_size_error``.
        body: The response body, possibly truncated.
        retry_after_s: Seconds of ``Retry-After``; ``None`` without one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None,
        kind: str | None,
        hint: str = "",
        body: bytes = b"",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.kind = kind
        self.body = body
        self.retry_after_s = retry_after_s


class EngineProtocolError(EngineError):
    """An engine sent a response that its API does not allow."""


class WorkloadError(PromptAIError):
    """A file of conversations is malformed; names the file and the line."""

    exit_code = 5


class RunError(PromptAIError):
    """A run directory cannot be created, written, read or resumed."""

    exit_code = 6


class HubError(PromptAIError):
    """A model hub or file server cannot provide a file."""

    exit_code = 7


class HubNotFoundError(HubError):
    """A hub has no repository or file of that name, or none that is visible without access."""


class HubGatedError(HubError):
    """A hub provides a file only to users who have accepted its licence."""


class HubUnreachableError(HubError):
    """A server cannot be reached, is overloaded, or disconnected; trying again may help."""


class RoutingError(PromptAIError):
    """The gateway has no replica for a request, or has lost it."""

    exit_code = 8


class SaturatedError(RoutingError):
    """
    The queue is full, or a request has waited for too long.

    Attributes:
        retry_after_s: Estimated seconds until a slot is free.
    """

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NoCapacityError(RoutingError):
    """
    No replica can serve a model.

    Attributes:
        retry_after_s: Seconds until a replica may be back; ``None``: unknown.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class RequestRefusedError(RoutingError):
    """
    A request is invalid on every replica.

    Attributes:
        status: HTTP status; ``code`` and ``param`` are those of OpenAI's errors.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param


class BrokenOffError(RoutingError):
    """An answer that has begun cannot be completed on any replica."""
