from pathlib import Path

import pytest

from promptai.errors import SettingsError
from promptai.settings import (
    CONFIG_NAME,
    EngineSettings,
    Settings,
    cache_directory,
    load_secrets,
    load_settings,
    models_directory,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in: whoever runs the tests may have settings of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        pytest.param("[engine]\nthread = 4", "unknown field `thread`", "did you mean threads?", id="misspelt-key"),
        pytest.param("[bench]\nthreads = 4", "unknown field `threads`", "repeats", id="key-of-another-section"),
        pytest.param("[engin]\nthreads = 4", "unknown field `engin`", "did you mean engine?", id="misspelt-section"),
        pytest.param("rums = 'x'", "unknown field `rums`", "did you mean runs?", id="misspelt-top-key"),
        pytest.param("zzz = 1", "unknown field `zzz`", "known here: engine, bench, runs", id="nothing-near"),
        pytest.param(
            "[engine]\nthreads = '4'", "Expected `int | null`, got `str`", "settings.md", id="text-for-number"
        ),
        pytest.param("[engine]\nmmap = 1", "Expected `bool`, got `int`", "settings.md", id="number-for-switch"),
        pytest.param("[engine]\nslots = true", "Expected `int`, got `bool`", "settings.md", id="switch-for-number"),
        pytest.param("[engine]\nslots = 1.5", "Expected `int`, got `float`", "settings.md", id="fraction-for-count"),
        pytest.param("[engine]\ncache_type = 'q4'", "Invalid enum value 'q4'", "settings.md", id="unknown-type"),
        pytest.param("engine = 4", "Expected `object`, got `int`", "settings.md", id="section-is-no-table"),
        pytest.param("[engine]\nslots = 0", "engine.slots must be above 0, not 0", "settings.md", id="zero"),
        pytest.param("[engine]\nthreads = -1", "engine.threads must be above 0, not -1", "settings.md", id="negative"),
        pytest.param("[bench]\ntimeout_s = 0.0", "bench.timeout_s must be above 0", "settings.md", id="zero-seconds"),
        pytest.param("[bench]\ntimeout_s = nan", "bench.timeout_s must be above 0", "settings.md", id="not-a-number"),
        pytest.param("[engine", "Expected ']'", "settings.md", id="not-toml"),
        pytest.param("runs = '\udcff'", "utf-8", "settings.md", id="not-utf-8"),
    ],
)
def test_a_mistake_is_refused_with_file_reason_and_remedy(here: Path, text: str, reason: str, hint: str) -> None:
    """A key that is silently ignored is a benchmark that measured something else."""
    (here / CONFIG_NAME).write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(SettingsError) as refusal:
        load_settings(environ={})

    assert refusal.value.message.startswith(f"settings {CONFIG_NAME}: ")
    assert reason in refusal.value.message
    assert hint in refusal.value.hint


@pytest.mark.parametrize(
    "setting",
    [
        *("engine.slots", "engine.batch", "engine.threads", "engine.context"),
        *("bench.max_tokens", "bench.repeats", "bench.timeout_s"),
    ],
)
def test_what_is_counted_must_be_above_zero(here: Path, setting: str) -> None:
    section, key = setting.split(".")
    (here / CONFIG_NAME).write_text(f"[{section}]\n{key} = 0")

    with pytest.raises(SettingsError, match=f"{setting} must be above 0, not 0"):
        load_settings(environ={})


@pytest.mark.parametrize("by", ["option", "environment"])
@pytest.mark.parametrize(("name", "reason"), [("absent.toml", "No such file"), (".", "Is a directory")])
def test_a_file_that_was_named_must_be_there(by: str, name: str, reason: str) -> None:
    config, environ = (Path(name), {}) if by == "option" else (None, {"PROMPTAI_CONFIG": name})

    with pytest.raises(SettingsError, match=reason):
        load_settings(config, environ)


def test_without_a_file_everything_has_a_default() -> None:
    assert Settings() == load_settings(environ={})


def test_the_file_beats_the_defaults(here: Path) -> None:
    (here / CONFIG_NAME).write_text("runs = 'elsewhere'\n[engine]\nthreads = 3\ncache_type = 'q8_0'\n")

    assert Settings(EngineSettings(threads=3, cache_type="q8_0"), runs="elsewhere") == load_settings(environ={})


def test_the_environment_beats_the_file(here: Path) -> None:
    (here / CONFIG_NAME).write_text("runs = 'file'\n[engine]\npath = 'file'\nthreads = 3\n")

    settings = load_settings(
        environ={"PROMPTAI_ENGINE": "/opt/llama-server", "PROMPTAI_RUNS": "/data/runs", "PROMPTAI_MODELS": "/sd"}
    )

    assert Settings(EngineSettings("/opt/llama-server", threads=3), runs="/data/runs", models="/sd") == settings


def test_an_empty_variable_is_none(here: Path) -> None:
    (here / CONFIG_NAME).write_text("runs = 'file'")

    empty = dict.fromkeys(("PROMPTAI_CONFIG", "PROMPTAI_ENGINE", "PROMPTAI_RUNS", "PROMPTAI_MODELS"), "")

    assert Settings(runs="file") == load_settings(environ=empty)


def test_an_option_beats_the_environment_and_that_the_directory(here: Path) -> None:
    for name in ("option.toml", "environment.toml", CONFIG_NAME):
        (here / name).write_text(f"runs = '{name}'")
    environ = {"PROMPTAI_CONFIG": "environment.toml"}

    assert [
        load_settings(Path("option.toml"), environ).runs,
        load_settings(None, environ).runs,
        load_settings(None, {}).runs,
    ] == ["option.toml", "environment.toml", CONFIG_NAME]


def test_a_secret_comes_from_the_environment_alone() -> None:
    assert load_secrets({"PROMPTAI_API_KEY": "sesame"}).api_key == "sesame"
    assert [load_secrets(environ).api_key for environ in ({}, {"PROMPTAI_API_KEY": ""})] == [None, None]


def test_the_cache_is_where_the_desktop_standard_says() -> None:
    assert Path("/data/cache/promptai") == cache_directory({"XDG_CACHE_HOME": "/data/cache"})
    assert Path.home() / ".cache" / "promptai" == cache_directory({})


def test_models_are_kept_where_the_desktop_standard_says_unless_set() -> None:
    assert Path("/data/share/promptai/models") == models_directory(Settings(), {"XDG_DATA_HOME": "/data/share"})
    assert Path.home() / ".local/share/promptai/models" == models_directory(Settings(), {})
    assert Path.home() / "sd" == models_directory(Settings(models="~/sd"), {"XDG_DATA_HOME": "/data/share"})
