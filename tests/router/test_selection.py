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
    """The refusal of that name."""
    found = resolve(name, models, names)
    assert isinstance(found, UnknownModel)
    return found


def wanted(name: str | None, models: tuple[str, ...] = MODELS, names: ModelNames = NAMES) -> ResolvedName:
    """What that name stands for."""
    found = resolve(name, models, names)
    assert isinstance(found, ResolvedName)
    return found


def test_an_unknown_name_suggests_similar_ones() -> None:
    refused = unknown("Phi-3.5")

    assert refused.near[0] == "phi-3.5-mini"
    assert refused.message == "no model named 'Phi-3.5'"
    assert refused.hint.startswith("did you mean phi-3.5-mini")


def test_an_unknown_name_lists_all_models() -> None:
    refused = unknown("zzz", names=ModelNames())

    assert refused.near == ()
    assert refused.hint == "known: llama-3.2-1b, phi-3.5-mini, yi-coder-1.5b"
    assert unknown("zzz", tuple(f"m{number}" for number in range(20)), ModelNames()).hint.endswith("m7 and 12 more")


def test_a_name_from_outside_is_escaped_and_shortened() -> None:
    refused = unknown("\n\x1b[31m" + "x" * 100_000)

    assert refused.message.startswith(r"no model named '\n\x1b[31mxxx")
    assert len(refused.message) < 130


@pytest.mark.parametrize("name", [None, "", "default"])
def test_a_missing_name_is_refused_with_several_models(name: str | None) -> None:
    assert unknown(name).message == "the request names no model"
    assert unknown(name, models=(), names=ModelNames()).message == "no model is being served"


def test_an_alias_or_default_of_an_unserved_model_is_reported() -> None:
    assert unknown("gone").message == "'gone' stands for 'phi-3-mini', which is not served"
    assert unknown("gone").hint.startswith("did you mean phi-3.5-mini")
    assert unknown(None, names=ModelNames(default="big")).message == "'default' stands for 'big', which is not served"


def test_a_dangling_alias_does_not_suggest_itself() -> None:
    assert unknown("gone").known == (*MODELS, "fast", "phi:fast", "gpt-4o-mini", "best", "round", "about")


def test_cyclic_aliases_resolve_to_nothing() -> None:
    assert unknown("round").name == "round"


@pytest.mark.parametrize("name", [None, "", "default"])
def test_a_single_model_needs_no_name(name: str | None) -> None:
    assert wanted(name, ("only",)) == ResolvedName(name="default", meant="only", model="only")
    assert wanted(name, names=ModelNames(default="phi-3.5-mini")).model == "phi-3.5-mini"
    assert wanted(name, names=ModelNames(aliases={"default": Alias("phi-3.5-mini")})).model == "phi-3.5-mini"


def test_a_name_is_itself_or_an_alias() -> None:
    assert wanted("phi-3.5-mini") == ResolvedName(name="phi-3.5-mini", meant="phi-3.5-mini", model="phi-3.5-mini")
    assert wanted("fast") == ResolvedName(name="fast", meant="fast", model="llama-3.2-1b")


@pytest.mark.parametrize("name", [None, "", "default"])
@pytest.mark.parametrize("default", ["fast", "gpt-4o-mini", "phi-3.5-mini", "auto"])
def test_the_default_counts_as_the_requested_name(name: str | None, default: str) -> None:
    assert wanted(name, names=msgspec.structs.replace(NAMES, default=default)).meant == default


def test_an_alias_of_an_alias_merges_params_and_the_outer_wins() -> None:
    found = wanted("gpt-4o-mini")

    params = {"max_tokens": 200, "temperature": 0.7}
    assert found == ResolvedName(name="gpt-4o-mini", meant="gpt-4o-mini", model="phi-3.5-mini", params=params)


def test_an_alias_may_add_params_to_the_model_of_its_name() -> None:
    names = ModelNames(aliases={"phi-3.5-mini": Alias("phi-3.5-mini", {"temperature": 0.1})})

    assert wanted("phi-3.5-mini", names=names).params == {"temperature": 0.1}


