"""The environment that an engine inherits, and the processes that it leaves behind."""

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
    """A file that fake engines do not open."""
    path = tmp_path / "yi.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def wrapped(model: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> RunningEngine:
    """An engine that ignores SIGTERM, started by a script that keeps running."""
    monkeypatch.setattr("promptai.engine.launch._STOP_S", 0.2)
    server = model.with_name("server.py")
    server.write_text(STUBBORN)
    return engine_of(script("wrapper", "export KEPT=1", f'{sys.executable} {server} "$@"', "echo ended"), model)


def test_stops_an_engine_behind_a_script(wrapped: RunningEngine) -> None:
    """The engine holds the gigabytes and the port, not the script."""
    children: list[psutil.Process] = []

    async def play() -> None:
        async with wrapped:
            children.extend(psutil.Process(wrapped.pid).children())

    asyncio.run(play())

    assert len(children) == 1
    assert not alive(wrapped.pid)
    assert not alive(children[0].pid)
    assert not port_taken(wrapped.flags.port)


def test_ends_an_engine_whose_script_was_killed(wrapped: RunningEngine) -> None:
    async def play() -> None:
        async with wrapped, EngineClient(wrapped.base_url) as client:
            assert wrapped.pid is not None
            os.kill(wrapped.pid, signal.SIGKILL)
            assert await client.healthy()
            assert wrapped.death() is not None

    asyncio.run(play())

    assert not port_taken(wrapped.flags.port)


def test_a_failing_script_leaves_nothing_running(model: Path, script: Script) -> None:
    """The script exits after it has started another process."""
    engine = engine_of(script("fake", "sleep 60 &", "echo $!", "exit 3"), model)

    with pytest.raises(EngineStartError, match="exit code 3"):
        asyncio.run(start_and_stop(engine))

    assert not alive(int(engine.log.read_text()))


def test_does_not_pass_on_llama_variables_and_keys(
    model: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server reads LLAMA_ARG_... as options that no manifest records, and LLAMA_API_KEY locks us out."""
    for name in ("LLAMA_ARG_FLASH_ATTN", "LLAMA_API_KEY", "LLAMA_LOG_VERBOSITY", "PROMPTAI_API_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/kept")
    engine = engine_of(script("fake", "env", "exit 3"), model)

    with pytest.raises(EngineStartError):
        asyncio.run(start_and_stop(engine))

    assert "LD_LIBRARY_PATH=/kept" in engine.log.read_text()
    assert "secret" not in engine.log.read_text()


def test_files_in_the_users_folder_do_not_replace_modules(
    tmp_path: Path, small_model: Path, embedded: EngineBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the guard nor in the embedded engine: users have scripts called signal.py."""
    for name in ("signal", "ctypes", "msgspec", "xllamacpp", "promptai"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of a user was run')")
    monkeypatch.chdir(tmp_path)
    engine = engine_of(embedded, small_model)
    engine.log = tmp_path / "engine.log"

    asyncio.run(start_and_stop(engine))

    assert engine.load_s is not None


def test_a_python_script_can_import_its_neighbours(model: Path, script: Script) -> None:
    """Only our own modules are protected."""
    model.with_name("beside.py").write_text("WORD = 'found'")
    wrapper = model.with_name("wrapper.py")
    wrapper.write_text("import beside, sys; sys.exit(beside.WORD)")

    with pytest.raises(EngineStartError, match="last log line: found"):
        asyncio.run(start_and_stop(engine_of(script("fake", f"exec {sys.executable} {wrapper}"), model)))


@pytest.mark.parametrize("what", ["gone", "dies", "silent"])
def test_hides_the_models_folder_from_clients(
    model: Path, script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The error is the reason of a 503; an engine prints the paths of all parts of a model."""
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


def test_hides_the_models_folder_when_the_engine_dies(model: Path) -> None:
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
