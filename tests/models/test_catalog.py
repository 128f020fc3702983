"""The catalogue is complete and strictly parsed, and its shapes imply the published weights and file sizes."""

import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files

import msgspec
import pytest

from promptai.errors import (
    HubError,
    HubGatedError,
    HubNotFoundError,
    HubUnreachableError,
    ModelFormatError,
    ModelNotFoundError,
)
from promptai.models.catalog import Catalog, Entry, FourBit, differences, load_catalog, parse_catalog
from promptai.models.hub import RepositoryFacts
from promptai.models.shape import Shape

ENTRIES = load_catalog().entries
DATA = (files("promptai.models") / "data" / "catalog.toml").read_bytes()
MIB = 2**20

#: File sizes listed by the entries' sources, to three digits or more.
LISTED: dict[tuple[str, FourBit], float] = {
    ("internlm2.5-7b", "Q4_0"): 4.45e9,
    ("internlm2.5-7b", "Q4_K_M"): 4.71e9,
    ("mistral-7b", "Q4_K_M"): 4.37e9,
    ("phi-3.5-mini", "Q4_K_M"): 2.39e9,
    ("llama-3.2-3b", "Q4_0"): 1.92e9,
    ("llama-3.2-3b", "Q4_K_M"): 2.02e9,
    ("yi-coder-1.5b", "Q4_0"): 868e6,
    ("yi-coder-1.5b", "Q4_K_M"): 964e6,
    ("gemma-2b", "Q4_K_M"): 1.63e9,
    ("stablelm-zephyr-3b", "Q4_0"): 1.61e9,
    ("stablelm-zephyr-3b", "Q4_K_M"): 1.71e9,
    ("qwen3-0.6b", "Q4_0"): 364.5 * MIB,
    ("qwen3-0.6b", "Q4_K_M"): 378.3 * MIB,
    ("qwen3-1.7b", "Q4_0"): 1007.8 * MIB,
    ("llama-3.2-1b", "Q4_0"): 737.2 * MIB,
    ("llama-3.2-1b", "Q4_K_M"): 770.3 * MIB,
    ("gemma-3-1b", "Q4_0"): 688.5 * MIB,
    ("gemma-3-1b", "Q4_K_M"): 768.7 * MIB,
    ("phi-4-mini", "Q4_K_M"): 2.49e9,
    ("smollm2-135m", "Q4_0"): 87.6 * MIB,
    ("smollm2-135m", "Q4_K_M"): 100.6 * MIB,
    ("smollm2-360m", "Q4_0"): 230e6,
    ("smollm2-360m", "Q4_K_M"): 271e6,
    ("qwen2.5-0.5b", "Q4_0"): 336.6 * MIB,
    ("qwen2.5-0.5b", "Q4_K_M"): 379.4 * MIB,
    ("qwen2.5-1.5b", "Q4_0"): 938e6,
    ("qwen2.5-1.5b", "Q4_K_M"): 986e6,
    ("qwen2.5-3b", "Q4_0"): 1.83e9,
    ("qwen2.5-3b", "Q4_K_M"): 1.93e9,
    ("tinyllama-1.1b", "Q4_0"): 608.2 * MIB,
    ("tinyllama-1.1b", "Q4_K_M"): 637.8 * MIB,
}


def weights(shape: Shape) -> int:
    """Matrices only; norms and biases are below 0.04 % in every entry."""
    embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    queries_and_output = 2 * shape.width * shape.heads * shape.head
    keys_and_values = 2 * shape.width * shape.kv_heads * shape.head
    matrices_of_ffn = 2 if shape.architecture == "phi2" else 3  # all others have a gate
    ffn = matrices_of_ffn * shape.width * shape.ffn
    return embeddings + shape.layers * (queries_and_output + keys_and_values + ffn)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_a_shape_has_the_published_number_of_weights(entry: Entry) -> None:
    rounded = entry.parameters % 10_000_000 == 0

    assert weights(entry.shape) == pytest.approx(entry.parameters, rel=0.015 if rounded else 0.0005)


@pytest.mark.parametrize(("name", "quant"), LISTED)
def test_a_shape_implies_the_published_file_size(name: str, quant: FourBit) -> None:
    assert load_catalog().find(name).expected_bytes(quant) == pytest.approx(LISTED[name, quant], rel=0.0075)


def test_contains_the_papers_eight_models_with_only_phi_and_gemma_ambiguous() -> None:
    claims = [(entry.paper, entry.ambiguous) for entry in ENTRIES if entry.paper]

    certain = {"InternLM", "Mistral", "Llama2", "Llama3", "Yi", "Zephyr"}
    expected = [(name, False) for name in certain] + [("Phi", True), ("Gemma", True)] * 2
    assert sorted(claims) == sorted(expected)
    assert not any(entry.ambiguous and not entry.paper for entry in ENTRIES)


