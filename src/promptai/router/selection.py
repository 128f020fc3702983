"""Which model a request is for: by name, by alias, by default, or the best one in the time there is.

A client that cannot be changed asks for ``gpt-4o-mini``; a person asks for ``phi:fast``, or for
``auto`` and an answer within ten seconds. And a prompt may be longer than its model can hold.
Engines differ in what they do then, some cut off its beginning without a word. Here it goes to
a model that the operator named for the purpose, or is refused with the numbers.

``auto`` asks no other model to judge the prompt. It takes the most capable model whose answer
is predicted to be complete in time; the prediction is the caller's, from what was measured.

Everything is a value that comes in or goes out. What is refused is a result, not an exception:
the gateway turns it into an answer. Pure.
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
_PATIENCE_S = 30.0  # what ``auto`` aims at when the request names no budget
_SHOWN = 3
_SHOWN_MODELS = 8
_SHOWN_CHARS = 80
_LENGTHS = frozenset({"max_tokens", "max_completion_tokens", "n_predict"})  # one setting under three names
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(ms|s|m|)")


class Alias(msgspec.Struct, frozen=True):
    """
    Another name of a model.

    Attributes:
        model: A served model, another alias, or ``auto``.
        params: Fields for the requests that do not set them.
    """

    model: str
    params: dict[str, Any] = {}


class ModelNames(msgspec.Struct, frozen=True, kw_only=True):
    """
    What models may be called. An alias comes before a model of the same name, which may so be given params.

    Attributes:
        aliases: By name.
        default: What a request without a model is for; ``None``: the only model, if there is just one.
    """

    aliases: dict[str, Alias] = {}
    default: str | None = None


class ResolvedName(msgspec.Struct, frozen=True, kw_only=True):
    """
    What a request is for.

    Attributes:
        name: As it was asked for; ``default`` where the request names none.
        meant: The same, or what the default is: a model, an alias or ``auto``.
        model: A served model, or ``auto``.
        params: Of the aliases on the way; see ``filled``.
    """

    name: str
    meant: str
    model: str
    params: dict[str, Any] = {}

    @property
    def auto(self) -> bool:
        """Whether ``choose_auto`` is to name the model."""
        return self.model == AUTO

    def filled(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """
        The request with the params of its alias where it sets none itself; the request wins.

        ``null`` sets nothing, as in OpenAI's API. A length under any of its names is a length.
        """
        given = {field for field, value in request.items() if value is not None}
        if given & _LENGTHS:
            given |= _LENGTHS
        return {**request, **{field: value for field, value in self.params.items() if field not in given}}


class UnknownModel(msgspec.Struct, frozen=True, kw_only=True):
    """
    Nothing here has that name.

    Attributes:
        name: As it was asked for; empty: the request named none.
        meaning: What the name stands for, an alias or a default whose model is not served; else empty.
        near: Names that are like it.
        known: All names.
    """

    name: str
    meaning: str
    near: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def message(self) -> str:
        """One line: what happened."""
        if not self.known:
            return "no model is served"
        if self.meaning:
            return f"{_shown(self.name or DEFAULT)} stands for {_shown(self.meaning)}, which is not served"
        return f"no model is called {_shown(self.name)}" if self.name else "the request names no model"

    @property
    def hint(self) -> str:
        """One line: what to ask for instead."""
        if self.near:
            return f"did you mean {' or '.join(self.near)}?"
        if not self.known:
            return "wait for a model to be ready, or add one"
        more = f" and {len(self.known) - _SHOWN_MODELS} more" if len(self.known) > _SHOWN_MODELS else ""
        return f"known: {', '.join(self.known[:_SHOWN_MODELS])}{more}"


def resolve(name: str | None, models: Sequence[str], names: ModelNames) -> ResolvedName | UnknownModel:
    """
    Find out what a name stands for.

    Args:
        name: Of the request; ``None`` or empty where it gives none.
        models: That are served.
    """
    params: dict[str, Any] = {}
    passed: set[str] = set()
    reached = meant = _or_default(name or DEFAULT, models, names)
    # An alias of an alias is followed; one that leads back to itself ends at its own name.
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
    A model that holds the prompt.

    Attributes:
        model: It, or its fallback.
        reason: One line, when it is a fallback; else empty.
    """

    model: str
    reason: str = ""


class ContextTooLong(msgspec.Struct, frozen=True, kw_only=True):
    """
    No model that may be used holds the prompt.

    Attributes:
        contexts: Tokens of the largest context of each model that was considered, by name.
    """

    prompt_tokens: int
    contexts: dict[str, int]

    @property
    def message(self) -> str:
        """One line: what happened."""
        held = ", ".join(f"{model} holds {context}" for model, context in self.contexts.items())
        return f"the prompt has {self.prompt_tokens} tokens; {held}, the answer included"

    @property
    def hint(self) -> str:
        """One line: what to do about it."""
        return "shorten the conversation, or ask for a model with a larger context"


def check_context(
    model: str,
    prompt_tokens: int,
    *,
    replicas: Sequence[Replica],
    fallbacks: Mapping[str, str],
) -> ContextFits | ContextTooLong:
    """
    See that a prompt fits into the context of its model, or else of the fallback of that.

    Nothing is cut off. Replicas count whatever their state: one that is away for a moment does not
    make a prompt too long for ever.

    Args:
        replicas: Of all models; at least one of ``model``.
        fallbacks: The model for prompts that one does not hold, by that one's name.
    """
    contexts: dict[str, int] = {}
    current: str | None = model
    while current is not None and current not in contexts:
        own = [replica.context for replica in replicas if replica.model == current]
        told = [context for context in own if context is not None]
        if not own:  # a fallback that is not served
            break
        moved = f"{model} holds {contexts[model]} tokens, the prompt has {prompt_tokens}" if contexts else ""
        if len(told) < len(own) or prompt_tokens < max(told):
            return ContextFits(model=current, reason=moved)
        contexts[current] = max(told)
        current = fallbacks.get(current)
    return ContextTooLong(prompt_tokens=prompt_tokens, contexts=contexts)


class AutoCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """
    A model that ``auto`` may take.

    Attributes:
        capability: Parameters in billions, or what settings say; ``None``: not known.
        accuracy: Share of items solved in an earlier run; ``None``: not measured.
        finish_s: Predicted seconds until an answer of full length is complete, waiting and loading included;
            ``None``: not known.
        fits_context: Whether it holds the prompt.
    """

    model: str
    capability: float | None = None
    accuracy: float | None = None
    finish_s: float | None = None
    fits_context: bool = True


class AutoChoice(msgspec.Struct, frozen=True, kw_only=True):
    """
    What ``auto`` came to.

    Attributes:
        model: ``None``: no candidate holds the prompt.
        reason: One line with the numbers.
    """

    model: str | None
    reason: str


def choose_auto(candidates: Sequence[AutoCandidate], budget_s: float | None, max_tokens: int | None) -> AutoChoice:
    """
    Take the most capable model that is predicted to finish in time.

    If none is, the fastest; but a smaller one of unknown speed comes before that, being likely
    to be faster still. Capable is who is accurate, if that was measured of all; else who is large.

    Args:
        budget_s: Seconds for the whole answer; ``None``: 30, as an aim.
        max_tokens: That ``finish_s`` was predicted for; ``None``: as long as answers usually are.
    """
    fitting = [candidate for candidate in candidates if candidate.fits_context]
    if not fitting:
        return AutoChoice(model=None, reason="auto: no model holds the prompt" if candidates else "auto: no model")
    limit_s = _PATIENCE_S if budget_s is None else budget_s
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
        told = "".join(f"; {_why_not(other)}" for other in passed_over[:_SHOWN])
        return AutoChoice(
            model=best.model, reason=f"auto: {best.model}, predicted {_seconds(_finish(best))} of {limit}{answer}{told}"
        )
    fastest = min(fitting, key=_finish)
    unknown = [candidate for candidate in fitting if candidate.finish_s is None]
    smallest = min(unknown, key=_size, default=fastest)
    return _late(fastest, smallest, limit_s, limit)


def parse_budget(text: str) -> float:
    """
    Seconds of a budget such as ``10s``, ``1500ms``, ``2m`` or ``10``.

    Raises:
        ValueError: It is none, or not above 0.
    """
    match = _BUDGET.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"a budget is a time above 0 such as 10s, 1500ms or 2m, not {_shown(text)}")
    return seconds


def _or_default(name: str, models: Sequence[str], names: ModelNames) -> str:
    if name != DEFAULT or DEFAULT in names.aliases or DEFAULT in models:
        return name
    if names.default is not None:
        return names.default
    return models[0] if len(models) == 1 else DEFAULT


def _near(name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names like that one, whatever their case; a name from outside may be of any length, so only its beginning."""
    spelled = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name[:_SHOWN_CHARS].casefold(), spelled, n=_SHOWN, cutoff=0.5)
    return tuple(spelled[other] for other in close)


def _shown(text: str) -> str:
    """A text from outside, escaped and of bounded length."""
    return ascii(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _late(fastest: AutoCandidate, smallest: AutoCandidate, limit_s: float, limit: str) -> AutoChoice:
    """Nothing that is known is in time: the fastest, or a smaller one of unknown speed."""
    if fastest.finish_s is None:
        reason = f"auto: {smallest.model}, whose speed is unknown, as is that of every other; wanted {limit}"
        return AutoChoice(model=smallest.model, reason=reason)
    missed = f"predicted {_seconds(fastest.finish_s)} of {limit}"
    if fastest.capability is not None and _size(smallest) < fastest.capability:
        reason = f"auto: {smallest.model}, whose speed is unknown; the fastest known is {fastest.model}, {missed}"
        return AutoChoice(model=smallest.model, reason=reason)
    over = f"{_seconds(fastest.finish_s - limit_s)} too long, but the fastest"
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