def test_auto_is_a_name_and_may_have_aliases() -> None:
    assert wanted("auto").auto
    assert wanted("best") == ResolvedName(name="best", meant="best", model="auto", params={"temperature": 0.0})
    assert not wanted("fast").auto


def test_the_request_wins_over_its_alias() -> None:
    filled = wanted("phi:fast").filled

    assert filled({"temperature": 1.0, "n": 1}) == {"temperature": 1.0, "n": 1, "max_tokens": 200}
    assert filled({"temperature": None}) == {"temperature": 0.2, "max_tokens": 200}
    assert filled({"max_completion_tokens": 50}) == {"max_completion_tokens": 50, "temperature": 0.2}


def replica(model: str, context: int | None, state: State = State.READY) -> Replica:
    """A replica of that model and context."""
    return Replica(id=f"{model}-{context}", url="", model=model, context=context, state=state)


FLEET = (replica("small", 2048), replica("small", 4096, State.DOWN), replica("large", 16384), replica("mute", None))


def check(model: str, prompt: int, *, fallbacks: Mapping[str, str] | None = None) -> ContextFits | ContextTooLong:
    """The verdict on a prompt of so many tokens."""
    return check_context(model, prompt, replicas=FLEET, fallbacks=fallbacks or {})


def test_a_prompt_longer_than_its_context_is_refused_with_the_numbers() -> None:
    refused = check("small", 5000)

    assert refused == ContextTooLong(prompt_tokens=5000, contexts={"small": 4096})
    assert refused.message == "the prompt has about 5000 tokens; small holds 4096, the answer included"


def test_a_prompt_longer_than_every_fallback_is_refused_with_all_numbers() -> None:
    refused = check("small", 20000, fallbacks={"small": "large", "large": "small"})

    assert refused == ContextTooLong(prompt_tokens=20000, contexts={"small": 4096, "large": 16384})


def test_an_unserved_fallback_is_ignored() -> None:
    assert check("small", 5000, fallbacks={"small": "huge"}) == ContextTooLong(
        prompt_tokens=5000, contexts={"small": 4096}
    )


def test_a_prompt_without_room_for_an_answer_is_too_long() -> None:
    assert isinstance(check("small", 4096), ContextTooLong)
    assert check("small", 4095) == ContextFits(model="small")


def test_a_long_prompt_goes_to_the_fallback() -> None:
    assert check("small", 5000, fallbacks={"small": "large"}) == ContextFits(
        model="large", reason="small holds 4096 tokens, the prompt has about 5000"
    )


def test_an_unknown_context_is_assumed_to_fit() -> None:
    assert check("mute", 10**6) == ContextFits(model="mute")


LLAMA = AutoCandidate(model="llama-3.2-1b", capability=1.2, finish_s=4.0)
YI = AutoCandidate(model="yi-coder-1.5b", capability=1.5, finish_s=7.9)
PHI = AutoCandidate(model="phi-3.5-mini", capability=3.8, finish_s=24.1)
NEW = AutoCandidate(model="new-7b", capability=7.0)
TINY = AutoCandidate(model="tiny", capability=0.1)


def test_auto_has_no_choice_if_no_context_fits() -> None:
    short = AutoCandidate(model="short", finish_s=1.0, fits_context=False)

    assert choose_auto([short], 10.0, 200) == AutoChoice(model=None, reason="auto: the prompt exceeds every context")
    assert choose_auto([], 10.0, 200) == AutoChoice(model=None, reason="auto: no model")


def test_without_a_model_in_time_auto_takes_the_fastest_and_reports_the_excess() -> None:
    assert choose_auto([PHI, YI], 5.0, 200) == AutoChoice(
        model="yi-coder-1.5b", reason="auto: yi-coder-1.5b, predicted 7.9 s of 5 s, 2.9 s over budget, but the fastest"
    )


