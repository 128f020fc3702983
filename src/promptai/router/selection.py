"""Select the model of a request: by name, alias or default, or the best one within a time budget.

A client that cannot be changed requests ``gpt-4o-mini``; a person requests ``phi:fast``, or ``auto`` with an answer
within ten seconds. And a prompt may exceed its model's context. Engines handle that differently, and some silently
truncate the prompt. Here it goes to the fallback that the operator configured, or is refused with the numbers.

``auto`` does not use another model to judge the prompt. It takes the most capable model whose answer is predicted to
be complete in time; the caller predicts that from measurements.

All functions take and return values. A refusal is a result, not an exception: the gateway raises the error. Pure.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from promptai.fleet.replica import Replica

AUTO = "auto"
DEFAULT = "default"
_DEFAULT_BUDGET_S = 30.0  # target of ``auto`` for a request without a budget
_MAX_SUGGESTIONS = 3
_MAX_LISTED = 8
_MAX_CHARS = 80
_LENGTHS = frozenset({"max_tokens", "max_completion_tokens", "n_predict"})  # one setting under three names
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(ms|s|m|)")


class Alias(msgspec.Struct, frozen=True):
    """
    Another name for a model.

    Attributes:
        model: A served model, another alias, or ``auto``.
        params: Defaults for fields that the request does not set.
    """

    model: str
    params: dict[str, Any] = {}


class ModelNames(msgspec.Struct, frozen=True, kw_only=True):
    """
    Names for models. An alias takes precedence over a model of the same name, and can so add params to it.

    Attributes:
        aliases: Aliases by name.
        default: Model, alias or ``auto`` for requests without a model; ``None``: the only model, if there is only one.
    """

    aliases: dict[str, Alias] = {}
    default: str | None = None


class ResolvedName(msgspec.Struct, frozen=True, kw_only=True):
    """
    A model name and the model it stands for.

    Attributes:
        name: The name in the request; ``default`` if it has none.
        meant: The same name, or the configured default: a model, an alias or ``auto``.
        model: A served model, or ``auto``.
        params: Defaults from the aliases that were followed; see ``filled``.
    """

    name: str
    meant: str
    model: str
    params: dict[str, Any] = {}

    @property
    def auto(self) -> bool:
        """Whether ``choose_auto`` chooses the model."""
        return self.model == AUTO

    def filled(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """
        Return the request with the alias's params for fields that it does not set.

        ``null`` sets nothing, as in OpenAI's API. Setting one name of the length limit sets all of them.
        """
        given = {field for field, value in request.items() if value is not None}
        if given & _LENGTHS:
            given |= _LENGTHS
        return {**request, **{field: value for field, value in self.params.items() if field not in given}}


class UnknownModel(msgspec.Struct, frozen=True, kw_only=True):
    """
    No model has the requested name.

    Attributes:
        name: The name in the request; empty if it has none.
        meaning: The model that an alias or the default stands for and that is not served; else empty.
        near: Similar names.
        known: All names.
    """

    name: str
    meaning: str
    near: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def message(self) -> str:
        """What happened, in one line."""
        if not self.known:
            return "no model is being served"
        if self.meaning:
            return f"{_shown(self.name or DEFAULT)} stands for {_shown(self.meaning)}, which is not served"
        return f"no model named {_shown(self.name)}" if self.name else "the request names no model"

    @property
    def hint(self) -> str:
        """What to request instead, in one line."""
        if self.near:
            return f"did you mean {' or '.join(self.near)}?"
        if not self.known:
            return "wait until a model is ready, or add one"
        more = f" and {len(self.known) - _MAX_LISTED} more" if len(self.known) > _MAX_LISTED else ""
        return f"known: {', '.join(self.known[:_MAX_LISTED])}{more}"


def resolve(name: str | None, models: Sequence[str], names: ModelNames) -> ResolvedName | UnknownModel:
    """
    Resolve a model name.

    Args:
        name: The name in the request; ``None`` or empty if it has none.
        models: Models being served.
    """
    params: dict[str, Any] = {}
    passed: set[str] = set()
    reached = meant = _or_default(name or DEFAULT, models, names)
    # Aliases of aliases are followed; a cycle ends at the name it began with.
    while reached in names.aliases and reached not in passed:
        passed.add(reached)
        alias = names.aliases[reached]
        params = {**alias.params, **params}
        reached = alias.model
    if reached == AUTO or reached in models:
        return ResolvedName(name=name or DEFAULT, meant=meant, model=reached, params=params)
    asked = "" if name in {None, DEFAULT} else str(name)
    meaning = reached if reached != (name or DEFAULT) else ""
    known = tuple(dict.fromkeys([*models, *(other for other in names.aliases if other != name)]))
    return UnknownModel(name=asked, meaning=meaning, near=_near(meaning or asked, known), known=known)


class ContextFits(msgspec.Struct, frozen=True, kw_only=True):
    """
    A model whose context holds the prompt.

    Attributes:
        model: The requested model, or its fallback.
        reason: One line for a fallback; else empty.
    """

    model: str
    reason: str = ""


class ContextTooLong(msgspec.Struct, frozen=True, kw_only=True):
    """
    The prompt exceeds the context of the requested model and of its fallbacks.

    Attributes:
        contexts: Largest context of each model in tokens, by name.
    """

    prompt_tokens: int
    contexts: dict[str, int]

    @property
    def message(self) -> str:
        """What happened, in one line."""
        held = ", ".join(f"{model} holds {context}" for model, context in self.contexts.items())
        return f"the prompt has about {self.prompt_tokens} tokens; {held}, the answer included"

    @property
    def hint(self) -> str:
        """What to do, in one line."""
        return "shorten the conversation, or request a model with a larger context"


def check_context(
    model: str,
    prompt_tokens: int,
    *,
    replicas: Sequence[Replica],
    fallbacks: Mapping[str, str],
) -> ContextFits | ContextTooLong:
    """
    Find a context for a prompt: its model's, or else that of a fallback.

    Nothing is truncated. Replicas count in any state: a replica that is unavailable for a moment does not make the
    prompt too long.

    Args:
        replicas: Replicas of all models, at least one of ``model``.
        fallbacks: Model with a larger context, by the name of the model whose context is too small.
    """
    contexts: dict[str, int] = {}
    current: str | None = model
    while current is not None and current not in contexts:
        own = [replica.context for replica in replicas if replica.model == current]
        reported = [context for context in own if context is not None]
        if not own:  # a fallback that is not served
            break
        moved = f"{model} holds {contexts[model]} tokens, the prompt has about {prompt_tokens}" if contexts else ""
        if len(reported) < len(own) or prompt_tokens < max(reported):
            return ContextFits(model=current, reason=moved)
        contexts[current] = max(reported)
        current = fallbacks.get(current)
    return ContextTooLong(prompt_tokens=prompt_tokens, contexts=contexts)


class AutoCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """
    A model that ``auto`` may choose.

    Attributes:
        capability: Parameters in billions, or the value in the settings; ``None``: unknown.
        accuracy: Share of items solved in an earlier run; ``None``: not measured.
        finish_s: Predicted seconds until an answer of full length is complete, including the queue and loading;
            ``None``: unknown.
        fits_context: Whether its context holds the prompt.
    """

    model: str
    capability: float | None = None
    accuracy: float | None = None
    finish_s: float | None = None
    fits_context: bool = True


class AutoChoice(msgspec.Struct, frozen=True, kw_only=True):
    """
    The choice of ``auto``.

    Attributes:
        model: ``None`` if no candidate's context holds the prompt.
        reason: One line with the numbers.
    """

    model: str | None
    reason: str


def choose_auto(candidates: Sequence[AutoCandidate], budget_s: float | None, max_tokens: int | None) -> AutoChoice:
    """
    Choose the most capable model that is predicted to finish in time.

    Without one, choose the fastest, or a smaller model of unknown speed, which is probably faster still. Capability is
    accuracy if it was measured for all candidates, else size.

    Args:
        budget_s: Seconds for the whole answer; ``None``: a target of 30.
        max_tokens: Answer length that ``finish_s`` assumes; ``None``: the usual length.
    """
    fitting = [candidate for candidate in candidates if candidate.fits_context]
    if not fitting:
        return AutoChoice(
            model=None, reason="auto: the prompt exceeds every context" if candidates else "auto: no model"
        )
    limit_s = _DEFAULT_BUDGET_S if budget_s is None else budget_s
    limit = f"{_seconds(limit_s)}{' (no budget given)' if budget_s is None else ''}"
    by_accuracy = all(candidate.accuracy is not None for candidate in fitting)

    def rank(candidate: AutoCandidate) -> tuple[float, float]:
        merit = candidate.accuracy if by_accuracy else candidate.capability
        return (-math.inf if merit is None else merit, -_finish(candidate))

    in_time = [candidate for candidate in fitting if _finish(candidate) <= limit_s]
    if in_time:
        best = max(in_time, key=rank)
        answer = f" for {max_tokens} tokens" if max_tokens is not None else ""
        passed_over = sorted((other for other in fitting if rank(other) > rank(best)), key=rank, reverse=True)
        others = "".join(f"; {_why_not(other)}" for other in passed_over[:_MAX_SUGGESTIONS])
        return AutoChoice(
            model=best.model,
            reason=f"auto: {best.model}, predicted {_seconds(_finish(best))} of {limit}{answer}{others}",
        )
    fastest = min(fitting, key=_finish)
    unknown = [candidate for candidate in fitting if candidate.finish_s is None]
    smallest = min(unknown, key=_size, default=fastest)
    return _late(fastest, smallest, limit_s, limit)


def parse_budget(text: str) -> float:
    """
    Return the seconds of a budget such as ``10s``, ``1500ms``, ``2m`` or ``10``.

    Raises:
        ValueError: The text is not a duration above 0.
    """
    match = _BUDGET.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"invalid duration {_shown(text)} (expected a time above 0 such as 10s, 1500ms or 2m)")
    return seconds


def _or_default(name: str, models: Sequence[str], names: ModelNames) -> str:
    if name != DEFAULT or DEFAULT in names.aliases or DEFAULT in models:
        return name
    if names.default is not None:
        return names.default
    return models[0] if len(models) == 1 else DEFAULT


def _near(name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return similar names, ignoring case; only the beginning counts, since a name from outside may have any length."""
    spelled = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name[:_MAX_CHARS].casefold(), spelled, n=_MAX_SUGGESTIONS, cutoff=0.5)
    return tuple(spelled[other] for other in close)


