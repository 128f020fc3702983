"""The models of this machine that ``promptai serve`` offers; nothing is started."""

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from promptai.advisor.profile import ProfileKey, Profiles
from promptai.cli.serve_models import EngineSetup, batch_for, describe_model, flags_for, select_models
from promptai.engine.locate import EngineBinary
from promptai.errors import ModelNotFoundError, SettingsError
from promptai.models.library import Library, Sidecar
from promptai.settings import EngineSettings, FleetEntry, ServeEntry, Settings

SETUP = EngineSetup(
    binary=EngineBinary("PATH", ("llama-server",), "b1", None),
    threads=4,
    engine=EngineSettings(slots=2),
    cache_ram_mib=100,
    calibration=None,
    profiles=Profiles(Path("absent"), ProfileKey(cpu="a", label="b", threads=4), lambda _: None),
)


def settings(root: Path, *names: str) -> Settings:
    """Settings with a library and the named models."""
    return Settings(models=str(root), serve=tuple(ServeEntry(name) for name in names))


def keep(root: Path, folder: str, file: str, source: Path, *, catalog: str | None = None) -> None:
    """Put a model into the library; a catalogue model with its sidecar."""
    path = root / folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes())
    if catalog is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        time = "2026-11-20T12:00:00+00:00"
        sidecar = Sidecar(f"hub:{folder}", file, path.stat().st_size, digest, time, time, catalog=catalog)
        Library(root).write_sidecar(path, sidecar)


def names(root: Path, *wanted: str) -> list[str]:
    """Return the names of the selected models."""
    notes: list[str] = []
    found = select_models(settings(root, *wanted), notes.append)
    assert notes == []
    return [chosen.name for chosen in found]


def test_an_empty_library_serves_the_bundled_model_at_once(tmp_path: Path) -> None:
    found = select_models(settings(tmp_path), lambda _: None)

    assert [(chosen.name, chosen.entry.preload) for chosen in found] == [("promptai-tiny", True)]


def test_with_boards_only_named_models_are_served_here(tmp_path: Path) -> None:
    boards = Settings(models=str(tmp_path), fleet=(FleetEntry("http://pi-1:8080"),))

    assert select_models(boards, lambda _: None) == []


def test_models_are_named_as_in_the_catalogue_or_by_their_file(tmp_path: Path, small_model: Path) -> None:
    keep(tmp_path, "a--b", "tiny-q4.gguf", small_model, catalog="tinyllama-1.1b")
    keep(tmp_path, "c--d", "mine.gguf", small_model)

    assert names(tmp_path) == ["tinyllama-1.1b", "mine"]
    assert names(tmp_path, "mine.gguf", "TinyLlama-1.1B", str(small_model)) == ["mine", "tinyllama-1.1b", "small"]


def test_two_files_of_one_model_get_different_names(tmp_path: Path, small_model: Path) -> None:
    keep(tmp_path, "a--b", "q4.gguf", small_model, catalog="tinyllama-1.1b")
    keep(tmp_path, "a--b", "q8.gguf", small_model, catalog="tinyllama-1.1b")
    keep(tmp_path, "c--d", "q8.gguf", small_model, catalog="gemma-2b")

    assert names(tmp_path) == ["q4", "a--b/q8", "gemma-2b"]


def test_files_with_the_same_name_are_named_with_their_folders(tmp_path: Path, small_model: Path) -> None:
    for folder in ("ssd1/models", "ssd2/models", "ssd2/other"):
        keep(tmp_path / "elsewhere", folder, "yi.gguf", small_model)
    paths = [str(tmp_path / "elsewhere" / folder / "yi.gguf") for folder in ("ssd1/models", "ssd2/models")]

    assert names(tmp_path, *paths) == ["ssd1/models/yi", "ssd2/models/yi"]
    assert names(tmp_path, *paths, str(tmp_path / "elsewhere/ssd2/other/yi.gguf")) == [
        "ssd1/models/yi",
        "ssd2/models/yi",
        "other/yi",
    ]


def test_rejects_files_without_distinct_names(tmp_path: Path, small_model: Path) -> None:
    paths = [tmp_path / "yi.gguf", tmp_path / "yi"]
    for path in paths:
        path.write_bytes(small_model.read_bytes())

    with pytest.raises(SettingsError, match=r"yi\.gguf and .*yi would both be named yi ") as refusal:
        select_models(settings(tmp_path / "library", *map(str, paths)), lambda _: None)

    assert refusal.value.hint == "rename one of the files"


