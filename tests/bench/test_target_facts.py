import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from promptai.bench.manifest import TargetFacts
from promptai.bench.options import BenchOptions
from promptai.bench.target_facts import describe_targets, parse_targets, sha256_of, unique_names, verify_unchanged
from promptai.bench.workload import Conversation
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineNotFoundError, ModelError, ModelNotFoundError, ModelTooLargeError, SettingsError
from promptai.models.gguf import read_header
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_gguf import U16, entry, gguf, llama
from support_runs import CPU, FACTS, MODEL, long_talk, talk

GIB = 1024**3
#: 128 key and 128 value numbers per token: 512 bytes of KV cache in f16.
SHAPE = Shape(layers=2, width=64, heads=2, kv_heads=2, ffn=64, vocabulary=300, context=1 << 22)
SMALL = Shape(layers=1, width=32, heads=1, kv_heads=1, ffn=32, vocabulary=258)
ENGINE = EngineBinary("PATH", ("llama-server",), "b1 (abc)", ("NEON",))
TEN = tuple(talk(f"c{n}", "x" * (n + 1)) for n in range(10))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context of four million tokens."""
    return write_synthetic(tmp_path_factory.mktemp("models") / "tiny.gguf", SHAPE, name="Tiny")


def make_options(**changes: Any) -> BenchOptions:
    """Options of a run with answers of 100 tokens."""
    return replace(BenchOptions(library=Path("models"), engines=Path("engines"), max_tokens=100), **changes)


def describe(
    *sources: Path | str,
    options: BenchOptions | None = None,
    conversations: tuple[Conversation, ...] = TEN,
    available_bytes: int = GIB,
    engine: Callable[[], EngineBinary] = lambda: ENGINE,
    hashing: Callable[[int], None] | None = None,
) -> list[TargetFacts]:
    """The facts of targets on a board with four cores and 1 GiB left."""
    options = options or make_options()
    return describe_targets(
        parse_targets([str(source) for source in sources], options.library),
        conversations,
        options,
        engine=engine,
        cpu=CPU,
        available_bytes=available_bytes,
        hashing=hashing,
    )


def test_the_context_fits_the_models_own_answers_with_own_history(model: Path) -> None:
    """Four answers of 100 tokens, and four messages of 900 instead of the data set's seven."""
    found = describe(model, conversations=(long_talk("a", turns=4, chars=900),), options=make_options(history="own"))[
        0
    ].engine

    assert found is not None
    assert found.flags.context == 4608


def test_rejects_a_part_of_a_split_model(tmp_path: Path) -> None:
    """Size and checksum would be a part's, in a run about the whole model."""
    part = tmp_path / "part.gguf"
    part.write_bytes(gguf([*llama(), entry("split.no", U16, 0), entry("split.count", U16, 3)]))

    with pytest.raises(ModelError, match=r"part 1 of 3.*join the parts first"):
        describe(part)


def context_of(model: Path, options: BenchOptions) -> int:
    """The context of its engine for one conversation of four turns."""
    engine = describe(model, options=options, conversations=(long_talk("a", turns=4, chars=900),))[0].engine
    assert engine is not None
    return engine.flags.context


def no_engine() -> EngineBinary:
    raise EngineNotFoundError("there is no llama-server")


