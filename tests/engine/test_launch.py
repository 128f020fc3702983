import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from promptai.engine.client import EngineClient
from promptai.engine.embedded import EXIT_NO_WHEEL
from promptai.engine.launch import explain_exit, free_port, port_taken
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineStartError
from support_engine import STUBBORN, Script, alive, engine_of, start_and_stop, until

ASSERTED = """\
0.00.005.161 I srv    load_model: loading model 'sh.gguf'
/src/ggml/src/ggml.c:5516: GGML_ASSERT(ggml_can_mul_mat(k, q)) failed
[New LWP 32756]
[Thread debugging using libthread_db enabled]
#43 0x000055fc9bcc9081 in _start ()
[Inferior 1 (process 32755) detached]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that fake engines do not open."""
    path = tmp_path / "yi.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.mark.parametrize(
    ("code", "log", "reason", "hint"),
    [
        pytest.param(
            EXIT_NO_WHEEL,
            "cannot import xllamacpp: libgomp.so.1: cannot open shared object file: No such file or directory\n",
            "the system library libgomp.so.1 is missing",
            "libgomp1",
            id="libgomp",
        ),
        pytest.param(
            EXIT_NO_WHEEL,
            "cannot import xllamacpp: No module named 'xllamacpp'\n",
            "cannot import the embedded engine: cannot import xllamacpp: No module named 'xllamacpp'",
            "install promptai again",
            id="no-wheel",
        ),
        pytest.param(
            1,
            "0.00 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18765\n"
            "0.00 E srv  llama_server: exiting due to HTTP server error\n",
            "port 18765 is taken",
            "--port",
            id="port",
        ),
        pytest.param(
            1,
            "error: invalid argument: --cache-ram\n",
            "this llama-server does not support --cache-ram",
            "newer",
            id="argument",
        ),
        pytest.param(
            -signal.SIGABRT,
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n",
            "not enough memory (std::bad_alloc)",
            "smaller model",
            id="bad-alloc",
        ),
        pytest.param(
            1,
            "E alloc_tensor_range: failed to allocate CPU buffer of size 12306496768\n"
            "E llama_model_load: error loading model: unable to allocate CPU buffer\n",
            "not enough memory (failed to allocate)",
            "smaller model",
            id="buffer",
        ),
        pytest.param(
            1,
            "error loading model: mmap failed: Cannot allocate memory\n",
            "not enough memory (Cannot allocate memory)",
            "smaller model",
            id="mmap",
        ),
        pytest.param(
            1,
            "E llama_model_load: error loading model: tensor 'blk.1.ffn_down.weight' data is not within the file"
            " bounds, model is corrupted or incomplete\nE srv init: exiting due to model loading error\n",
            "the file is cut short or damaged",
            "fetch the file again",
            id="cut",
        ),
        pytest.param(
            1,
            "E gguf_init_from_reader: invalid magic characters: 'XXXX', expected 'GGUF'\n"
            "E llama_model_load: error loading model: llama_model_loader: failed to load model from bad.gguf\n",
            "the file is not a GGUF",
            "fetch the file again",
            id="magic",
        ),
        pytest.param(
            1,
            "E llama_model_load: error loading model: unknown model architecture: 'wooly'\n",
            "this engine does not support the architecture wooly",
            "newer engine",
            id="architecture",
        ),
        pytest.param(
            1,
            "E llama_model_load: error loading model: missing tensor 'output_norm.weight'\nE failed to load model\n",
            "missing tensor 'output_norm.weight'",
            "fetch the file again",
            id="other-loading",
        ),
        pytest.param(-signal.SIGKILL, "I slot: 3 tokens\n", "killed by signal 9 (SIGKILL)", "smaller model", id="oom"),
        pytest.param(
            -signal.SIGSEGV,
            "one\n\n last one \n \n",
            "killed by signal 11 (SIGSEGV); last log line: last one",
            "another engine",
            id="crash",
        ),
        pytest.param(-signal.SIGABRT, ASSERTED, "GGML_ASSERT(ggml_can_mul_mat(k, q)) failed", "another", id="assert"),
        pytest.param(-99, "", "killed by signal 99 (unknown); last log line: none", "another engine", id="odd-signal"),
        pytest.param(-35, "", "killed by signal 35 (", "another engine", id="real-time-signal"),
        pytest.param(3, "boom\n", "exit code 3; last log line: boom", "promptai doctor", id="unknown"),
        pytest.param(0, "", "exit code 0; last log line: none", "promptai doctor", id="wordless"),
    ],
)
def test_explains_each_exit_with_reason_and_hint(code: int, log: str, reason: str, hint: str) -> None:
    """Causes before consequences."""
    why, advice = explain_exit(code, log)

    assert reason in why
    assert hint in advice
    assert "\n" not in why + advice


