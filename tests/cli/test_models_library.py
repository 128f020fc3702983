"""The commands for the library, in this process: separate processes would cost half a second each."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from promptai.bench.target_facts import parse_targets
from promptai.cli.main import cli
from promptai.engine.url import EngineUrl
from promptai.errors import ModelError, ModelNotFoundError, PromptAIError, SettingsError
from promptai.models.library import Library
from support_hub import Hub, hub_with, point_at

FILE = "tiny-Q4_0.gguf"


@pytest.fixture
def hub(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a library with a model pulled from it."""
    monkeypatch.setenv("PROMPTAI_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    with hub_with(people__tiny={FILE: small_model.read_bytes()}) as hub:
        point_at(hub.url, tmp_path, monkeypatch)
        assert models("pull", "hub:people/tiny").exit_code == 0
        yield hub


@pytest.fixture
def library(hub: Hub, tmp_path: Path) -> Library:
    assert hub.seen
    return Library(tmp_path / "models")


def models(*arguments: str | Path, answer: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["models", *map(str, arguments)], input=answer)


def refused(result: Result, kind: type[PromptAIError]) -> str:
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def test_disk_shows_models_with_their_sources_and_the_free_space(library: Library) -> None:
    (library.root / "own.gguf").write_bytes(b"mine")
    (library.root / "people--tiny" / "x.gguf.0123456789ab.part").write_bytes(bytes(5000))

    shown = models("disk").output
    facts = msgspec.json.decode(models("disk", "--json").output)

    for words in ("hub:people/tiny:tiny-Q4", "unverified", "leftover", "5 KiB", "free"):
        assert words in shown
    assert [Path(model["path"]).name for model in facts["models"]] == ["own.gguf", FILE]
    assert list(facts["leftovers"].values()) == [5000]
    assert facts["free_bytes"] > 0


def test_disk_can_delete_partial_downloads(library: Library) -> None:
    (library.root / "people--tiny" / "x.gguf.0123456789ab.part").write_bytes(bytes(5000))

    assert "5 KiB freed" in models("disk", "--clean-partial").output
    assert library.leftovers() == []
    assert len(library.models()) == 1


def test_verify_reports_intact_and_damaged_models_and_exits_with_1(library: Library) -> None:
    (library.root / "own.gguf").write_bytes(b"mine")
    whole = models("verify")
    assert whole.exit_code == 0
    assert f"people--tiny/{FILE}: intact" in whole.output
    assert "models/own.gguf: no checksum recorded" in whole.output

    path = library.root / "people--tiny" / FILE
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    damaged = models("verify", "tiny-q4_0")

    assert f"people--tiny/{FILE} is damaged" in damaged.output
    assert "1 of 1 models are damaged" in refused(damaged, PromptAIError)
    assert getattr(damaged.exception, "exit_code", None) == 1


def test_remove_needs_yes_without_a_terminal(library: Library) -> None:
    """A script cannot be asked for confirmation."""
    assert "--yes" in refused(models("remove", FILE), SettingsError)
    assert len(library.models()) == 1

    done = models("remove", FILE, FILE, "--yes")

    assert "KiB freed" in done.output
    assert library.models() == []


def test_remove_asks_for_confirmation_on_a_terminal(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptai.cli.models_library._is_interactive", lambda: True)

    assert f"Delete people--tiny/{FILE}" in models("remove", FILE, answer="n\n").output
    assert len(library.models()) == 1
    assert models("remove", FILE, answer="y\n").exit_code == 0
    assert library.models() == []


@pytest.mark.parametrize("verb", ["remove", "verify"])
def test_reports_a_name_that_the_library_lacks(library: Library, verb: str) -> None:
    assert f"no model named 'nothing' in {library.root}" in refused(models(verb, "nothing"), ModelNotFoundError)


def test_carries_a_bundle_on_a_stick(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = models("export", "tiny-q4_0", tmp_path / "stick")
    assert f"promptai models import {tmp_path / 'stick'}" in done.output
    monkeypatch.setenv("PROMPTAI_MODELS", str(tmp_path / "board"))

    assert str(tmp_path / "board" / "people--tiny" / FILE) in models("import", tmp_path / "stick").output

    path = tmp_path / "stick" / "people--tiny" / FILE
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    monkeypatch.setenv("PROMPTAI_MODELS", str(tmp_path / "another"))
    assert "is damaged" in refused(models("import", tmp_path / "stick"), ModelError)
    assert Library(tmp_path / "another").models() == []
    assert len(library.models()) == 1


def test_pull_of_a_url_reports_the_missing_checksum(hub: Hub, small_model: Path) -> None:
    hub.plain["own.gguf"] = small_model.read_bytes()

    done = models("pull", f"{hub.url}/plain/own.gguf")

    assert "no checksum from its source" in done.stderr
    assert "its source gave no checksum" in done.stdout


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64])
def test_pull_rejects_an_invalid_checksum(hub: Hub, sha256: str) -> None:
    assert "64 hexadecimal digits" in refused(models("pull", hub.url, "--sha256", sha256), SettingsError)


def test_bench_resolves_stored_models_and_leaves_paths_and_servers_unchanged(library: Library, tmp_path: Path) -> None:
    stored = library.root / "people--tiny" / FILE
    paths = ["./nowhere.gguf", f"{tmp_path}/models/../models"]

    found = parse_targets(["tiny-q4_0", f"hub:people/tiny:{FILE}", *paths, "http://pi-3:8080"], library.root)

    assert found == [stored, stored, *map(Path, paths), EngineUrl.parse("http://pi-3:8080")]
    with pytest.raises(ModelNotFoundError):
        parse_targets(["tinier"], library.root)