def test_rejects_a_missing_model_before_locating_an_engine(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf does not exist"):
        describe(tmp_path / "absent.gguf", engine=no_engine)


def test_a_model_file_needs_an_engine(model: Path) -> None:
    with pytest.raises(EngineNotFoundError):
        describe(model, engine=no_engine)


def test_rejects_a_model_that_does_not_fit_with_the_numbers(model: Path) -> None:
    numbers = "at least 2.00 GiB (weights 0.00, KV cache 2.00 for 4194304 tokens); 1.00 GiB are available"

    with pytest.raises(ModelTooLargeError, match=re.escape(numbers)) as refusal:
        describe(model, options=make_options(context=1 << 22))

    assert "--context" in refusal.value.hint


def test_every_slot_needs_its_own_context(model: Path) -> None:
    options = make_options(context=1 << 20)
    assert describe(model, options=options)

    with pytest.raises(ModelTooLargeError, match="for 4194304 tokens"):
        describe(model, options=replace(options, slots=4))


def test_accepts_a_model_that_fits_with_a_smaller_cache_type(model: Path) -> None:
    """q8_0 takes 34 bytes for 32 values, little more than half of f16."""
    options = make_options(context=1 << 21)
    with pytest.raises(ModelTooLargeError):
        describe(model, options=options, available_bytes=2 * GIB // 3)

    assert describe(model, options=replace(options, cache_type="q8_0"), available_bytes=2 * GIB // 3)


def test_the_path_of_a_model_is_absolute(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is relative to the current directory; a resumed run may start in another."""
    monkeypatch.chdir(model.parent)
    facts = describe(model.name)[0]

    assert facts.model is not None
    assert facts.engine is not None
    assert str(model) == facts.model.path == facts.engine.flags.model


def test_a_link_to_a_model_keeps_its_name(model: Path, tmp_path: Path) -> None:
    """Its target may be named by a hash, as in the hub's cache."""
    (tmp_path / "yi.gguf").symlink_to(model)
    engine = describe(tmp_path / "yi.gguf")[0].engine

    assert engine is not None
    assert engine.flags.alias == "yi"


def test_a_server_needs_no_engine_and_is_named_by_host_and_port() -> None:
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


def test_rejects_more_context_than_the_model_supports(model: Path) -> None:
    with pytest.raises(SettingsError, match=f"{(1 << 22) + 1} exceeds the {1 << 22} tokens") as refusal:
        describe(model, options=make_options(context=(1 << 22) + 1))

    assert str(1 << 22) in refusal.value.hint


@pytest.mark.parametrize(
    ("options", "context"),
    [
        pytest.param(make_options(), 7168, id="fits-the-workload"),
        pytest.param(make_options(context=1000), 1000, id="as-given"),
        pytest.param(make_options(slots=2), 2 * 7168, id="for-all-slots"),
    ],
)
def test_the_context_fits_the_workload_unless_given(model: Path, options: BenchOptions, context: int) -> None:
    """A prompt of 6300 characters and 7 messages; a synthetic model has one token per byte."""
    assert context == context_of(model, options)


def test_a_synthetic_model_with_a_real_vocabulary_needs_the_context_of_the_bundled_one(tmp_path: Path) -> None:
    """1.8 characters per token, like promptai-tiny, whose tokenizer it has."""
    large = write_synthetic(tmp_path / "large.gguf", replace(SHAPE, vocabulary=4000), name="Large")

    assert context_of(large, make_options()) == 4096


def test_the_context_never_exceeds_the_models_own(tmp_path: Path) -> None:
    small = write_synthetic(tmp_path / "small.gguf", replace(SHAPE, context=2048), name="Small")

    assert context_of(small, make_options()) == 2048


def test_every_option_becomes_a_flag_of_the_engine(model: Path) -> None:
    options = make_options(
        threads=3, context=512, batch=256, cache_type="q8_0", cache_ram_mib=64, mmap=False, port=8081
    )
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
def test_numbers_repeated_names(names: list[str], unique: list[str]) -> None:
    assert unique == unique_names(names)


@pytest.fixture
def measured(tmp_path: Path) -> TargetFacts:
    """A target whose model file is on the disk, with its hash."""
    path = write_synthetic(tmp_path / "m.gguf", SMALL, name="m")
    return replace(FACTS, model=replace(MODEL, path=str(path), sha256=sha256_of(path)))


def test_refuses_to_resume_with_a_changed_model(measured: TargetFacts) -> None:
    assert measured.model is not None
    write_synthetic(Path(measured.model.path), SMALL, name="m", seed=1)

    with pytest.raises(ModelError, match="has changed since the run began"):
        verify_unchanged(measured)


def test_refuses_to_resume_with_a_missing_model(measured: TargetFacts) -> None:
    assert measured.model is not None
    Path(measured.model.path).unlink()

    with pytest.raises(ModelNotFoundError):
        verify_unchanged(measured)


def test_resumes_with_an_unchanged_model_and_with_a_server(measured: TargetFacts) -> None:
    verify_unchanged(measured)
    verify_unchanged(TargetFacts("pi", url="http://pi:8080"))


def test_hashing_reports_progress(tmp_path: Path) -> None:
    data = b"x" * (5 << 20)
    (tmp_path / "file").write_bytes(data)
    pieces: list[int] = []

    assert hashlib.sha256(data).hexdigest() == sha256_of(tmp_path / "file", pieces.append)
    assert pieces == [4 << 20, 1 << 20]


def test_rejects_a_url_with_a_password(model: Path) -> None:
    """The manifest is meant to be shared."""
    with pytest.raises(SettingsError, match="contains a user name or a password"):
        describe(model, "http://me:secret@pi:8080")
