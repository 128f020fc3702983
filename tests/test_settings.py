import os
from pathlib import Path

import pytest

from promptai.errors import SettingsError
from promptai.settings import (
    CONFIG_NAME,
    AliasEntry,
    EngineSettings,
    FleetEntry,
    GatewaySettings,
    ServeEntry,
    Settings,
    board_key,
    cache_directory,
    is_empty,
    keys_path,
    load_secrets,
    load_settings,
    models_directory,
    settings_file,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty directory: the user who runs the tests may have settings."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        pytest.param("[engine]\nthread = 4", "unknown field `thread`", "did you mean threads?", id="misspelt-key"),
        pytest.param("[bench]\nthreads = 4", "unknown field `threads`", "repeats", id="key-of-another-section"),
        pytest.param("[engin]\nthreads = 4", "unknown field `engin`", "did you mean engine?", id="misspelt-section"),
        pytest.param("rums = 'x'", "unknown field `rums`", "did you mean runs?", id="misspelt-top-key"),
        pytest.param("zzz = 1", "unknown field `zzz`", "known keys: engine, bench, runs", id="nothing-near"),
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
        pytest.param("[gateway]\nprot = 1", "unknown field `prot`", "did you mean port?", id="misspelt-gateway-key"),
        pytest.param(
            "[[fleet]]\nurl = 'http://a'\napi_key = 'x'",
            "unknown field `api_key`",
            "did you mean api_key_env?",
            id="a-key-in-the-file",
        ),
        pytest.param("[[serve]]\nmodel = 'a'\npined = true", "`pined`", "did you mean pinned?", id="misspelt-in-list"),
        pytest.param("[aliases.x]\nmodle = 'a'", "`modle`", "did you mean model?", id="misspelt-in-alias"),
        pytest.param("[[fleet]]\nslots = 2", "missing required field `url`", "settings.md", id="board-without-url"),
        pytest.param("[fleet]\nurl = 'a'", "Expected `array`, got `object`", "settings.md", id="list-without-list"),
        pytest.param("[gateway]\nstrategy = 'random'", "Invalid enum value 'random'", "settings.md", id="strategy"),
        pytest.param("[gateway]\nport = 70000", "gateway.port must be between 0 and 65535", "settings.md", id="port"),
        pytest.param("[gateway]\ndrain_s = -1", "gateway.drain_s must be at least 0", "settings.md", id="drain"),
        pytest.param("[gateway]\nping_s = nan", "gateway.ping_s must be at least 0", "settings.md", id="ping"),
        pytest.param("[engine", "Expected ']'", "settings.md", id="not-toml"),
        pytest.param("runs = '\udcff'", "utf-8", "settings.md", id="not-utf-8"),
    ],
)
def test_rejects_a_mistake_with_file_reason_and_hint(here: Path, text: str, reason: str, hint: str) -> None:
    """If a key were silently ignored, a benchmark would measure something else."""
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
        *("gateway.wait_s", "gateway.stall_s", "gateway.attempts", "gateway.body_mib", "gateway.memory_mib"),
    ],
)
def test_counts_must_be_above_zero(here: Path, setting: str) -> None:
    section, key = setting.split(".")
    (here / CONFIG_NAME).write_text(f"[{section}]\n{key} = 0")

    with pytest.raises(SettingsError, match=f"{setting} must be above 0, not 0"):
        load_settings(environ={})


@pytest.mark.parametrize("section", ["engine", "gateway"])
def test_a_prompt_cache_must_not_be_negative(here: Path, section: str) -> None:
    """For an engine, -1 means "no limit"; in a memory forecast it would be a negative size."""
    (here / CONFIG_NAME).write_text(f"[{section}]\ncache_ram_mib = -1")

    with pytest.raises(SettingsError, match=f"{section}.cache_ram_mib must be at least 0, not -1"):
        load_settings(environ={})

    (here / CONFIG_NAME).write_text(f"[{section}]\ncache_ram_mib = 0")
    assert load_settings(environ={}).gateway.cache_ram_mib in {0, None}


