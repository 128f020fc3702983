"""From a request as it came to a flight: which model it means, whether it fits, how long it may take.

Everything that can be refused is refused here, with the numbers, before anything waits or is
sent: unknown names, prompts that no context holds, fields of the wrong kind. Nothing is cut off
and no field that is unknown here is dropped; aliases fill only what the request left open.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from promptai.engine.upstream import Upstream
from promptai.errors import NoCapacityError, RequestRefusedError
from promptai.fleet.replica import Snapshot
from promptai.gateway.auth import Caller
from promptai.router.estimate.policy import Placement
from promptai.router.estimate.prefix import Chain, chain
from promptai.router.failover.order import ClientRequest
from promptai.router.failover.request import RoutedRequest
from promptai.router.failover.resume import answers
from promptai.router.schedule.dispatcher import Dispatcher
from promptai.router.schedule.lease import RouteRequest
from promptai.router.selection import (
    AUTO,
    DEFAULT,
    AutoCandidate,
    ContextFits,
    ContextTooLong,
    ModelNames,
    ResolvedName,
    UnknownModel,
    check_context,
    choose_auto,
    parse_budget,
    resolve,
)
from promptai.wire.inference import InferenceRequest, Prompt

#: Tokens that a chat template puts around a message: 3 to 8 in those of the catalogue.
_MESSAGE_TOKENS = 5.0
#: Of an estimate: as much as a context has to hold for ``auto`` to try it.
_DOUBT = 0.9
#: No answer is longer and no engine gives more of them, whatever a request says. They go into sums of floats, which
#: must hold the tokens of others beside them.
_MOST_TOKENS, _MOST_ANSWERS = 10**7, 4096
_PATHS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}


class AdmissionRules(msgspec.Struct, frozen=True, kw_only=True):
    """
    What may be changed while the gateway runs.

    Attributes:
        names: Aliases, and the default.
        fallbacks: The model for prompts that one does not hold, by that one's name.
        wait_s: The longest that a request may be queued.
        stall_s: Silence of an engine beyond what computing explains.
        attempts: How often one request may be sent.
    """

    names: ModelNames = ModelNames()
    fallbacks: dict[str, str] = {}
    wait_s: float = 600.0
    stall_s: float = 15.0
    attempts: int = 4


class AdmittedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A request that has been accepted.

    Attributes:
        model: That was chosen; ``why`` is one line, empty where the name alone decided.
        tokens: Of its prompt and its answers, as many as are expected.
    """

    routed: RoutedRequest
    request: InferenceRequest
    model: str
    why: str
    tokens: int