def test_every_source_is_used() -> None:
    """An unused source means that a fact lost its citation."""
    raw = tomllib.loads(DATA.decode())
    named = {source for entry in raw["entry"] for sources in entry["seen"].values() for source in sources}

    assert set(raw["sources"]) <= named


def test_a_loaded_entry_has_the_addresses_of_its_sources() -> None:
    addresses = [a for entry in ENTRIES for named in entry.seen.values() for a in named]

    assert len(addresses) > 150
    assert all(address.startswith("https://") for address in addresses)


SMALL = """
looked_up = "2026-11"
[sources]
lab = "https://example.org/configs"
[[entry]]
id = "small-1b"
title = "Small 1B"
repository = "lab/Small-1B"
gguf = "somebody/Small-1B-GGUF"
files.Q4_0 = "small-q4_0.gguf"
files.Q4_K_M = "small-q4_k_m.gguf"
parameters = 1_000_000
licence = "Apache-2.0"
gated = false
template = "chatml"
unverified = ["template", "gated"]
shape = { layers = 2, width = 512, heads = 8, kv_heads = 2, ffn = 1024, vocabulary = 4096 }
[entry.seen]
repository = ["lab"]
shape = ["lab", "https://example.org/small"]
parameters = ["lab"]
gguf = ["lab"]
licence = ["lab"]
"""


@pytest.mark.parametrize(
    ("there", "instead", "words"),
    [
        pytest.param('title = "Small 1B"', 'tittle = "Small 1B"', "tittle", id="misspelt key"),
        pytest.param("gated = false", 'gated = "no"', "gated", id="wrong type"),
        pytest.param("kv_heads = 2", "kv_heads = 2, experts = 8", "experts", id="unknown key of the shape"),
        pytest.param("kv_heads = 2", "kv_heads = 3", "engines cannot load", id="impossible shape"),
        pytest.param(
            "vocabulary", 'architecture = "mamba", vocabulary', "engines cannot load", id="unknown architecture"
        ),
        pytest.param('template = "chatml"', 'template = "chatty"', "chatty", id="unknown template"),
        pytest.param("files.Q4_0", "files.Q3_K", "Q3_K", id="unknown quantisation"),
        pytest.param('"lab/Small-1B"', '"Small-1B"', "repository", id="repository without owner"),
        pytest.param("parameters = 1_000_000", "parameters = 0", "parameters", id="no parameters"),
        pytest.param(
            'unverified = ["template", "gated"]', 'unverified = ["gated"]', "template", id="fact unaccounted for"
        ),
        pytest.param('unverified = ["template", ', 'unverified = ["template", "shape", ', "shape", id="seen and not"),
        pytest.param('licence = ["lab"]', 'licence = ["lap"]', "lap", id="unknown source"),
        pytest.param('licence = ["lab"]', "licence = []", "seen", id="seen nowhere"),
        pytest.param('licence = ["lab"]', 'licence = ["lab"]\nfame = ["lab"]', "fame", id="unknown fact"),
    ],
)
def test_rejects_a_malformed_entry_by_its_name(there: str, instead: str, words: str) -> None:
    assert there in SMALL
    parse_catalog(SMALL.encode(), "small.toml")

    with pytest.raises(ModelFormatError) as caught:
        parse_catalog(SMALL.replace(there, instead, 1).encode(), "small.toml")

    assert caught.value.message.startswith("small.toml: entry small-1b: ")
    assert words in caught.value.message
    assert "\n" not in str(caught.value)


def test_rejects_a_duplicate_id() -> None:
    twice = SMALL + SMALL[SMALL.index("[[entry]]") :]

    with pytest.raises(ModelFormatError, match=r"entry small-1b: an earlier entry has the same id"):
        parse_catalog(twice.encode(), "small.toml")


@pytest.mark.parametrize("data", [b"entry = [", b"\xff", b"looked_up = 'soon'", SMALL.encode() + b"[more]\na = 1"])
def test_rejects_a_malformed_catalogue_in_one_line(data: bytes) -> None:
    with pytest.raises(ModelFormatError, match=r"^small\.toml: [^\n]+$"):
        parse_catalog(data, "small.toml")