def test_shortens_the_last_log_line() -> None:
    """A log may contain a whole template in one line."""
    assert len(explain_exit(1, "x" * 100_000)[0]) < 300


def test_reports_a_taken_port_before_starting(model: Path) -> None:
    """Otherwise another program's engine would be measured."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        engine = engine_of(Path("/bin/false"), model, port=port)

        assert port_taken(port)
        with pytest.raises(EngineStartError, match=f"port {port} on 127.0.0.1 is taken"):
            asyncio.run(start_and_stop(engine))

    assert not port_taken(port)
    assert (engine.pid, engine.death()) == (None, None)


def test_free_ports_are_free() -> None:
    """And not always the same one."""
    assert not any(port_taken(free_port()) for _ in range(3))


@pytest.mark.real
def test_explains_a_death_while_loading_by_its_own_log(model: Path, script: Script) -> None:
    """Not by an earlier engine's lines in the same file."""
    engine = engine_of(script("fake", "echo 'some words' >&2", "echo boom", "exit 3"), model)
    engine.log.write_text("E gguf_init_from_reader: invalid magic characters: 'XXXX'\n")

    with pytest.raises(EngineStartError, match=rf"could not load {model.name}: exit code 3; last log line: boom"):
        asyncio.run(start_and_stop(engine))

    assert "invalid magic" in engine.log.read_text()
    assert not alive(engine.pid)


@pytest.mark.real
@pytest.mark.parametrize("mode", [None, 0o644], ids=["absent", "not-executable"])
def test_names_an_engine_that_cannot_run(model: Path, script: Script, mode: int | None) -> None:
    """It existed when it was located, and is gone now."""
    path = model.parent / "gone" if mode is None else script("gone", mode=mode)

    with pytest.raises(EngineStartError, match=f"^the engine could not load yi.gguf: cannot run {path.name}"):
        asyncio.run(start_and_stop(engine_of(path, model)))


def test_reports_a_log_that_cannot_be_written(model: Path) -> None:
    """The run's directory is gone, or the disk is read-only."""
    engine = engine_of(Path("/bin/true"), model)
    engine.log = model.parent / "gone" / "engine.log"

    with pytest.raises(EngineStartError, match=r"cannot start the engine: No such file"):
        asyncio.run(start_and_stop(engine))


@pytest.mark.real
def test_reports_a_model_that_is_gone(model: Path, script: Script) -> None:
    """By name, without a traceback, and with nothing left running."""
    engine = engine_of(script("fake", "exec sleep 60"), model)
    model.unlink()

    with pytest.raises(EngineStartError, match=f"cannot read the model {model.name}"):
        asyncio.run(start_and_stop(engine))

    assert engine.pid is None


