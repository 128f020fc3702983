"""Admit a request: resolve its model, check that it fits, and bound its time.

A request that its own content and the fleet's snapshot suffice to refuse is refused here, before it is queued: unknown
models, fields of the wrong type, prompts too long for the model and its fallbacks. No prompt is truncated and no
unknown field is dropped; the parameters of an alias apply only to fields that the request leaves open.
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
from promptai.router.failover.protocol import ClientRequest
from promptai.router.failover.request import RoutedRequest
from promptai.router.schedule.dispatcher import Dispatcher
from promptai.router.schedule.lease import SlotRequest
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

#: Tokens that a chat template adds per message: 3 to 8 in the catalogue's templates.
_MESSAGE_TOKENS = 5.0
#: Share of the estimated prompt that a context must hold for ``auto`` to consider the model.
_ESTIMATE_MARGIN = 0.9
#: Bounds for sums: no answer is longer and no engine gives more answers, but a request may contain any number.
_MAX_TOKENS, _MAX_ANSWERS = 10**7, 4096
_PATHS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}


class AdmissionRules(msgspec.Struct, frozen=True, kw_only=True):
    """
    Rules that may change while the gateway runs.

    Attributes:
        names: Aliases and the default model.
        fallbacks: Model with a larger context, by the name of the model whose context is too small.
        max_wait_s: Longest time in the queue.
        stall_s: Silence of an engine allowed beyond the time that pending work explains.
        max_attempts: Upper limit of attempts per request.
    """

    names: ModelNames = ModelNames()
    fallbacks: dict[str, str] = {}
    max_wait_s: float = 600.0
    stall_s: float = 15.0
    max_attempts: int = 4


class AdmittedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A request that has been admitted.

    Attributes:
        routed: The request, ready to be sent.
        fields: Its fields that the gateway reads.
        model: The chosen model.
        reason: Why, in one line; empty if the name alone decided.
        tokens: Estimated tokens of its prompts and answers.
    """

    routed: RoutedRequest
    fields: InferenceRequest
    model: str
    reason: str
    tokens: int