def test_a_name_too_long_for_a_file_is_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model named 'xxx"):
        select_models(settings(tmp_path, "x" * 300), lambda _: None)


def test_reports_a_path_in_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def refused(path: str | Path, *args: object, **options: bool) -> os.stat_result:
        if str(path).startswith("/closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)  # root may enter every folder
    (chosen,) = select_models(settings(tmp_path, "/closed/yi.gguf"), lambda _: None)

    with pytest.raises(ModelNotFoundError, match=r"model /closed/yi\.gguf cannot be read"):
        describe_model(chosen, SETUP)


def test_skips_damaged_library_files_with_a_note(tmp_path: Path, small_model: Path) -> None:
    keep(tmp_path, "a--b", "good.gguf", small_model)
    (tmp_path / "a--b" / "cut.gguf").write_bytes(small_model.read_bytes()[:2000])
    notes: list[str] = []

    found = select_models(settings(tmp_path), notes.append)

    assert [chosen.name for chosen in found] == ["good"]
    assert len(notes) == 1
    assert notes[0].startswith("not serving a--b/cut.gguf: model ")


@pytest.mark.parametrize(
    ("wanted", "error", "word"),
    [
        (("absent",), ModelNotFoundError, "no model named 'absent'"),
        (("http://a:1",), SettingsError, "http://a:1 is a server, not a model"),
        (("http://user:secret@a:1",), SettingsError, "^a:1 is a server, not a model"),
        (("promptai-tiny", "promptai-tiny"), SettingsError, "promptai-tiny.gguf is listed twice"),
    ],
)
def test_rejects_a_wrong_name(tmp_path: Path, wanted: tuple[str, ...], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        select_models(settings(tmp_path, *wanted), lambda _: None)


def test_without_a_calibration_memory_is_the_bound_plus_a_tenth(tmp_path: Path, small_model: Path) -> None:
    (chosen,) = select_models(settings(tmp_path, str(small_model)), lambda _: None)

    model = describe_model(chosen, SETUP)

    kv_bytes = 2 * 2 * 4096 * (2 * 32)  # f16 keys and values of both layers: two heads of 16 each
    least = small_model.stat().st_size + 2 * kv_bytes + 100 * 1024**2
    assert (model.context, model.slots, model.rates.source) == (4096, 2, "unknown")
    assert least < model.needed_bytes < least + 10_000_000
    assert model.capability is not None
    assert 0 < model.capability < 0.01


def test_a_smaller_cache_type_needs_less_memory(tmp_path: Path, small_model: Path) -> None:
    (chosen,) = select_models(settings(tmp_path, str(small_model)), lambda _: None)
    q8 = msgspec.structs.replace(SETUP, engine=EngineSettings(slots=2, cache_type="q8_0"))

    saved = describe_model(chosen, SETUP).needed_bytes - describe_model(chosen, q8).needed_bytes

    kv_bytes = 2 * 2 * 2 * 4096 * (2 * 32)  # f16, both slots
    assert saved == pytest.approx(kv_bytes * (1 - 34 / 64) * 1.1, abs=2)


def test_limits_the_context_to_that_of_the_model(tmp_path: Path, small_model: Path) -> None:
    wanted = Settings(models=str(tmp_path), serve=(ServeEntry(str(small_model), context=100_000, slots=3),))
    (chosen,) = select_models(wanted, lambda _: None)

    model = describe_model(chosen, SETUP)
    flags = flags_for(SETUP)(model, 9000)

    assert (model.context, flags.context, flags.slots, flags.threads) == (4096, 3 * 4096, 3, 4)
    assert (flags.batch, flags.ubatch, flags.port) == (128, 128, 9000)


@pytest.mark.parametrize(
    ("prefill_tps", "batch"),
    [(None, 128), (5.0, 32), (60.0, 32), (100.0, 64), (260.0, 128), (1000.0, 512), (50_000.0, 512)],
)
def test_a_batch_takes_about_half_a_second(prefill_tps: float | None, batch: int) -> None:
    assert batch == batch_for(prefill_tps)


def test_limits_the_batch_to_the_settings() -> None:
    assert [batch_for(None, at_most=64), batch_for(9000.0, at_most=256)] == [64, 256]