@pytest.mark.parametrize("by", ["option", "environment"])
@pytest.mark.parametrize(("name", "reason"), [("absent.toml", "No such file"), (".", "Is a directory")])
def test_a_named_file_must_exist(by: str, name: str, reason: str) -> None:
    config, environ = (Path(name), {}) if by == "option" else (None, {"PROMPTAI_CONFIG": name})

    with pytest.raises(SettingsError, match=reason):
        load_settings(config, environ)


def test_without_a_file_everything_has_a_default() -> None:
    assert Settings() == load_settings(environ={})


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_file_is_valid_unless_refused(here: Path, text: str) -> None:
    """A comment makes the file non-empty: it states that there are no settings."""
    file = here / CONFIG_NAME
    file.write_text(text)

    assert (load_settings(environ={}), is_empty(file)) == (Settings(), True)
    with pytest.raises(SettingsError, match=f"settings {CONFIG_NAME} is empty"):
        load_settings(environ={}, refuse_empty=True)

    file.write_text("# none\n")
    assert (load_settings(environ={}, refuse_empty=True), is_empty(file)) == (Settings(), False)


def test_a_missing_file_is_empty_and_a_pipe_is_not_read(here: Path) -> None:
    os.mkfifo(here / "pipe")

    assert [is_empty(None), is_empty(here / "absent"), is_empty(here / "pipe")] == [True, True, True]


def test_the_file_overrides_the_defaults(here: Path) -> None:
    (here / CONFIG_NAME).write_text("runs = 'elsewhere'\n[engine]\nthreads = 3\ncache_type = 'q8_0'\n")

    assert Settings(EngineSettings(threads=3, cache_type="q8_0"), runs="elsewhere") == load_settings(environ={})


def test_the_environment_overrides_the_file(here: Path) -> None:
    (here / CONFIG_NAME).write_text("runs = 'file'\n[engine]\npath = 'file'\nthreads = 3\n")

    settings = load_settings(
        environ={"PROMPTAI_ENGINE": "/opt/llama-server", "PROMPTAI_RUNS": "/data/runs", "PROMPTAI_MODELS": "/sd"}
    )

    assert Settings(EngineSettings("/opt/llama-server", threads=3), runs="/data/runs", models="/sd") == settings


def test_an_empty_variable_counts_as_unset(here: Path) -> None:
    (here / CONFIG_NAME).write_text("runs = 'file'")

    empty = dict.fromkeys(("PROMPTAI_CONFIG", "PROMPTAI_ENGINE", "PROMPTAI_RUNS", "PROMPTAI_MODELS"), "")

    assert Settings(runs="file") == load_settings(environ=empty)


def test_prefers_the_option_to_the_environment_to_the_directory(here: Path) -> None:
    for name in ("option.toml", "environment.toml", CONFIG_NAME):
        (here / name).write_text(f"runs = '{name}'")
    environ = {"PROMPTAI_CONFIG": "environment.toml"}

    assert [
        load_settings(Path("option.toml"), environ).runs,
        load_settings(None, environ).runs,
        load_settings(None, {}).runs,
    ] == ["option.toml", "environment.toml", CONFIG_NAME]


def test_reads_what_is_served(here: Path) -> None:
    (here / CONFIG_NAME).write_text("""
[gateway]
port = 9000
cors_origins = ["https://desk.example"]
[[fleet]]
url = "http://pi-1:8080"
slots = 2
api_key_env = "PI_KEY"
[[fleet]]
url = "http://pi-2:8080"
[[serve]]
model = "tinyllama-1.1b"
pinned = true
ttl_s = 600
[aliases.gpt-4o-mini]
model = "tinyllama-1.1b"
params = { temperature = 0.2 }
[fallbacks]
"tinyllama-1.1b" = "gemma-2b"
""")

    assert load_settings(environ={}) == Settings(
        gateway=GatewaySettings(port=9000, cors_origins=("https://desk.example",)),
        fleet=(FleetEntry("http://pi-1:8080", slots=2, api_key_env="PI_KEY"), FleetEntry("http://pi-2:8080")),
        serve=(ServeEntry("tinyllama-1.1b", pinned=True, ttl_s=600.0),),
        aliases={"gpt-4o-mini": AliasEntry("tinyllama-1.1b", {"temperature": 0.2})},
        fallbacks={"tinyllama-1.1b": "gemma-2b"},
    )


