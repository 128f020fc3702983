"""What an engine takes over from those who start it, and what it leaves behind."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from promptai.engine.client import EngineClient
from promptai.engine.launch import RunningEngine, port_taken
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineDiedError, EngineStartError
from support_engine import STUBBORN, Script, alive, engine_of, start_and_stop

pytestmark = pytest.mark.real


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that fake engines do not look into."""
    path = tmp_path / "yi.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def wrapped(model: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> RunningEngine:
    """An engine that will not end, started by a script that stays."""
    monkeypatch.setattr("promptai.engine.launch._STOP_S", 0.2)
    server = model.with_name("server.py")
    server.write_text(STUBBORN)
    return engine_of(script("wrapper", "export KEPT=1", f'{sys.executable} {server} "$@"', "echo ended"), model)


def test_an_engine_behind_a_script_is_stopped_with_it(wrapped: RunningEngine) -> None:
    """It has the gigabytes and the port; the script has nothing."""
    children: list[psutil.Process] = []

    async def play() -> None:
        async with wrapped:
            children.extend(psutil.Process(wrapped.pid).children())

    asyncio.run(play())

    assert len(children) == 1
    assert not alive(wrapped.pid)
    assert not alive(children[0].pid)
    assert not port_taken(wrapped.flags.port)


def test_an_engine_whose_script_was_killed_is_not_left_behind(wrapped: RunningEngine) -> None:
    """Its end is told, and it is ended."""

    async def play() -> None:
        async with wrapped, EngineClient(wrapped.base_url) as client:
            assert wrapped.pid is not None
            os.kill(wrapped.pid, signal.SIGKILL)
            assert await client.healthy()
            assert wrapped.death() is not None

    asyncio.run(play())

    assert not port_taken(wrapped.flags.port)


def test_an_engine_that_fails_behind_a_script_leaves_nothing(model: Path, script: Script) -> None:
    """A script that gave up, and something that it had started before."""
    engine = engine_of(script("fake", "sleep 60 &", "echo $!", "exit 3"), model)

    with pytest.raises(EngineStartError, match="exit code 3"):
        asyncio.run(start_and_stop(engine))

    assert not alive(int(engine.log.read_text()))


def test_variables_that_change_an_engine_or_open_a_server_are_not_passed_on(
    model: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server reads LLAMA_ARG_... as options that no manifest knows, and LLAMA_API_KEY locks us out."""
    for name in ("LLAMA_ARG_FLASH_ATTN", "LLAMA_API_KEY", "LLAMA_LOG_VERBOSITY", "PROMPTAI_API_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/kept")
    engine = engine_of(script("fake", "env", "exit 3"), model)

    with pytest.raises(EngineStartError):
        asyncio.run(start_and_stop(engine))

    assert "LD_LIBRARY_PATH=/kept" in engine.log.read_text()
    assert "secret" not in engine.log.read_text()


def test_files_in_the_user_s_folder_are_not_taken_for_modules(
    tmp_path: Path, small_model: Path, embedded: EngineBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the guard nor by the embedded engine: people call their scripts signal.py."""
    for name in ("signal", "ctypes", "msgspec", "xllamacpp", "promptai"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of a user was run')")
    monkeypatch.chdir(tmp_path)
    engine = engine_of(embedded, small_model)
    engine.log = tmp_path / "engine.log"

    asyncio.run(start_and_stop(engine))

    assert engine.load_s is not None


def test_a_script_in_python_finds_what_lies_beside_it(model: Path, script: Script) -> None:
    """Only our own modules are kept from looking there."""
    model.with_name("beside.py").write_text("WORD = 'found'")
    wrapper = model.with_name("wrapper.py")
    wrapper.write_text("import beside, sys; sys.exit(beside.WORD)")

    with pytest.raises(EngineStartError, match="last log line: found"):
        asyncio.run(start_and_stop(engine_of(script("fake", f"exec {sys.executable} {wrapper}"), model)))


@pytest.mark.parametrize("what", ["gone", "dies", "silent"])
def test_the_folder_of_a_model_is_for_the_log_and_not_for_clients(
    model: Path, script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The error is the reason of a 503; an engine's own words have the path too, of all parts of a model."""
    monkeypatch.setattr("promptai.engine.launch._START_BASE_S", 0.5)
    said = f"error loading model: cannot open {model.parent}/yi-00002-of-00002.gguf"
    engine = engine_of(script("fake", f"echo '{said}'", "exec sleep 60" if what == "silent" else "exit 3"), model)
    if what == "gone":
        model.unlink()

    with caplog.at_level(logging.INFO, "promptai.engine"), pytest.raises(EngineStartError) as caught:
        asyncio.run(start_and_stop(engine))

    assert str(model.parent) not in str(caught.value)
    assert "yi" in caught.value.message
    assert what == "silent" or str(model) in caplog.text


def test_the_folder_of_a_model_whose_engine_died_is_not_for_clients(model: Path) -> None:
    server = model.with_name("server.py")
    server.write_text(f"print('error loading model: cut {model}', flush=True)\n{STUBBORN}")
    engine = engine_of((sys.executable, str(server)), model)

    async def play() -> EngineDiedError | None:
        async with engine:
            assert engine.pid is not None
            os.killpg(engine.pid, signal.SIGABRT)
            return engine.death()

    death = asyncio.run(play())

    assert death is not None
    assert death.message == "the engine of yi died: cut yi.gguf"