def test_auto_tries_a_smaller_model_of_unknown_speed_if_none_is_in_time() -> None:
    assert choose_auto([PHI, TINY, NEW, YI], 5.0, 200) == AutoChoice(
        model="tiny",
        reason="auto: tiny, speed unknown but smaller; the fastest known is yi-coder-1.5b, predicted 7.9 s of 5 s",
    )


@pytest.mark.parametrize("new", [NEW, AutoCandidate(model="new"), AutoCandidate(model="yi2", capability=1.5)])
def test_auto_skips_a_larger_model_of_unknown_speed(new: AutoCandidate) -> None:
    assert choose_auto([YI, new], 5.0, 200).model == "yi-coder-1.5b"
    assert choose_auto([new, AutoCandidate(model="known", finish_s=9.0)], 5.0, 200).model == "known"


def test_auto_takes_the_smallest_if_no_speed_is_known() -> None:
    assert choose_auto([NEW, TINY], 10.0, None) == AutoChoice(
        model="tiny", reason="auto: tiny, no speed known yet; budget 10 s"
    )


def test_auto_takes_the_most_capable_model_in_time() -> None:
    assert choose_auto([LLAMA, YI, PHI], 10.0, None) == AutoChoice(
        model="yi-coder-1.5b",
        reason="auto: yi-coder-1.5b, predicted 7.9 s of 10 s; phi-3.5-mini would take 24.1 s",
    )


def test_a_model_that_needs_the_whole_budget_is_in_time() -> None:
    assert choose_auto([LLAMA, YI], 7.9, None).model == "yi-coder-1.5b"


def test_auto_names_a_model_of_unknown_speed_that_it_skips() -> None:
    assert choose_auto([NEW, LLAMA, PHI, YI], 10.0, 200).reason == (
        "auto: yi-coder-1.5b, predicted 7.9 s of 10 s for 200 tokens; the speed of new-7b is unknown; "
        "phi-3.5-mini would take 24.1 s"
    )


def test_auto_skips_a_model_whose_context_is_too_small() -> None:
    short = AutoCandidate(model="short-70b", capability=70.0, finish_s=1.0, fits_context=False)

    assert choose_auto([short, LLAMA], 10.0, 200).model == "llama-3.2-1b"


def test_without_a_budget_auto_aims_at_30_seconds() -> None:
    assert choose_auto([LLAMA, YI, PHI], None, None) == AutoChoice(
        model="phi-3.5-mini", reason="auto: phi-3.5-mini, predicted 24.1 s of 30 s (no budget given)"
    )
    slow = AutoCandidate(model="slow", capability=9.0, finish_s=31.0)
    assert choose_auto([slow, AutoCandidate(model="slower", capability=9.0, finish_s=35.0)], None, None).model == "slow"


def test_accuracy_counts_if_all_models_have_it() -> None:
    accurate = AutoCandidate(model="accurate", capability=1.0, accuracy=0.7, finish_s=5.0)
    large = AutoCandidate(model="large", capability=3.0, accuracy=0.6, finish_s=5.0)
    unmeasured = AutoCandidate(model="unmeasured", capability=2.0, finish_s=5.0)

    assert choose_auto([large, accurate], 10.0, None).model == "accurate"
    assert choose_auto([large, accurate, unmeasured], 10.0, None).model == "large"


def test_auto_takes_the_faster_of_equally_capable_models() -> None:
    fast, slow = AutoCandidate(model="fast", finish_s=3.0), AutoCandidate(model="slow", finish_s=5.0)

    assert choose_auto([slow, fast], 10.0, None) == AutoChoice(model="fast", reason="auto: fast, predicted 3 s of 10 s")


@pytest.mark.parametrize("text", ["", "soon", "0", "0s", "-5s", "1e3", "10 h", "nan", "inf", "9" * 400, "1.s", "٣s"])
def test_an_invalid_budget_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="invalid duration '") as refusal:
        parse_budget(text)

    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 160


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10.0), ("1500ms", 1.5), ("2m", 120.0), ("10", 10.0), (" 2.5 s ", 2.5)]
)
def test_a_budget_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds
