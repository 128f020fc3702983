"""From a request as it came to a flight: which model it means, whether it fits, how long it may take.

Everything that can be refused is refused here, with the numbers, before anything waits or is
sent: unknown names, prompts that no context holds, fields of the wrong kind. Nothing is cut off
and no field that is unknown here is dropped; aliases fill only what the request left open.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from promptai.engine.upstream import Upstream
from promptai.errors import NoCapacityError, RequestRefusedError
from promptai.fleet.replica import Snapshot
from promptai.gateway.auth import Caller
from promptai.router.dispatch import Dispatcher
from promptai.router.flight import Flight, Order
from promptai.router.grant import Job
from promptai.router.policy import Choice
from promptai.router.prefix import chain
from promptai.router.selection import (
    Auto,
    ContextFits,
    ContextTooLong,
    ModelUnknown,
    Names,
    Wanted,
    check_context,
    choose_auto,
    parse_budget,
    resolve,
)
from promptai.wire.passing import PassingRequest

#: Tokens that a chat template puts around a message: 3 to 8 in those of the catalogue.
_MESSAGE_TOKENS = 5.0
_PATHS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """
    What may be changed while the gateway runs.

    Attributes:
        names: Aliases, and the default.
        fallbacks: The model for prompts that one does not hold, by that one's name.
        wait_s: The longest that a request may be queued.
        stall_s: Silence of an engine beyond what computing explains.
        attempts: How often one request may be sent.
    """

    names: Names = Names()
    fallbacks: dict[str, str] = {}
    wait_s: float = 600.0
    stall_s: float = 15.0
    attempts: int = 4


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """
    A request that has been accepted.

    Attributes:
        model: That was chosen; ``why`` is one line, empty where the name alone decided.
    """

    flight: Flight
    request: PassingRequest
    model: str
    why: str


class Desk:
    """Accepts requests; one for a gateway."""

    def __init__(self, dispatcher: Dispatcher, upstream: Upstream, serving: Serving | None = None) -> None:
        self.dispatcher = dispatcher
        self.upstream = upstream
        self.serving = serving or Serving()

    def accept(self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller) -> Ticket:
        """
        Decide what a request is for.

        Raises:
            RequestRefusedError: It cannot be served as it is.
            ApiError: The key may not use that model.
        """
        wanted, filled, request = self._read(path, body, caller)
        caller.demand_model(wanted.name)
        text = request.text()
        job = self._job(wanted.model, request, text, headers, caller)
        model, why = self._model(wanted, request, job, headers, caller)
        if model != job.model:
            job = self._job(model, request, text, headers, caller)
        caller.demand_model(model)
        order = Order(
            path=path,
            body=filled,
            request=request,
            text=text,
            attempts=self.serving.attempts,
            stall_s=self.serving.stall_s,
        )
        flight = Flight(order, job, self.dispatcher, self.upstream)
        return Ticket(flight=flight, request=request, model=model, why=why)

    def decide(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller
    ) -> tuple[Ticket, Choice | None]:
        """What would happen to a request, and where it would go; nothing is sent."""
        ticket = self.accept(path, body, headers, caller)
        return ticket, self.dispatcher.preview(ticket.flight.job)

    def unknown(self, name: str | None, caller: Caller) -> RequestRefusedError:
        """That there is no such model; of those that there are, it names what the caller may use."""
        found = resolve(name, self.dispatcher.accounts.fleet.snapshot.models, self.serving.names)
        message, hint = "there is no such model", ""
        if isinstance(found, ModelUnknown):
            known, near = (tuple(filter(caller.limits.allow, names)) for names in (found.known, found.near))
            allowed = msgspec.structs.replace(found, known=known, near=near)
            message, hint = allowed.message, allowed.hint
        return RequestRefusedError(message, status=404, code="model_not_found", param="model", hint=hint)

    def _read(self, path: str, body: dict[str, Any], caller: Caller) -> tuple[Wanted, dict[str, Any], PassingRequest]:
        request = _convert(body)
        served = self.dispatcher.accounts.fleet.snapshot.models
        wanted = resolve(request.model, served, self.serving.names)
        if isinstance(wanted, ModelUnknown):
            raise self.unknown(request.model, caller)
        filled = wanted.filled(body)
        if filled != body:
            request = _convert(filled)
        _demand_field(path, request)
        _demand_roles(request)
        return wanted, filled, request

    def _job(self, model: str, request: PassingRequest, text: str, headers: Mapping[str, str], caller: Caller) -> Job:
        per_token = self.dispatcher.accounts.book.chars_per_token(model)
        return Job(
            model=model,
            prompt=chain(text),
            tokens=max(1.0, len(text) / per_token + _MESSAGE_TOKENS * len(request.messages or ())),
            limit=1 if request.input is not None else request.limit,
            key=caller.key_id,
            batch=headers.get("x-promptai-priority", "").lower() == "batch",
            wait_s=min(self.serving.wait_s, _seconds(headers, "x-promptai-deadline") or self.serving.wait_s),
        )

    def _model(
        self,
        wanted: Wanted,
        request: PassingRequest,
        job: Job,
        headers: Mapping[str, str],
        caller: Caller,
    ) -> tuple[str, str]:
        """The model that is meant, and why."""
        snapshot = self.dispatcher.accounts.fleet.snapshot
        if wanted.auto:
            models = [model for model in snapshot.models if caller.limits.allow(model)]
            if not models:
                raise NoCapacityError("no model is served that auto could take", hint="see /v1/models")
            autos = [self._auto(model, msgspec.structs.replace(job, model=model), snapshot) for model in models]
            chosen = choose_auto(autos, _seconds(headers, "x-promptai-budget"), request.limit)
            if chosen.model is None:
                # Where nobody is there to ask, the dispatcher says so.
                self._demand_somebody(autos, job)
                raise RequestRefusedError(chosen.reason, code="context_length_exceeded", hint="shorten the prompt")
            return chosen.model, chosen.reason

        def check(tokens: float) -> ContextFits | ContextTooLong:
            return check_context(
                wanted.model,
                round(tokens),
                replicas=snapshot.replicas,
                fallbacks=self.serving.fallbacks,
            )

        # An engine knows no fallback, so what is probably too long goes there; but only what is surely too long is
        # refused here: the engine counts exactly.
        found = check(job.tokens)
        found = found if isinstance(found, ContextFits) else check(job.fewest)
        if isinstance(found, ContextTooLong):
            raise RequestRefusedError(
                found.message.replace("has ", "has about ", 1),
                code="context_length_exceeded",
                param="messages" if request.messages is not None else "prompt",
                hint=found.hint,
            )
        return found.model, found.reason.replace("prompt has ", "prompt has about ", 1)

    def _demand_somebody(self, autos: Sequence[Auto], job: Job) -> None:
        """Raise ``NoCapacityError`` where no model has a replica that could be asked, however short the prompt."""
        short = msgspec.structs.replace(job, tokens=1.0, prompt=chain(""))
        accounts = self.dispatcher.accounts
        for auto in autos:
            if accounts.candidates(msgspec.structs.replace(short, model=auto.model)):
                return
        raise self.dispatcher.no_capacity(autos[0].model)

    def _auto(self, model: str, job: Job, snapshot: Snapshot) -> Auto:
        own = snapshot.of(model)
        accounts, choice = self.dispatcher.accounts, self.dispatcher.preview(job)
        finish: float | None = None
        if choice is not None and accounts.book.source(choice.load.replica) != "unknown":
            streams = len(choice.load.running) + 1
            tokens = accounts.expected(job) if job.limit is None else float(job.limit)
            finish = choice.estimate.ttft_s + tokens * choice.load.step(streams)
        contexts = [replica.context for replica in own if replica.context is not None]
        return Auto(
            model=model,
            capability=max((r.capability for r in own if r.capability is not None), default=None),
            accuracy=max((r.accuracy for r in own if r.accuracy is not None), default=None),
            finish_s=finish,
            fits_context=choice is not None and (not contexts or max(contexts) > job.tokens * 0.9),
        )


def path_for(body: Mapping[str, Any]) -> str:
    """Where a request belongs that came without a path."""
    return next((path for path, field in _PATHS.items() if body.get(field) is not None), "/v1/chat/completions")


def _convert(body: dict[str, Any]) -> PassingRequest:
    try:
        return msgspec.convert(body, PassingRequest)
    except msgspec.ValidationError as error:
        text = str(error)
        param = text.rpartition("`$.")[2].rstrip("`").partition("[")[0] if "`$." in text else None
        raise RequestRefusedError(f"the request is wrong: {text}", code="wrong_type", param=param) from None


def _demand_field(path: str, request: PassingRequest) -> None:
    """
    Refuse a request that is not of its path alone.

    Of what belongs to two paths one half would be dropped without a word.
    """
    for home, field in _PATHS.items():
        if home != path and getattr(request, field) is not None:
            hint = f"{field} goes to {home}; {path} takes {_PATHS[path]}"
            raise RequestRefusedError(f"{path} takes no {field}", code="wrong_field", param=field, hint=hint)
    field = _PATHS[path]
    if not getattr(request, field):
        raise RequestRefusedError(
            f"the request has no {field}", code="missing_field", param=field, hint=f"{path} needs {field}"
        )


def _demand_roles(request: PassingRequest) -> None:
    """llama-server answers a message without a role with HTTP 500, as if it were broken itself."""
    for number, message in enumerate(request.messages or ()):
        if not isinstance(message.get("role"), str):
            raise RequestRefusedError(
                f"message {number} has no role", code="wrong_type", param="messages", hint="user, assistant, system"
            )


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    given = headers.get(name)
    if given is None:
        return None
    try:
        return parse_budget(given)
    except ValueError as error:
        raise RequestRefusedError(f"{name}: {error}", code="wrong_header", param=name) from None