@pytest.mark.parametrize("key", ["slots", "prefill_tps", "decode_tps", "capability"])
def test_figures_of_a_board_must_be_above_zero(here: Path, key: str) -> None:
    (here / CONFIG_NAME).write_text(f"[[fleet]]\nurl = 'http://a'\n{key} = 0")

    with pytest.raises(SettingsError, match=f"fleet.{key} must be above 0, not 0"):
        load_settings(environ={})


@pytest.mark.parametrize("key", ["slots", "context", "ttl_s", "capability"])
def test_figures_of_a_model_must_be_above_zero(here: Path, key: str) -> None:
    (here / CONFIG_NAME).write_text(f"[[serve]]\nmodel = 'a'\n{key} = 0")

    with pytest.raises(SettingsError, match=f"serve.{key} must be above 0, not 0"):
        load_settings(environ={})


def test_reads_the_key_of_a_board_from_its_variable() -> None:
    board = FleetEntry("http://pi-1:8080", api_key_env="PI_KEY")

    assert [board_key(board, {"PI_KEY": "sesame"}), board_key(FleetEntry("http://a"), {})] == ["sesame", None]
    for environ in ({}, {"PI_KEY": ""}):
        with pytest.raises(SettingsError, match=r"^\$PI_KEY, the API key of http://pi-1:8080, is not set"):
            board_key(board, environ)


def test_finds_the_key_file_by_environment_then_settings() -> None:
    settings = Settings(gateway=GatewaySettings(keys="/etc/promptai/keys.json"))

    assert keys_path({"PROMPTAI_KEYS": "/run/keys"}, settings) == Path("/run/keys")
    assert keys_path({"XDG_CONFIG_HOME": "/home/x"}, settings) == Path("/etc/promptai/keys.json")
    assert keys_path({"XDG_CONFIG_HOME": "/home/x"}, Settings()) == Path("/home/x/promptai/keys.json")


def test_uses_the_named_file_or_the_one_in_the_directory(here: Path) -> None:
    assert settings_file(environ={}) is None
    (here / CONFIG_NAME).touch()

    assert settings_file(environ={}) == Path(CONFIG_NAME)
    assert settings_file(environ={"PROMPTAI_CONFIG": "e.toml"}) == Path("e.toml")
    assert settings_file(Path("o.toml"), {"PROMPTAI_CONFIG": "e.toml"}) == Path("o.toml")


def test_secrets_come_only_from_the_environment() -> None:
    assert load_secrets({"PROMPTAI_API_KEY": "sesame"}).api_key == "sesame"
    assert [load_secrets(environ).api_key for environ in ({}, {"PROMPTAI_API_KEY": ""})] == [None, None]


def test_the_cache_directory_follows_the_xdg_standard() -> None:
    assert Path("/data/cache/promptai") == cache_directory({"XDG_CACHE_HOME": "/data/cache"})
    assert Path.home() / ".cache" / "promptai" == cache_directory({})


def test_the_models_directory_follows_the_xdg_standard_unless_set() -> None:
    assert Path("/data/share/promptai/models") == models_directory(Settings(), {"XDG_DATA_HOME": "/data/share"})
    assert Path.home() / ".local/share/promptai/models" == models_directory(Settings(), {})
    assert Path.home() / "sd" == models_directory(Settings(models="~/sd"), {"XDG_DATA_HOME": "/data/share"})
