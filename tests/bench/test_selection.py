from pathlib import Path

import pytest

from promptai.bench import selection
from promptai.bench.plan import Protocol, WarmUpRates
from promptai.bench.selection import choose_conversations, cut_to_budget, load_workload, reload_selected
from promptai.bench.workload import Workload, load_bundled
from promptai.errors import SettingsError, WorkloadError
from support_runs import talk

FAST = WarmUpRates(prefill_tps=1000.0, decode_tps=100.0, chars_per_token=4.0, answer_tokens=100.0)
TEN = Workload("w", "w", "all", tuple(talk(f"c{n}", "x" * (n + 1)) for n in range(10)))


@pytest.mark.parametrize("count", [0, -1])
def test_rejects_fewer_than_one_conversation(count: int) -> None:
    with pytest.raises(SettingsError, match=f"^--conversations must be at least 1, not {count}"):
        choose_conversations(TEN, count=count, seed=0)


@pytest.mark.parametrize("count", [None, 10, 99], ids=["not-given", "exactly", "too-many"])
def test_selects_all_conversations_unless_fewer_are_requested(count: int | None) -> None:
    assert (list(TEN.conversations), "all") == choose_conversations(TEN, count=count, seed=0)


def test_describes_the_selection_of_conversations() -> None:
    part, words = choose_conversations(TEN, count=5, seed=3)

    assert words == "5 of 10, one from each of 5 strata by length, seed 3"
    assert [TEN.conversations.index(conversation) // 2 for conversation in part] == [0, 1, 2, 3, 4]
    assert (part, words) == choose_conversations(TEN, count=5, seed=3)


def test_rejects_a_budget_that_fits_no_conversation_with_both_numbers() -> None:
    """One answer of 100 tokens takes 1 s, cold and warm, on two targets: 4 s at least."""
    refusal = "the shortest conversation takes about 4 s here, over the budget of 3 s"

    with pytest.raises(SettingsError, match=refusal) as error:
        cut_to_budget(TEN.conversations, "all", Protocol(), {"m": FAST, "n": FAST}, 3.0)

    assert "--max-tokens" in error.value.hint


@pytest.mark.parametrize(
    ("budget_s", "count", "words"),
    [
        (500.0, 10, "all, which fit the budget of 500 s"),
        (21.0, 5, "5 of 10, one from each of 5 strata by length, as many as fit a budget of 21 s, seed 0"),
    ],
    ids=["all", "half"],
)
def test_a_budget_covers_targets_caches_and_passes(budget_s: float, count: int, words: str) -> None:
    part, said = cut_to_budget(TEN.conversations, "all", Protocol(repeats=2), {"m": FAST}, budget_s)

    assert (count, words) == (len(part), said)


@pytest.mark.parametrize(
    ("budget_s", "words"),
    [
        (500.0, "all of these, which fit the budget of 500 s"),
        (5.0, "2 of these 4, one from each of 2 strata by length, as many as fit a budget of 5 s, seed 3"),
    ],
    ids=["all", "half"],
)
def test_describes_a_selection_within_a_selection(budget_s: float, words: str) -> None:
    drawn, selection = choose_conversations(TEN, count=4, seed=3)

    _, said = cut_to_budget(drawn, selection, Protocol(seed=3), {"m": FAST}, budget_s)

    assert said == f"4 of 10, one from each of 4 strata by length, seed 3; then {words}"


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_does_not_describe_the_shortest_conversation_as_drawn(seed: int) -> None:
    """With these seeds a draw of one selects the long conversation, and would claim to represent all lengths."""
    long_and_short = (talk("long", "x" * 40_000), talk("short", "x"))

    part, said = cut_to_budget(long_and_short, "all", Protocol(caches=("cold",), seed=seed), {"m": FAST}, 5.0)

    assert [conversation.id for conversation in part] == ["short"]
    assert said == "the shortest of 2: no stratified selection fits a budget of 5 s"


def test_refuses_to_resume_with_a_changed_workload() -> None:
    with pytest.raises(WorkloadError, match="has changed since the run began"):
        reload_selected(TEN, "0" * 64, ["c1"])


def test_resuming_restores_the_selection_in_order() -> None:
    assert [conversation.id for conversation in reload_selected(TEN, TEN.sha256, ["c7", "c2"])] == ["c7", "c2"]


def test_loads_every_kind_of_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled workload, a file, trees in a file, and trees from the hub."""
    asked: list[str] = []

    def load_trees(path: Path, *, source: str = "oasst1") -> Workload:
        asked.append(f"{path.name} as {source}")
        return TEN

    monkeypatch.setattr(selection, "load_oasst1", load_trees)
    monkeypatch.setattr(selection, "fetch_dataset_file", lambda *_: Path("fetched"))
    path = tmp_path / "talks.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "why?"}]}')

    assert load_bundled() == load_workload("edge-50")
    assert str(path) == load_workload(str(path)).source
    assert [load_workload("oasst1"), load_workload("oasst1:trees.gz")] == [TEN, TEN]
    assert asked == ["fetched as oasst1", f"trees.gz as oasst1:{Path.cwd() / 'trees.gz'}"]


def test_the_source_of_a_workload_file_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talks.jsonl").write_text('{"messages": [{"role": "user", "content": "why?"}]}')

    assert load_workload("talks.jsonl").source == str(tmp_path / "talks.jsonl")
    with pytest.raises(WorkloadError, match=r"^cannot read workload absent\.jsonl"):
        load_workload("absent.jsonl")
