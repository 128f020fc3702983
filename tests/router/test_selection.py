from collections.abc import Mapping

import msgspec
import pytest

from promptai.fleet.replica import Replica, State
from promptai.router.selection import (
    Alias,
    AutoCandidate,
    AutoChoice,
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

MODELS = ("llama-3.2-1b", "phi-3.5-mini", "yi-coder-1.5b")
NAMES = ModelNames(
    aliases={
        "fast": Alias("llama-3.2-1b"),
        "phi:fast": Alias("phi-3.5-mini", {"max_tokens": 200, "temperature": 0.2}),
        "gpt-4o-mini": Alias("phi:fast", {"temperature": 0.7}),
        "best": Alias("auto", {"temperature": 0.0}),
        "gone": Alias("phi-3-mini"),
        "round": Alias("about"),
        "about": Alias("round"),
    }
)


def unknown(name: str | None, models: tuple[str, ...] = MODELS, names: ModelNames = NAMES) -> UnknownModel:
    """Resolve a name that no served model has."""
    found = resolve(name, models, names)
    assert isinstance(found, UnknownModel)
    return found


def resolved(name: str | None, models: tuple[str, ...] = MODELS, names: ModelNames = NAMES) -> ResolvedName:
    """Resolve a name to a served model or ``auto``."""
    found = resolve(name, models, names)
    assert isinstance(found, ResolvedName)
    return found


def test_an_unknown_name_suggests_similar_names() -> None:
    rejected = unknown("Phi-3.5")

    assert rejected.near[0] == "phi-3.5-mini"
    assert rejected.message == "no model named 'Phi-3.5'"
    assert rejected.hint.startswith("did you mean phi-3.5-mini")


def test_an_unknown_name_without_similar_ones_lists_the_known_names() -> None:
    rejected = unknown("zzz", names=ModelNames())

    assert rejected.near == ()
    assert rejected.hint == "known: llama-3.2-1b, phi-3.5-mini, yi-coder-1.5b"
    assert unknown("zzz", tuple(f"m{number}" for number in range(20)), ModelNames()).hint.endswith("m7 and 12 more")


def test_an_unknown_name_is_escaped_and_truncated_in_the_message() -> None:
    rejected = unknown("\n\x1b[31m" + "x" * 100_000)

    assert rejected.message.startswith(r"no model named '\n\x1b[31mxxx")
    assert len(rejected.message) < 130


@pytest.mark.parametrize("name", [None, "", "default"])
def test_a_request_without_a_name_is_rejected_if_several_models_are_served(name: str | None) -> None:
    assert unknown(name).message == "the request names no model"
    assert unknown(name, models=(), names=ModelNames()).message == "no model is being served"


def test_an_alias_or_default_for_an_unserved_model_is_reported_as_such() -> None:
    assert unknown("gone").message == "'gone' stands for 'phi-3-mini', which is not served"
    assert unknown("gone").hint.startswith("did you mean phi-3.5-mini")
    assert unknown(None, names=ModelNames(default="big")).message == "'default' stands for 'big', which is not served"


def test_an_alias_for_an_unserved_model_is_not_suggested_for_itself() -> None:
    assert unknown("gone").known == (*MODELS, "fast", "phi:fast", "gpt-4o-mini", "best", "round", "about")


def test_circular_aliases_resolve_to_no_model() -> None:
    assert unknown("round").name == "round"


@pytest.mark.parametrize("name", [None, "", "default"])
def test_a_single_model_or_a_default_needs_no_name(name: str | None) -> None:
    assert resolved(name, ("only",)) == ResolvedName(name="default", meant="only", model="only")
    assert resolved(name, names=ModelNames(default="phi-3.5-mini")).model == "phi-3.5-mini"
    assert resolved(name, names=ModelNames(aliases={"default": Alias("phi-3.5-mini")})).model == "phi-3.5-mini"


def test_a_name_may_be_a_model_or_an_alias() -> None:
    assert resolved("phi-3.5-mini") == ResolvedName(name="phi-3.5-mini", meant="phi-3.5-mini", model="phi-3.5-mini")
    assert resolved("fast") == ResolvedName(name="fast", meant="fast", model="llama-3.2-1b")


@pytest.mark.parametrize("name", [None, "", "default"])
@pytest.mark.parametrize("default", ["fast", "gpt-4o-mini", "phi-3.5-mini", "auto"])
def test_the_configured_default_replaces_a_missing_name(name: str | None, default: str) -> None:
    assert resolved(name, names=msgspec.structs.replace(NAMES, default=default)).meant == default


def test_an_alias_of_an_alias_merges_the_params_and_the_outer_ones_win() -> None:
    found = resolved("gpt-4o-mini")

    params = {"max_tokens": 200, "temperature": 0.7}
    assert found == ResolvedName(name="gpt-4o-mini", meant="gpt-4o-mini", model="phi-3.5-mini", params=params)


def test_an_alias_may_add_params_to_the_model_with_the_same_name() -> None:
    names = ModelNames(aliases={"phi-3.5-mini": Alias("phi-3.5-mini", {"temperature": 0.1})})

    assert resolved("phi-3.5-mini", names=names).params == {"temperature": 0.1}


def test_auto_is_a_valid_name_and_may_have_aliases() -> None:
    assert resolved("auto").auto
    assert resolved("best") == ResolvedName(name="best", meant="best", model="auto", params={"temperature": 0.0})
    assert not resolved("fast").auto


def test_fields_of_the_request_override_the_params_of_its_alias() -> None:
    filled = resolved("phi:fast").filled

    assert filled({"temperature": 1.0, "n": 1}) == {"temperature": 1.0, "n": 1, "max_tokens": 200}
    assert filled({"temperature": None}) == {"temperature": 0.2, "max_tokens": 200}
    assert filled({"max_completion_tokens": 50}) == {"max_completion_tokens": 50, "temperature": 0.2}


def replica(model: str, context: int | None, state: State = State.READY) -> Replica:
    """Return a replica of a model with that context."""
    return Replica(id=f"{model}-{context}", url="", model=model, context=context, state=state)


FLEET = (replica("small", 2048), replica("small", 4096, State.DOWN), replica("large", 16384), replica("unset", None))


def check(model: str, prompt: int, *, fallbacks: Mapping[str, str] | None = None) -> ContextFits | ContextTooLong:
    """Check a prompt of that many tokens against ``FLEET``."""
    return check_context(model, prompt, replicas=FLEET, fallbacks=fallbacks or {})


def test_rejects_a_prompt_longer_than_every_context_of_its_model() -> None:
    rejected = check("small", 5000)

    assert rejected == ContextTooLong(prompt_tokens=5000, contexts={"small": 4096})
    assert rejected.message == "the prompt has about 5000 tokens; small holds 4096, the answer included"


def test_rejects_a_prompt_longer_than_the_contexts_of_all_fallbacks() -> None:
    rejected = check("small", 20000, fallbacks={"small": "large", "large": "small"})

    assert rejected == ContextTooLong(prompt_tokens=20000, contexts={"small": 4096, "large": 16384})


def test_an_unserved_fallback_is_ignored() -> None:
    assert check("small", 5000, fallbacks={"small": "huge"}) == ContextTooLong(
        prompt_tokens=5000, contexts={"small": 4096}
    )


def test_a_prompt_that_leaves_no_token_for_the_answer_is_too_long() -> None:
    assert isinstance(check("small", 4096), ContextTooLong)
    assert check("small", 4095) == ContextFits(model="small")


def test_a_prompt_that_is_too_long_uses_the_fallback() -> None:
    assert check("small", 5000, fallbacks={"small": "large"}) == ContextFits(
        model="large", reason="small holds 4096 tokens, the prompt has about 5000"
    )


def test_an_unknown_context_holds_any_prompt() -> None:
    assert check("unset", 10**6) == ContextFits(model="unset")


LLAMA = AutoCandidate(model="llama-3.2-1b", capability=1.2, finish_s=4.0)
YI = AutoCandidate(model="yi-coder-1.5b", capability=1.5, finish_s=7.9)
PHI = AutoCandidate(model="phi-3.5-mini", capability=3.8, finish_s=24.1)
NEW = AutoCandidate(model="new-7b", capability=7.0)
TINY = AutoCandidate(model="tiny", capability=0.1)


def test_auto_chooses_nothing_if_no_model_holds_the_prompt() -> None:
    short = AutoCandidate(model="short", finish_s=1.0, fits_context=False)

    assert choose_auto([short], 10.0, 200) == AutoChoice(model=None, reason="auto: the prompt exceeds every context")
    assert choose_auto([], 10.0, 200) == AutoChoice(model=None, reason="auto: no model")


def test_auto_takes_the_fastest_model_and_reports_the_excess_if_none_is_in_time() -> None:
    assert choose_auto([PHI, YI], 5.0, 200) == AutoChoice(
        model="yi-coder-1.5b", reason="auto: yi-coder-1.5b, predicted 7.9 s of 5 s, 2.9 s over budget, but the fastest"
    )


def test_auto_tries_a_smaller_model_of_unknown_speed_if_no_known_one_is_in_time() -> None:
    assert choose_auto([PHI, TINY, NEW, YI], 5.0, 200) == AutoChoice(
        model="tiny",
        reason="auto: tiny, speed unknown but smaller; the fastest known is yi-coder-1.5b, predicted 7.9 s of 5 s",
    )


@pytest.mark.parametrize("new", [NEW, AutoCandidate(model="new"), AutoCandidate(model="yi2", capability=1.5)])
def test_auto_does_not_try_a_model_of_unknown_speed_unless_it_is_smaller(new: AutoCandidate) -> None:
    assert choose_auto([YI, new], 5.0, 200).model == "yi-coder-1.5b"
    assert choose_auto([new, AutoCandidate(model="known", finish_s=9.0)], 5.0, 200).model == "known"


def test_auto_takes_the_smallest_model_if_no_speed_is_known() -> None:
    assert choose_auto([NEW, TINY], 10.0, None) == AutoChoice(
        model="tiny", reason="auto: tiny, no speed known yet; budget 10 s"
    )


def test_auto_takes_the_most_capable_model_in_time() -> None:
    assert choose_auto([LLAMA, YI, PHI], 10.0, None) == AutoChoice(
        model="yi-coder-1.5b",
        reason="auto: yi-coder-1.5b, predicted 7.9 s of 10 s; phi-3.5-mini would take 24.1 s",
    )


def test_a_model_that_needs_exactly_the_budget_is_in_time() -> None:
    assert choose_auto([LLAMA, YI], 7.9, None).model == "yi-coder-1.5b"


def test_the_reason_names_a_skipped_model_of_unknown_speed() -> None:
    assert choose_auto([NEW, LLAMA, PHI, YI], 10.0, 200).reason == (
        "auto: yi-coder-1.5b, predicted 7.9 s of 10 s for 200 tokens; the speed of new-7b is unknown; "
        "phi-3.5-mini would take 24.1 s"
    )


def test_auto_skips_a_model_that_does_not_hold_the_prompt() -> None:
    short = AutoCandidate(model="short-70b", capability=70.0, finish_s=1.0, fits_context=False)

    assert choose_auto([short, LLAMA], 10.0, 200).model == "llama-3.2-1b"


def test_auto_aims_at_30_s_without_a_budget() -> None:
    assert choose_auto([LLAMA, YI, PHI], None, None) == AutoChoice(
        model="phi-3.5-mini", reason="auto: phi-3.5-mini, predicted 24.1 s of 30 s (no budget given)"
    )
    slow = AutoCandidate(model="slow", capability=9.0, finish_s=31.0)
    assert choose_auto([slow, AutoCandidate(model="slower", capability=9.0, finish_s=35.0)], None, None).model == "slow"


def test_accuracy_decides_only_if_every_model_has_it() -> None:
    accurate = AutoCandidate(model="accurate", capability=1.0, accuracy=0.7, finish_s=5.0)
    large = AutoCandidate(model="large", capability=3.0, accuracy=0.6, finish_s=5.0)
    unmeasured = AutoCandidate(model="unmeasured", capability=2.0, finish_s=5.0)

    assert choose_auto([large, accurate], 10.0, None).model == "accurate"
    assert choose_auto([large, accurate, unmeasured], 10.0, None).model == "large"


def test_the_faster_of_equally_capable_models_is_taken() -> None:
    fast, slow = AutoCandidate(model="fast", finish_s=3.0), AutoCandidate(model="slow", finish_s=5.0)

    assert choose_auto([slow, fast], 10.0, None) == AutoChoice(model="fast", reason="auto: fast, predicted 3 s of 10 s")


@pytest.mark.parametrize("text", ["", "soon", "0", "0s", "-5s", "1e3", "10 h", "nan", "inf", "9" * 400, "1.s", "٣s"])
def test_rejects_an_invalid_budget_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="invalid duration '") as raised:
        parse_budget(text)

    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 160


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10.0), ("1500ms", 1.5), ("2m", 120.0), ("10", 10.0), (" 2.5 s ", 2.5)]
)
def test_a_budget_has_an_optional_unit(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds
