"""Everything that can go wrong on purpose, in one tree.

A person in front of a board at night needs one line: what happened, to what,
and what to do next. So every error that PromptAI raises deliberately carries a
``message`` (what happened, to what) and a ``hint`` (what to do next), and the
command line prints exactly these two and leaves with ``exit_code``. Whatever is
not in this tree is a bug of ours and may show a traceback.

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
    Something went wrong that the user can understand and act on.

    Attributes:
        message: One line: what happened, to what.
        hint: One line: what to do next; empty when there is nothing to do.
        exit_code: What the command line leaves with.
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
    """There is no file where a model was expected."""


class ModelFormatError(ModelError):
    """A file is not a GGUF, or a damaged one."""


class ModelTooLargeError(ModelError):
    """A model needs more memory than this machine has left."""


class ModelChecksumError(ModelError):
    """A file is not the one that its source promised."""


class LibraryError(ModelError):
    """The directory where models are kept has no space left, or cannot be read or written."""


class EngineError(PromptAIError):
    """A llama-server cannot be found, started, reached or understood."""

    exit_code = 4


class EngineNotFoundError(EngineError):
    """No engine is where it was said to be, or none at all."""


class EngineStartError(EngineError):
    """An engine ended, or never answered, while it was starting."""


class EngineDiedError(EngineError):
    """An engine that was serving is gone."""


class EngineRefusedError(EngineError):
    """
    An engine answered a request with an error.

    Attributes:
        status: The HTTP status; ``None`` when the error came inside a stream.
        kind: The ``type`` of the error envelope, e.g. ``exceed_context_size_error``.
        body: What it sent, as far as it was kept.
        retry_after_s: When it wants to be asked again; ``None``: it did not say.
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
    """An engine answered something that its API does not allow."""


class WorkloadError(PromptAIError):
    """A file of conversations is malformed; names the file and the line."""

    exit_code = 5


class RunError(PromptAIError):
    """A run directory cannot be created, written, read or resumed."""

    exit_code = 6


class HubError(PromptAIError):
    """A model hub, or another server of files, does not give what was asked of it."""

    exit_code = 7


class HubNotFoundError(HubError):
    """A hub has no repository or file of that name, or does not show it to us."""


class HubGatedError(HubError):
    """A hub gives a file only to those who accepted its licence."""


class HubUnreachableError(HubError):
    """A server cannot be reached, is overloaded, or broke off; trying again may help."""


class RoutingError(PromptAIError):
    """The gateway has no replica for a request, or lost the one that it had."""

    exit_code = 8


class SaturatedError(RoutingError):
    """
    As many requests wait already as may wait, or one has waited for as long as it may.

    Attributes:
        retry_after_s: When the queue will have moved, as it looks now.
    """

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NoCapacityError(RoutingError):
    """
    No replica that could serve a model is there.

    Attributes:
        retry_after_s: When one may be back; ``None`` where nothing speaks for that.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class RequestRefusedError(RoutingError):
    """
    A request cannot be served as it is, wherever it goes.

    Attributes:
        status: What HTTP calls it; ``code`` and ``param`` as in OpenAI's errors.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param


class BrokenOffError(RoutingError):
    """An answer that had begun cannot be finished anywhere."""