@pytest.mark.parametrize("name", ["llama-3.2-3b", "Llama-3.2-3B", " llama-3.2-3b "])
def test_finds_a_model_by_name_ignoring_case(name: str) -> None:
    assert load_catalog().find(name).repository == "meta-llama/Llama-3.2-3B-Instruct"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen3", "did you mean qwen3-0.6b or qwen3-1.7b or qwen3-4b?"),
        ("tinylama-1.1b", "did you mean tinyllama-1.1b?"),
        ("zzz", "promptai models list shows all models"),
        ("", "promptai models list shows all models"),
    ],
)
def test_suggests_the_nearest_names_for_an_unknown_one(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_catalog().find(name)

    assert caught.value.hint.startswith(hint)


def small() -> tuple[Catalog, Entry, dict[str, RepositoryFacts | HubError]]:
    """An entry, and matching responses of the hub."""
    catalog = parse_catalog(SMALL.encode(), "small.toml")
    entry = catalog.entries[0]
    sizes = {name: entry.expected_bytes(quant) for quant, name in entry.files.items()}
    return (
        catalog,
        entry,
        {
            entry.repository: RepositoryFacts(
                entry.repository, False, "apache-2.0", {"model.safetensors": 1}, "c0ffee"
            ),
            entry.gguf: RepositoryFacts(entry.gguf, False, None, {"README.md": 9, **sizes}, "c0ffee"),
        },
    )


def changed(answers: Mapping[str, RepositoryFacts | HubError], name: str, **change: object) -> RepositoryFacts:
    facts = answers[name]
    assert isinstance(facts, RepositoryFacts)
    return msgspec.structs.replace(facts, **change)


def test_no_differences_when_the_hub_agrees() -> None:
    _, entry, answers = small()

    assert differences(entry, answers) == []


@pytest.mark.parametrize("licence", ["Apache-2.0", "other"])
def test_a_licence_in_another_case_or_unspecified_is_no_difference(licence: str) -> None:
    _, entry, answers = small()
    answers[entry.repository] = changed(answers, entry.repository, license=licence)

    assert differences(entry, answers) == []


@pytest.mark.parametrize(
    ("licence", "words"),
    [("mit", "licence mit on the hub, Apache-2.0 in the catalogue"), (None, "licence not declared on the hub")],
)
def test_reports_another_licence(licence: str | None, words: str) -> None:
    _, entry, answers = small()
    answers[entry.repository] = changed(answers, entry.repository, license=licence)

    (line,) = differences(entry, answers)
    assert words in line


@pytest.mark.parametrize("which", ["repository", "gguf"])
def test_reports_a_newly_gated_repository(which: str) -> None:
    _, entry, answers = small()
    name = getattr(entry, which)
    answers[name] = changed(answers, name, gated=True)

    assert differences(entry, answers) == [f"{name} is gated on the hub, but not in the catalogue"]


def test_expects_access_to_a_gated_original_to_be_denied() -> None:
    _, entry, answers = small()
    gated = msgspec.structs.replace(entry, gated=True)

    assert differences(gated, answers) == [f"{entry.repository} is not gated on the hub, but in the catalogue"]
    assert differences(gated, answers | {entry.repository: HubGatedError("denied")}) == []


@pytest.mark.parametrize("which", ["repository", "gguf"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HubNotFoundError("gone"), r"the hub has no repository \S+"),
        (HubUnreachableError("HTTP 503"), "not checked: HTTP 503"),
    ],
    ids=["gone", "unanswered"],
)
def test_distinguishes_a_missing_repository_from_no_response(which: str, error: HubError, words: str) -> None:
    _, entry, answers = small()

    (line,) = differences(entry, answers | {getattr(entry, which): error})
    assert re.fullmatch(words, line)


def test_reports_a_missing_file_with_the_nearest_name() -> None:
    _, entry, answers = small()
    renamed = {"small.Q4_0.gguf": 1, entry.files["Q4_K_M"]: entry.expected_bytes("Q4_K_M")}
    answers[entry.gguf] = changed(answers, entry.gguf, files=renamed)

    assert differences(entry, answers) == ["somebody/Small-1B-GGUF has no small-q4_0.gguf (nearest: small.Q4_0.gguf)"]


@pytest.mark.parametrize(("times", "reported"), [(1.025, False), (0.975, False), (1.04, True), (0.96, True)])
def test_reports_a_size_that_the_shape_does_not_imply(times: float, *, reported: bool) -> None:
    """The cause may be another vocabulary, an output matrix stored twice, or another model of that name."""
    _, entry, answers = small()
    sizes = {name: round(entry.expected_bytes(quant) * times) for quant, name in entry.files.items()}
    answers[entry.gguf] = changed(answers, entry.gguf, files=sizes)

    assert [("its shape implies" in line) for line in differences(entry, answers)] == [True, True] * reported


def test_an_unknown_size_is_no_difference() -> None:
    _, entry, answers = small()
    answers[entry.gguf] = changed(answers, entry.gguf, files=dict.fromkeys(entry.files.values()))

    assert differences(entry, answers) == []