def _shown(text: str) -> str:
    """Return a text from outside, escaped and shortened."""
    return ascii(text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "...")


def _late(fastest: AutoCandidate, smallest: AutoCandidate, limit_s: float, limit: str) -> AutoChoice:
    """Choose when no known speed meets the budget: the fastest model, or a smaller one of unknown speed."""
    if fastest.finish_s is None:
        reason = f"auto: {smallest.model}, no speed known yet; budget {limit}"
        return AutoChoice(model=smallest.model, reason=reason)
    missed = f"predicted {_seconds(fastest.finish_s)} of {limit}"
    if fastest.capability is not None and _size(smallest) < fastest.capability:
        reason = f"auto: {smallest.model}, speed unknown but smaller; the fastest known is {fastest.model}, {missed}"
        return AutoChoice(model=smallest.model, reason=reason)
    over = f"{_seconds(fastest.finish_s - limit_s)} over budget, but the fastest"
    return AutoChoice(model=fastest.model, reason=f"auto: {fastest.model}, {missed}, {over}")


def _why_not(candidate: AutoCandidate) -> str:
    if candidate.finish_s is None:
        return f"the speed of {candidate.model} is unknown"
    return f"{candidate.model} would take {_seconds(candidate.finish_s)}"


def _finish(candidate: AutoCandidate) -> float:
    return math.inf if candidate.finish_s is None else candidate.finish_s


def _size(candidate: AutoCandidate) -> float:
    return math.inf if candidate.capability is None else candidate.capability


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}".removesuffix(".0") + " s"