class _ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request with its resolved model name and its caller."""

    path: str
    name: ResolvedName
    body: dict[str, Any]
    fields: InferenceRequest
    prompts: tuple[Prompt, ...]
    headers: Mapping[str, str]
    caller: Caller

    @property
    def permitted(self) -> bool:
        """Whether the key permits the model, under the name it was resolved from or its own."""
        return any(self.caller.limits.allow(name) for name in (self.name.meant, self.name.model))

    def check_permission(self) -> None:
        """
        Check that the key permits the requested name; for the default, that name or its model.

        Raises:
            ApiError: 403.
        """
        if self.name.name != DEFAULT:
            self.caller.check_model(self.name.name)
        if not self.permitted and not self.name.auto:
            self.caller.check_model(self.name.model)

    @property
    def text(self) -> str:
        """See ``InferenceRequest.text``."""
        return self.prompts[0].text if len(self.prompts) == 1 else self.fields.text()

    def longest(self, chars_per_token: float) -> Prompt:
        """Return the prompt that needs the largest context."""
        return max(self.prompts, key=lambda prompt: prompt.tokens(chars_per_token))


class Admission:
    """Admits requests; one per gateway."""

    def __init__(self, dispatcher: Dispatcher, upstream: Upstream, rules: AdmissionRules | None = None) -> None:
        self.dispatcher = dispatcher
        self.upstream = upstream
        self.rules = rules or AdmissionRules()

    def admit(self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller) -> AdmittedRequest:
        """
        Choose the model of a request and prepare it for the router.

        Raises:
            RequestRefusedError, NoCapacityError: The request cannot be served.
            ApiError: The key does not permit the model.
        """
        parsed = self._parse(path, body, headers, caller)
        parsed.check_permission()
        slot_request = self._estimate(parsed)
        model, reason = self._choose_model(parsed, slot_request)
        if model != slot_request.model:
            slot_request = self._for_model(parsed, slot_request, model)
        client_request = ClientRequest(
            path=path,
            body=parsed.body,
            fields=parsed.fields,
            text=parsed.text,
            max_attempts=self.rules.max_attempts,
            stall_s=self.rules.stall_s,
        )
        return AdmittedRequest(
            routed=RoutedRequest(client_request, slot_request, self.dispatcher, self.upstream),
            fields=parsed.fields,
            model=model,
            reason=reason,
            tokens=self._total_tokens(parsed, slot_request),
        )

    def decide(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller
    ) -> tuple[AdmittedRequest, Placement | None]:
        """Return where a request would go; sends nothing. Raises as ``admit`` does."""
        admitted = self.admit(path, body, headers, caller)
        return admitted, self.dispatcher.preview(admitted.routed.slot_request)

    def unknown_model(self, name: str | None, caller: Caller) -> RequestRefusedError:
        """Return the error for a name that no model has; it lists only models that the caller may use."""
        found = resolve(name, self.dispatcher.fleet_state.fleet.snapshot.models, self.rules.names)
        if isinstance(found, UnknownModel):
            return _unknown_model(found, caller)
        return RequestRefusedError("no such model", status=404, code="model_not_found", param="model")

    # Reading

    def _parse(self, path: str, body: dict[str, Any], headers: Mapping[str, str], caller: Caller) -> _ParsedRequest:
        fields = _convert(body)
        served = self.dispatcher.fleet_state.fleet.snapshot.models
        name = resolve(fields.model, served, self.rules.names)
        if isinstance(name, UnknownModel):
            raise _unknown_model(name, caller)
        filled = name.filled(body)
        if filled != body:
            fields = _convert(filled)
        _check_field(path, fields)
        _check_roles(fields)
        prompts = fields.prompts()
        return _ParsedRequest(
            path=path, name=name, body=filled, fields=fields, prompts=prompts, headers=headers, caller=caller
        )

    def _estimate(self, parsed: _ParsedRequest) -> SlotRequest:
        """Return the request as the dispatcher needs it, for the model that its name stands for."""
        fields, headers, model = parsed.fields, parsed.headers, parsed.name.model
        longest = parsed.longest(self.dispatcher.fleet_state.book.chars_per_token(model)).text
        max_wait_s = self.rules.max_wait_s
        prompt_tokens, longest_prompt_tokens = self._prompt_tokens(parsed, model)
        return SlotRequest(
            model=model,
            # With several prompts it is unknown which one a slot's cache will hold.
            prompt=chain(longest) if len(parsed.prompts) == 1 else Chain((), len(longest)),
            prompt_tokens=prompt_tokens,
            longest_prompt_tokens=longest_prompt_tokens,
            max_tokens=1 if fields.input is not None else _bounded(fields.limit),
            answers=min(fields.answers, _MAX_ANSWERS),
            key=parsed.caller.key_id,
            batch=headers.get("x-promptai-priority", "").lower() == "batch",
            max_wait_s=min(max_wait_s, _seconds(headers, "x-promptai-deadline") or max_wait_s),
        )

    def _for_model(self, parsed: _ParsedRequest, slot_request: SlotRequest, model: str) -> SlotRequest:
        """Return the request for another model, whose tokens may have another length."""
        prompt_tokens, longest = self._prompt_tokens(parsed, model)
        return msgspec.structs.replace(
            slot_request, model=model, prompt_tokens=prompt_tokens, longest_prompt_tokens=longest
        )

    def _prompt_tokens(self, parsed: _ParsedRequest, model: str) -> tuple[float, float | None]:
        """Estimated tokens of all prompts, and of the longest if there are several."""
        per_token = self.dispatcher.fleet_state.book.chars_per_token(model)
        tokens = [prompt.tokens(per_token) for prompt in parsed.prompts]
        template_tokens = _MESSAGE_TOKENS * len(parsed.fields.messages or ())
        return max(1.0, sum(tokens) + template_tokens), max(tokens) if len(tokens) > 1 else None

    # Choosing the model

    def _choose_model(self, parsed: _ParsedRequest, slot_request: SlotRequest) -> tuple[str, str]:
        """Return the model and the reason for it."""
        if parsed.name.auto:
            return self._choose_auto(parsed, slot_request)
        found = self._check_context(parsed, slot_request.longest_prompt_tokens or slot_request.prompt_tokens)
        if isinstance(found, ContextTooLong):
            # A prompt that is probably too long goes to the fallback, but only one that is certainly too long is
            # refused: the engine counts exactly.
            minimum = max(slot_request.min_prompt_tokens, *(prompt.ids for prompt in parsed.prompts))
            certain = self._check_context(parsed, minimum)
            if isinstance(certain, ContextTooLong):
                raise _too_long(parsed, found.message, found.hint)
            found = certain
        return found.model, found.reason

    def _check_context(self, parsed: _ParsedRequest, tokens: float) -> ContextFits | ContextTooLong:
        """Find a context for that many tokens, in the requested model or in a fallback that the key permits."""
        allow = parsed.caller.limits.allow
        return check_context(
            parsed.name.model,
            round(tokens),
            replicas=self.dispatcher.fleet_state.fleet.snapshot.replicas,
            fallbacks={small: large for small, large in self.rules.fallbacks.items() if allow(large)},
        )

    def _choose_auto(self, parsed: _ParsedRequest, slot_request: SlotRequest) -> tuple[str, str]:
        """Return the model that ``auto`` takes, and the reason."""
        snapshot = self.dispatcher.fleet_state.fleet.snapshot
        if not snapshot.models:
            raise NoCapacityError("no model is available for auto", hint="see /v1/models")
        models = [model for model in snapshot.models if parsed.permitted or parsed.caller.limits.allow(model)]
        if not models:
            parsed.caller.check_model(AUTO)
        longest = slot_request.longest_prompt_tokens or slot_request.prompt_tokens
        requests = [msgspec.structs.replace(slot_request, model=model) for model in models]
        candidates = [self._auto_candidate(request, longest, snapshot) for request in requests]
        budget_s = _seconds(parsed.headers, "x-promptai-budget")
        chosen = choose_auto(candidates, budget_s, slot_request.max_tokens)
        if chosen.model is None:
            # If an unavailable model could hold the prompt, the prompt is not at fault.
            unavailable = next((model for model in models if _likely_fits(model, longest, snapshot)), None)
            if unavailable is not None:
                raise self.dispatcher.no_capacity(unavailable)
            raise _too_long(parsed, chosen.reason, "shorten the prompt")
        return chosen.model, chosen.reason

    def _auto_candidate(self, request: SlotRequest, longest: float, snapshot: Snapshot) -> AutoCandidate:
        replicas = snapshot.of(request.model)
        fleet_state, placement = self.dispatcher.fleet_state, self.dispatcher.preview(request)
        finish_s: float | None = None
        if placement is not None and fleet_state.book.source(placement.view.replica) != "unknown":
            streams = len(placement.view.running) + 1
            tokens = self._answer_tokens(request, longest, placement.view.replica.context)
            finish_s = placement.estimate.ttft_s + tokens * placement.view.step_s(streams)
        return AutoCandidate(
            model=request.model,
            capability=max((r.capability for r in replicas if r.capability is not None), default=None),
            accuracy=max((r.accuracy for r in replicas if r.accuracy is not None), default=None),
            finish_s=finish_s,
            fits_context=placement is not None and _likely_fits(request.model, longest, snapshot),
        )

    def _answer_tokens(self, request: SlotRequest, longest: float, context: int | None) -> float:
        """Longest possible answer in tokens; the usual length if nothing limits it."""
        if request.max_tokens is None:
            return self.dispatcher.fleet_state.expected_answer_tokens(request)
        limit = float(request.max_tokens)
        return limit if context is None else min(limit, max(1.0, context - longest))

    def _total_tokens(self, parsed: _ParsedRequest, request: SlotRequest) -> int:
        expected = self.dispatcher.fleet_state.expected_answer_tokens(request)
        generated = 0.0 if parsed.fields.input is not None else request.answers * expected
        return round(request.prompt_tokens + generated)


def path_for(body: Mapping[str, Any]) -> str:
    """Return the path of a body that came without one."""
    return next((path for path, field in _PATHS.items() if body.get(field) is not None), "/v1/chat/completions")


def _bounded(limit: int | None) -> int | None:
    return None if limit is None else min(limit, _MAX_TOKENS)


def _unknown_model(found: UnknownModel, caller: Caller) -> RequestRefusedError:
    known, near = (tuple(filter(caller.limits.allow, names)) for names in (found.known, found.near))
    allowed = msgspec.structs.replace(found, known=known, near=near)
    return RequestRefusedError(allowed.message, status=404, code="model_not_found", param="model", hint=allowed.hint)


def _convert(body: dict[str, Any]) -> InferenceRequest:
    try:
        return msgspec.convert(body, InferenceRequest)
    except msgspec.ValidationError as error:
        text = str(error)
        param = text.rpartition("`$.")[2].rstrip("`").partition("[")[0] if "`$." in text else None
        raise RequestRefusedError(f"invalid request: {text}", code="wrong_type", param=param) from None


def _too_long(parsed: _ParsedRequest, message: str, hint: str) -> RequestRefusedError:
    return RequestRefusedError(message, code="context_length_exceeded", param=_PATHS[parsed.path], hint=hint)


def _likely_fits(model: str, tokens: float, snapshot: Snapshot) -> bool:
    """Whether a replica of a model, available or not, has a context for an estimated number of tokens."""
    found = check_context(model, int(_ESTIMATE_MARGIN * tokens), replicas=snapshot.replicas, fallbacks={})
    return isinstance(found, ContextFits)


def _check_field(path: str, fields: InferenceRequest) -> None:
    """Refuse a request with the field of another path, which would be silently ignored, or without its own."""
    for home, field in _PATHS.items():
        if home != path and getattr(fields, field) is not None:
            hint = f"send {field} to {home}; {path} takes {_PATHS[path]}"
            raise RequestRefusedError(f"{path} does not take {field}", code="wrong_field", param=field, hint=hint)
    field = _PATHS[path]
    # Engines answer an empty text.
    if getattr(fields, field) in (None, []):
        hint = f"{path} requires {field}"
        raise RequestRefusedError(f"the request has no {field}", code="missing_field", param=field, hint=hint)


def _check_roles(fields: InferenceRequest) -> None:
    """Refuse a message without a role: llama-server answers it with HTTP 500, as if the engine were broken."""
    for number, message in enumerate(fields.messages or ()):
        if not isinstance(message.get("role"), str):
            raise RequestRefusedError(
                f"message {number} has no role",
                code="wrong_type",
                param="messages",
                hint="set it to system, user, assistant or tool",
            )


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    given = headers.get(name)
    if given is None:
        return None
    try:
        return parse_budget(given)
    except ValueError as error:
        raise RequestRefusedError(f"{name}: {error}", code="wrong_header", param=name) from None
