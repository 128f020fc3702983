import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from promptai.bench import prepare
from promptai.bench.manifest import TargetFacts
from promptai.bench.plan import Protocol, WarmUpRates
from promptai.bench.prepare import (
    EngineOptions,
    choose_conversations,
    cut_to_budget,
    describe_targets,
    load_workload,
    reload_selected,
    unique_names,
)
from promptai.bench.workload import Conversation, History, Workload, load_bundled
from promptai.engine.locate import EngineBinary
from promptai.errors import (
    EngineNotFoundError,
    ModelError,
    ModelNotFoundError,
    ModelTooLargeError,
    SettingsError,
    WorkloadError,
)
from promptai.models.gguf import read_header
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_gguf import U16, entry, gguf, llama
from support_runs import CPU, long_talk, talk

GIB = 1024**3
#: 128 numbers of keys and 128 of values a token: 512 bytes of KV cache in f16.
SHAPE = Shape(layers=2, width=64, heads=2, kv_heads=2, ffn=64, vocabulary=300, context=1 << 22)
ENGINE = EngineBinary("PATH", ("llama-server",), "b1 (abc)", ("NEON",))
FAST = WarmUpRates(prefill_tps=1000.0, decode_tps=100.0, chars_per_token=4.0, answer_tokens=100.0)
TEN = Workload("w", "w", "all", tuple(talk(f"c{n}", "x" * (n + 1)) for n in range(10)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was made for four million tokens."""
    return write_synthetic(tmp_path_factory.mktemp("models") / "tiny.gguf", SHAPE, name="Tiny")


def describe(
    *sources: Path | str,
    options: EngineOptions | None = None,
    conversations: tuple[Conversation, ...] = TEN.conversations,
    available_bytes: int = GIB,
    engine: Callable[[], EngineBinary] = lambda: ENGINE,
    hashing: Callable[[int], None] | None = None,
    history: History = "data",
) -> list[TargetFacts]:
    """The facts of targets on a board with four cores and 1 GiB left."""
    return describe_targets(
        [str(source) for source in sources],
        conversations,
        Protocol(max_tokens=100, history=history),
        options or EngineOptions(),
        engine=engine,
        cpu=CPU,
        available_bytes=available_bytes,
        hashing=hashing,
    )


def test_a_context_holds_the_models_own_answers_where_they_stand_in_the_prompt(model: Path) -> None:
    """Four answers of 100 tokens, and four messages of 900 where the data has seven."""
    found = describe(model, conversations=(long_talk("a", turns=4, chars=900),), history="own")[0].engine

    assert found is not None
    assert found.flags.context == 4608


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    """Size and checksum would be those of a part, in a run that is about the whole."""
    part = tmp_path / "part.gguf"
    part.write_bytes(gguf([*llama(), entry("split.no", U16, 0), entry("split.count", U16, 3)]))

    with pytest.raises(ModelError, match=r"part 1 of 3.*join the parts first"):
        describe(part)


def context_of(model: Path, options: EngineOptions) -> int:
    """The context that its engine is started with for one conversation of four turns."""
    engine = describe(model, options=options, conversations=(long_talk("a", turns=4, chars=900),))[0].engine
    assert engine is not None
    return engine.flags.context


def no_engine() -> EngineBinary:
    raise EngineNotFoundError("there is no llama-server")


def test_an_absent_model_is_refused_before_an_engine_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf does not exist"):
        describe(tmp_path / "absent.gguf", engine=no_engine)


def test_a_model_file_needs_an_engine(model: Path) -> None:
    with pytest.raises(EngineNotFoundError):
        describe(model, engine=no_engine)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(model: Path) -> None:
    numbers = "at least 2.00 GiB (weights 0.00, KV cache 2.00 for 4194304 tokens), 1.00 GiB are available"

    with pytest.raises(ModelTooLargeError, match=re.escape(numbers)) as refusal:
        describe(model, options=EngineOptions(context=1 << 22))

    assert "--context" in refusal.value.hint


def test_every_slot_needs_its_context(model: Path) -> None:
    options = EngineOptions(context=1 << 20)
    assert describe(model, options=options)

    with pytest.raises(ModelTooLargeError, match="for 4194304 tokens"):
        describe(model, options=replace(options, slots=4))


def test_a_model_that_fits_with_a_smaller_cache_type_is_not_refused(model: Path) -> None:
    """q8_0 takes 34 bytes for 32 numbers, hardly more than half of f16's."""
    options = EngineOptions(context=1 << 21)
    with pytest.raises(ModelTooLargeError):
        describe(model, options=options, available_bytes=2 * GIB // 3)

    assert describe(model, options=replace(options, cache_type="q8_0"), available_bytes=2 * GIB // 3)


def test_a_run_finds_its_model_from_wherever_it_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is given as seen from today's folder; the engine that resumes is started in another."""
    monkeypatch.chdir(model.parent)
    facts = describe(model.name)[0]

    assert facts.model is not None
    assert facts.engine is not None
    assert str(model) == facts.model.path == facts.engine.flags.model


def test_a_link_to_a_model_keeps_its_name(model: Path, tmp_path: Path) -> None:
    """The file behind it may be called by its hash alone, as in the hub's cache."""
    (tmp_path / "yi.gguf").symlink_to(model)
    engine = describe(tmp_path / "yi.gguf")[0].engine

    assert engine is not None
    assert engine.flags.alias == "yi"


def test_a_run_finds_its_workload_from_wherever_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talks.jsonl").write_text('{"messages": [{"role": "user", "content": "why?"}]}')

    assert load_workload("talks.jsonl").source == str(tmp_path / "talks.jsonl")
    with pytest.raises(WorkloadError, match=r"^workload absent\.jsonl"):
        load_workload("absent.jsonl")


def test_a_server_needs_no_engine_and_is_called_by_its_address() -> None:
    found = describe("http://pi.local:8080/v1", engine=no_engine)

    assert [(f.name, f.url, f.model) for f in found] == [("pi.local-8080", "http://pi.local:8080/v1", None)]


def test_one_engine_serves_all_model_files(model: Path) -> None:
    looked_for: list[str] = []

    def engine() -> EngineBinary:
        looked_for.append("engine")
        return ENGINE

    names = [facts.name for facts in describe(model, "http://pi:8080", model, engine=engine)]

    assert names == ["tiny", "pi-8080", "tiny-2"]
    assert looked_for == ["engine"]


def test_more_context_than_the_model_was_made_for_is_refused(model: Path) -> None:
    with pytest.raises(SettingsError, match=f"{(1 << 22) + 1} is more than the {1 << 22} tokens") as refusal:
        describe(model, options=EngineOptions(context=(1 << 22) + 1))

    assert str(1 << 22) in refusal.value.hint


@pytest.mark.parametrize(
    ("options", "context"),
    [
        pytest.param(EngineOptions(), 7168, id="what-the-workload-needs"),
        pytest.param(EngineOptions(context=1000), 1000, id="what-was-asked-for"),
        pytest.param(EngineOptions(slots=2), 2 * 7168, id="of-all-slots-together"),
    ],
)
def test_the_context_is_what_is_needed_unless_it_is_asked_for(
    model: Path, options: EngineOptions, context: int
) -> None:
    """A prompt of 6300 characters and 7 messages; a synthetic model has a token a byte."""
    assert context == context_of(model, options)


def test_a_synthetic_model_of_a_real_vocabulary_needs_the_context_of_the_bundled_one(tmp_path: Path) -> None:
    """1.8 characters a token, as promptai-tiny, whose tokenizer it has."""
    large = write_synthetic(tmp_path / "large.gguf", replace(SHAPE, vocabulary=4000), name="Large")

    assert context_of(large, EngineOptions()) == 4096


def test_the_needed_context_is_never_larger_than_the_models_own(tmp_path: Path) -> None:
    small = write_synthetic(tmp_path / "small.gguf", replace(SHAPE, context=2048), name="Small")

    assert context_of(small, EngineOptions()) == 2048


def test_every_wish_is_a_flag_of_the_engine(model: Path) -> None:
    options = EngineOptions(3, 512, 1, 256, "q8_0", 64, mmap=False, port=8081)
    engine = describe(model, options=options)[0].engine

    assert engine is not None
    flags = engine.flags
    assert (flags.threads, flags.batch, flags.ubatch, flags.port) == (3, 256, 256, 8081)
    assert (flags.cache_type_k, flags.cache_type_v, flags.cache_ram_mib, flags.mmap) == ("q8_0", "q8_0", 64, False)


def test_a_model_is_described_by_its_header_its_hash_and_its_engine(model: Path) -> None:
    pieces: list[int] = []
    facts = describe(model, hashing=pieces.append)[0]

    assert facts.model is not None
    assert facts.engine is not None
    assert hashlib.sha256(model.read_bytes()).hexdigest() == facts.model.sha256
    assert model.stat().st_size == facts.model.file_bytes == sum(pieces)
    assert (*(facts.model.name, facts.model.architecture, facts.model.quantization, facts.model.synthetic),) == (
        "Tiny",
        "llama",
        "Q4_0",
        True,
    )
    assert read_header(model).parameters == facts.model.parameters
    assert (facts.engine.flags.threads, facts.engine.missing_features) == (4, ("DOTPROD",))


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a", "a-2", "a"], ["a", "a-2", "a-3"]),
        (["a", "a", "a-2"], ["a", "a-2", "a-2-2"]),
    ],
    ids=["none", "different", "alike", "number-taken", "number-taken-later"],
)
def test_names_are_numbered_where_they_are_alike(names: list[str], unique: list[str]) -> None:
    assert unique == unique_names(names)


@pytest.mark.parametrize("count", [0, -1])
def test_no_conversations_cannot_be_played(count: int) -> None:
    with pytest.raises(SettingsError, match=f"^{count} conversations cannot be played"):
        choose_conversations(TEN, count=count, seed=0)


@pytest.mark.parametrize("count", [None, 10, 99], ids=["not-told", "exactly", "too-many"])
def test_all_conversations_are_played_unless_fewer_are_asked_for(count: int | None) -> None:
    assert (list(TEN.conversations), "all") == choose_conversations(TEN, count=count, seed=0)


def test_a_choice_of_conversations_says_how_it_was_made() -> None:
    part, words = choose_conversations(TEN, count=5, seed=3)

    assert words == "5 of 10, one from each of 5 strata by length, seed 3"
    assert [TEN.conversations.index(conversation) // 2 for conversation in part] == [0, 1, 2, 3, 4]
    assert (part, words) == choose_conversations(TEN, count=5, seed=3)


def test_a_budget_that_holds_no_conversation_is_refused_with_both_numbers() -> None:
    """One answer of 100 tokens takes 1 s, cold and warm, on two targets: 4 s at least."""
    refusal = "the shortest conversation takes about 4 s on these targets, the budget is 3 s"

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
def test_a_budget_counts_targets_caches_and_passes(budget_s: float, count: int, words: str) -> None:
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
def test_a_budget_says_out_of_what_it_chose(budget_s: float, words: str) -> None:
    drawn, selection = choose_conversations(TEN, count=4, seed=3)

    _, said = cut_to_budget(drawn, selection, Protocol(seed=3), {"m": FAST}, budget_s)

    assert said == f"4 of 10, one from each of 4 strata by length, seed 3; then {words}"


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_shortest_conversation_is_not_called_a_drawn_one(seed: int) -> None:
    """With these seeds the draw of one falls on the long one; it would claim to stand for all lengths."""
    long_and_short = (talk("long", "x" * 40_000), talk("short", "x"))

    part, said = cut_to_budget(long_and_short, "all", Protocol(caches=("cold",), seed=seed), {"m": FAST}, 5.0)

    assert [conversation.id for conversation in part] == ["short"]
    assert said == "the shortest of 2: no even draw fits a budget of 5 s"


def test_a_changed_workload_is_not_resumed() -> None:
    with pytest.raises(WorkloadError, match="has changed since the run began"):
        reload_selected(TEN, "0" * 64, ["c1"])


def test_resuming_plays_what_was_selected_in_its_order() -> None:
    assert [conversation.id for conversation in reload_selected(TEN, TEN.sha256, ["c7", "c2"])] == ["c7", "c2"]


def test_a_workload_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled one, a file, trees in a file, and the trees that the hub gives."""
    asked: list[str] = []

    def load_trees(path: Path, *, source: str = "oasst1") -> Workload:
        asked.append(f"{path.name} as {source}")
        return TEN

    monkeypatch.setattr(prepare, "load_oasst1", load_trees)
    monkeypatch.setattr(prepare, "fetch_dataset_file", lambda *_: Path("fetched"))
    path = tmp_path / "talks.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "why?"}]}')

    assert load_bundled() == load_workload("edge-50")
    assert str(path) == load_workload(str(path)).source
    assert [load_workload("oasst1"), load_workload("oasst1:trees.gz")] == [TEN, TEN]
    assert asked == ["fetched as oasst1", f"trees.gz as oasst1:{Path.cwd() / 'trees.gz'}"]