@pytest.mark.real
def test_ends_an_engine_that_never_answers(model: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that loading its file should take, with its last log line."""
    monkeypatch.setattr("promptai.engine.launch._START_BASE_S", 0.2)
    engine = engine_of(script("fake", "echo still reading", "exec sleep 60"), model)

    with pytest.raises(EngineStartError, match=r"did not answer within .* last log line: still reading"):
        asyncio.run(start_and_stop(engine))

    assert not alive(engine.pid)


@pytest.mark.real
def test_an_interrupted_start_leaves_nothing_running(model: Path, script: Script) -> None:
    """Ctrl-C while a large model loads."""
    engine = engine_of(script("fake", "exec sleep 60"), model)

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(start_and_stop(engine), 0.2))

    assert engine.pid is not None
    assert not alive(engine.pid)


@pytest.mark.real
def test_kills_an_engine_that_ignores_sigterm(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM first; stopping twice does no harm."""
    monkeypatch.setattr("promptai.engine.launch._STOP_S", 0.2)
    engine = engine_of((sys.executable, "-c", STUBBORN), model)

    asyncio.run(start_and_stop(engine))
    engine.stop()

    assert not alive(engine.pid)
    assert not port_taken(engine.flags.port)


@pytest.mark.real
@pytest.mark.parametrize("cancelled", [False, True], ids=["left-alone", "cancelled"])
@pytest.mark.timed
def test_stopping_an_engine_does_not_block_the_loop(
    model: Path, monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    """Other engines stream on the same loop; the process ends however often the stop is cancelled."""
    monkeypatch.setattr("promptai.engine.launch._STOP_S", 1.2)
    engine = engine_of((sys.executable, "-c", STUBBORN), model)

    async def up() -> bool:
        return port_taken(engine.flags.port)

    async def too_late(*_: object) -> None:
        await until(up)
        raise EngineStartError("the engine did not answer", hint="none")

    monkeypatch.setattr(engine, "_until_ready", too_late)

    async def play() -> float:
        task = asyncio.create_task(start_and_stop(engine))
        gaps, last = [0.0], time.monotonic()
        while not task.done():
            await asyncio.sleep(0.02)
            gaps, last = [*gaps, time.monotonic() - last], time.monotonic()
            if cancelled and await up():
                task.cancel()
        assert not alive(engine.pid)
        assert cancelled if task.cancelled() else isinstance(task.exception(), EngineStartError) and not cancelled
        return max(gaps)

    assert asyncio.run(play()) < 0.9


@pytest.mark.real
def test_a_start_on_a_closed_loop_leaves_nothing_running(
    model: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop was closed first, so nothing can be awaited."""
    engine = engine_of(script("fake", "exec sleep 60"), model)
    monkeypatch.setattr(engine, "_until_ready", lambda *_: asyncio.sleep(60))

    async def play() -> None:
        starting = engine.__aenter__()
        starting.send(None)
        assert alive(engine.pid)
        starting.close()

    asyncio.run(play())

    assert not alive(engine.pid)


@pytest.mark.real
def test_gives_up_a_process_that_cannot_be_killed(
    model: Path, script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel may hold it; here, signals do not reach it."""
    engine = engine_of(script("fake", "exec sleep 60"), model)
    with monkeypatch.context() as patch:
        for limit in ("_STOP_S", "_KILL_S", "_START_BASE_S"):
            patch.setattr(f"promptai.engine.launch.{limit}", 0.2)
        patch.setattr("promptai.engine.launch._signal_group", lambda *_: False)
        with pytest.raises(EngineStartError, match="did not answer"):
            asyncio.run(start_and_stop(engine))

    assert alive(engine.pid)
    assert f"cannot end process {engine.pid} of yi" in caplog.text
    engine.stop()
    assert not alive(engine.pid)


@pytest.mark.real
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda data: data[:-5000], "the file is cut short or damaged", id="cut-in-the-weights"),
        pytest.param(lambda data: data[:500], "", id="cut-in-the-header"),
        pytest.param(lambda data: b"XXXX" + data[4:], "the file is not a GGUF", id="not-a-gguf"),
        pytest.param(
            lambda data: data.replace(b"llama", b"wooly"), "the architecture wooly", id="unknown-architecture"
        ),
    ],
)
def test_explains_a_bad_model_of_the_embedded_engine(
    tmp_path: Path, small_model: Path, embedded: EngineBinary, damage: object, reason: str
) -> None:
    """From the log of a process that has ended."""
    assert callable(damage)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(small_model.read_bytes()))
    engine = engine_of(embedded, path)

    with pytest.raises(EngineStartError) as caught:
        asyncio.run(start_and_stop(engine))

    assert caught.value.message.startswith(f"the engine could not load {path.name}: ")
    assert reason in caught.value.message
    assert "engine" in caught.value.hint or "fetch the file again" in caught.value.hint
    assert not alive(engine.pid)


@pytest.mark.real
def test_explains_sigkill_by_full_memory(tmp_path: Path, small_model: Path, embedded: EngineBinary) -> None:
    """No reason while it runs; then one sentence and a hint."""
    engine = engine_of(embedded, small_model)
    engine.log = tmp_path / "engine.log"

    async def play() -> None:
        async with engine, EngineClient(engine.base_url) as client:
            assert await client.healthy()
            assert engine.death() is None
            assert engine.pid is not None
            # A terminal's Ctrl-C goes to its process group: the engine must not be in ours.
            assert os.getpgid(engine.pid) != os.getpgrp()
            os.kill(engine.pid, signal.SIGKILL)
            await until(died)

    async def died() -> bool:
        return engine.death() is not None

    asyncio.run(play())
    death = engine.death()

    assert death is not None
    assert death.message.startswith("the engine of small died: killed by signal 9")
    assert "smaller model" in death.hint


@pytest.mark.real
def test_start_and_stop_leave_no_process_and_a_free_port(
    tmp_path: Path, small_model: Path, embedded: EngineBinary
) -> None:
    """Twice in a row on the same port; the loading time is known."""
    port = free_port()
    for _ in range(2):
        engine = engine_of(embedded, small_model, port=port)
        engine.log = tmp_path / "engine.log"
        assert engine.load_s is None
        asyncio.run(start_and_stop(engine))

        assert engine.load_s is not None
        assert engine.load_s > 0
        assert engine.pid is not None
        assert not alive(engine.pid)
        assert not port_taken(port)