class _ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has been read, and whose it is."""

    path: str
    wanted: ResolvedName
    body: dict[str, Any]
    request: InferenceRequest
    prompts: tuple[Prompt, ...]
    headers: Mapping[str, str]
    caller: Caller

    @property
    def permitted(self) -> bool:
        """Whether its key may use what it means, by the name that stands for it or by its own."""
        return any(self.caller.limits.allow(name) for name in (self.wanted.meant, self.wanted.model))

    def demand_permission(self) -> None:
        """
        See that its key may use the name that it gave, and what is meant.

        Raises:
            ApiError: 403.
        """
        if self.wanted.name != DEFAULT:
            self.caller.demand_model(self.wanted.name)
        if not self.permitted and not self.wanted.auto:
            self.caller.demand_model(self.wanted.model)

    @property
    def text(self) -> str:
        """See ``InferenceRequest.text``."""
        return self.prompts[0].text if len(self.prompts) == 1 else self.request.text()

    def longest(self, chars_per_token: float) -> Prompt:
        """The one of its prompts that needs the largest context."""
        return max(self.prompts, key=lambda prompt: prompt.tokens(chars_per_token))


class Admission:
    """Accepts requests; one for a gateway."""

    def __init__(self, dispatcher: Dispatcher, upstream: Upstream, serving: AdmissionRules | None = None) -> None:
        self.dispatcher = dispatcher
        self.upstream = upstream
        self.serving = serving or AdmissionRules()

    def accept(self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller) -> AdmittedRequest:
        """
        Decide what a request is for.

        Raises:
            RequestRefusedError: It cannot be served as it is.
            ApiError: The key may not use that model.
        """
        asked = self._read(path, body, headers, caller)
        asked.demand_permission()
        route_request = self._route_request(asked.wanted.model, asked)
        model, why = self._model(asked, route_request)
        if model != route_request.model:
            route_request = self._route_request(model, asked)
        order = ClientRequest(
            path=path,
            body=asked.body,
            request=asked.request,
            text=asked.text,
            attempts=self.serving.attempts,
            stall_s=self.serving.stall_s,
        )
        routed = RoutedRequest(order, route_request, self.dispatcher, self.upstream)
        return AdmittedRequest(
            routed=routed, request=asked.request, model=model, why=why, tokens=self._tokens(asked, route_request)
        )

    def decide(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller
    ) -> tuple[AdmittedRequest, Placement | None]:
        """What would happen to a request, and where it would go; nothing is sent."""
        admitted = self.accept(path, body, headers, caller)
        return admitted, self.dispatcher.preview(admitted.routed.route_request)

    def unknown(self, name: str | None, caller: Caller) -> RequestRefusedError:
        """That there is no such model; of those that there are, it names what the caller may use."""
        found = resolve(name, self.dispatcher.fleet_state.fleet.snapshot.models, self.serving.names)
        message, hint = "there is no such model", ""
        if isinstance(found, UnknownModel):
            known, near = (tuple(filter(caller.limits.allow, names)) for names in (found.known, found.near))
            allowed = msgspec.structs.replace(found, known=known, near=near)
            message, hint = allowed.message, allowed.hint
        return RequestRefusedError(message, status=404, code="model_not_found", param="model", hint=hint)

    def _read(self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller) -> _ParsedRequest:
        request = _convert(body)
        served = self.dispatcher.fleet_state.fleet.snapshot.models
        wanted = resolve(request.model, served, self.serving.names)
        if isinstance(wanted, UnknownModel):
            raise self.unknown(request.model, caller)
        filled = wanted.filled(body)
        if filled != body:
            request = _convert(filled)
        _demand_field(path, request)
        _demand_roles(request)
        return _ParsedRequest(
            path=path,
            wanted=wanted,
            body=filled,
            request=request,
            prompts=request.prompts(),
            headers=headers,
            caller=caller,
        )

    def _route_request(self, model: str, asked: _ParsedRequest) -> RouteRequest:
        per_token = self.dispatcher.fleet_state.book.chars_per_token(model)
        request, headers = asked.request, asked.headers
        text = asked.longest(per_token).text
        tokens = sum(prompt.tokens(per_token) for prompt in asked.prompts)
        return RouteRequest(
            model=model,
            # Which one of several a slot's cache will hold nobody knows; but a context has to hold the longest.
            prompt=chain(text) if len(asked.prompts) == 1 else Chain((), len(text)),
            tokens=max(1.0, tokens + _MESSAGE_TOKENS * len(request.messages or ())),
            longest=asked.longest(per_token).tokens(per_token) if len(asked.prompts) > 1 else None,
            limit=1 if request.input is not None else _bounded(request.limit),
            answers=min(answers(request), _MOST_ANSWERS),
            key=asked.caller.key_id,
            batch=headers.get("x-promptai-priority", "").lower() == "batch",
            wait_s=min(self.serving.wait_s, _seconds(headers, "x-promptai-deadline") or self.serving.wait_s),
        )

    def _model(self, asked: _ParsedRequest, route_request: RouteRequest) -> tuple[str, str]:
        """The model that is meant, and why."""
        if asked.wanted.auto:
            return self._chosen(asked, route_request)
        found = self._held_by(asked, route_request, route_request.longest or route_request.tokens)
        if isinstance(found, ContextTooLong):
            # An engine knows no fallback, so what is probably too long goes there; but only what is surely too long
            # is refused here: the engine counts exactly.
            surely = self._held_by(
                asked, route_request, max(route_request.fewest, *(prompt.ids for prompt in asked.prompts))
            )
            if isinstance(surely, ContextTooLong):
                message = found.message.replace("has ", "has about ", 1)
                raise _too_long(asked, message, found.hint)
            found = surely
        return found.model, found.reason.replace("prompt has ", "prompt has about ", 1)

    def _held_by(
        self, asked: _ParsedRequest, route_request: RouteRequest, tokens: float
    ) -> ContextFits | ContextTooLong:
        """Who holds a prompt of so many tokens: the model that is meant, or a fallback that the key may use."""
        allow = asked.caller.limits.allow
        return check_context(
            route_request.model,
            round(tokens),
            replicas=self.dispatcher.fleet_state.fleet.snapshot.replicas,
            fallbacks={short: long for short, long in self.serving.fallbacks.items() if allow(long)},
        )

    def _chosen(self, asked: _ParsedRequest, route_request: RouteRequest) -> tuple[str, str]:
        """The model that ``auto`` takes, and why."""
        snapshot = self.dispatcher.fleet_state.fleet.snapshot
        if not snapshot.models:
            raise NoCapacityError("no model is served that auto could take", hint="see /v1/models")
        models = [model for model in snapshot.models if asked.permitted or asked.caller.limits.allow(model)]
        if not models:
            asked.caller.demand_model(AUTO)
        longest = route_request.longest or route_request.tokens
        autos = [self._auto(msgspec.structs.replace(route_request, model=model), longest, snapshot) for model in models]
        chosen = choose_auto(autos, _seconds(asked.headers, "x-promptai-budget"), route_request.limit)
        if chosen.model is None:
            # Whoever holds it is away for the moment: it is not the prompt that is to blame.
            away = next((model for model in models if _likely_holds(model, longest, snapshot)), None)
            if away is not None:
                raise self.dispatcher.no_capacity(away)
            raise _too_long(asked, chosen.reason, "shorten the prompt")
        return chosen.model, chosen.reason

    def _auto(self, route_request: RouteRequest, longest: float, snapshot: Snapshot) -> AutoCandidate:
        own = snapshot.of(route_request.model)
        fleet_state, placement = self.dispatcher.fleet_state, self.dispatcher.preview(route_request)
        finish: float | None = None
        if placement is not None and fleet_state.book.source(placement.view.replica) != "unknown":
            streams = len(placement.view.running) + 1
            tokens = self._answer_tokens(route_request, longest, placement.view.replica.context)
            finish = placement.estimate.ttft_s + tokens * placement.view.step_s(streams)
        return AutoCandidate(
            model=route_request.model,
            capability=max((r.capability for r in own if r.capability is not None), default=None),
            accuracy=max((r.accuracy for r in own if r.accuracy is not None), default=None),
            finish_s=finish,
            fits_context=placement is not None and _likely_holds(route_request.model, longest, snapshot),
        )

    def _answer_tokens(self, route_request: RouteRequest, longest: float, context: int | None) -> float:
        """Tokens of one answer, if it is as long as it may be; as answers usually are where nothing limits them."""
        if route_request.limit is None:
            return self.dispatcher.fleet_state.expected(route_request)
        return (
            float(route_request.limit)
            if context is None
            else min(float(route_request.limit), max(1.0, context - longest))
        )

    def _tokens(self, asked: _ParsedRequest, route_request: RouteRequest) -> int:
        """Tokens that a request will probably use: see ``AdmittedRequest``."""
        generated = (
            0.0
            if asked.request.input is not None
            else route_request.answers * self.dispatcher.fleet_state.expected(route_request)
        )
        return round(route_request.tokens + generated)


def _bounded(limit: int | None) -> int | None:
    return None if limit is None else min(limit, _MOST_TOKENS)


def path_for(body: Mapping[str, Any]) -> str:
    """Where a request belongs that came without a path."""
    return next((path for path, field in _PATHS.items() if body.get(field) is not None), "/v1/chat/completions")


def _convert(body: dict[str, Any]) -> InferenceRequest:
    try:
        return msgspec.convert(body, InferenceRequest)
    except msgspec.ValidationError as error:
        text = str(error)
        param = text.rpartition("`$.")[2].rstrip("`").partition("[")[0] if "`$." in text else None
        raise RequestRefusedError(f"the request is wrong: {text}", code="wrong_type", param=param) from None


def _too_long(asked: _ParsedRequest, message: str, hint: str) -> RequestRefusedError:
    return RequestRefusedError(message, code="context_length_exceeded", param=_PATHS[asked.path], hint=hint)


def _likely_holds(model: str, tokens: float, snapshot: Snapshot) -> bool:
    """Whether a replica of a model, there or away, has a context for so many tokens, which are an estimate."""
    found = check_context(model, int(_DOUBT * tokens), replicas=snapshot.replicas, fallbacks={})
    return isinstance(found, ContextFits)


def _demand_field(path: str, request: InferenceRequest) -> None:
    """
    Refuse a request that is not of its path alone.

    Of what belongs to two paths one half would be dropped without a word.
    """
    for home, field in _PATHS.items():
        if home != path and getattr(request, field) is not None:
            hint = f"{field} goes to {home}; {path} takes {_PATHS[path]}"
            raise RequestRefusedError(f"{path} takes no {field}", code="wrong_field", param=field, hint=hint)
    field = _PATHS[path]
    # An empty text is one: engines answer it.
    if getattr(request, field) in (None, []):
        raise RequestRefusedError(
            f"the request has no {field}", code="missing_field", param=field, hint=f"{path} needs {field}"
        )


def _demand_roles(request: InferenceRequest) -> None:
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
