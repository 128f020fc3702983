"""Reloading the settings of a running gateway."""

import asyncio
import gc
import io
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from promptai.advisor.profile import ProfileKey, Profiles
from promptai.cli.serve_fleet import Boards
from promptai.cli.serve_models import EngineSetup
from promptai.cli.serve_run import ServePlan, ServeSession, file_identity
from promptai.cli.serve_show import LoadingProgress
from promptai.engine.locate import EngineBinary
from promptai.gateway.auth import Guard
from promptai.gateway.keys import KeyStore
from promptai.gateway.server import GatewayServer
from promptai.settings import EngineSettings, GatewaySettings, Settings

PLAN = ServePlan(settings=Settings(gateway=GatewaySettings(port=0)), boards=Boards((), {}))

SETUP = EngineSetup(
    binary=EngineBinary("PATH", ("llama-server",), "b1", None),
    threads=4,
    engine=EngineSettings(slots=2),
    cache_ram_mib=7,
    calibration=None,
    profiles=Profiles(Path("absent"), ProfileKey(cpu="a", label="b", threads=4), lambda _: None),
)


@pytest.fixture(autouse=True)
def _usual_collector() -> Iterator[None]:
    """Restore the collector, which a gateway freezes and tunes."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def run(
    tmp_path: Path,
    replan: Callable[[EngineSetup | None], ServePlan],
    until: Callable[[], bool],
    *,
    file: Path | None = None,
    seen: tuple[int, ...] | None = None,
    signals: bool = False,
) -> int:
    """Run a gateway until a condition holds; SIGHUP makes it reload, or a changed file does."""
    session = ServeSession(
        PLAN,
        Guard(KeyStore(tmp_path / "keys.json"), open=True, bind="127.0.0.1"),
        file=lambda: file,
        seen=seen,
        replan=replan,
    )
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        if signals:
            os.kill(os.getpid(), signal.SIGHUP)
        for _ in range(150):
            await asyncio.sleep(0.01)
            if until():
                break
        os.kill(os.getpid(), signal.SIGTERM)

    def started(_one: ServeSession, _server: GatewayServer) -> None:
        ending.append(asyncio.get_running_loop().create_task(end()))

    with LoadingProgress(Console(file=io.StringIO())) as loading:
        return asyncio.run(session.run(started, loading))


@pytest.mark.real
def test_an_error_in_a_reload_does_not_end_the_gateway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def replan(_setup: EngineSetup | None) -> ServePlan:
        raise PermissionError(13, "Permission denied", "/secret")

    monitored = logging.getLogger("promptai.serve")
    monitored.addHandler(caplog.handler)
    try:
        code = run(tmp_path, replan, lambda: "not reloaded" in caplog.text, signals=True)
    finally:
        monitored.removeHandler(caplog.handler)

    assert code == 0
    assert "settings not reloaded" in caplog.text
    assert "/secret" in caplog.text


@pytest.mark.real
def test_engine_settings_are_fixed_when_the_first_model_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings read together with the first model apply."""
    sizes = iter([7, 8])

    def replan(_setup: EngineSetup | None) -> ServePlan:
        gateway = GatewaySettings(port=0, cache_ram_mib=next(sizes))
        return ServePlan(settings=Settings(gateway=gateway, engine=EngineSettings(slots=2)), setup=SETUP)

    def reloaded(times: int) -> bool:
        return caplog.text.count("settings reloaded") == times

    again = iter([signal.SIGHUP])

    def until() -> bool:
        if reloaded(1):
            for number in again:
                os.kill(os.getpid(), number)
        return reloaded(2)

    monitored = logging.getLogger("promptai.serve")
    monkeypatch.setattr(monitored, "propagate", False)
    monitored.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "promptai.serve"):
            run(tmp_path, replan, until, signals=True)
    finally:
        monitored.removeHandler(caplog.handler)

    assert [line for line in caplog.messages if "reloaded" in line] == [
        "settings reloaded",
        "settings reloaded; restart to apply gateway.cache_ram_mib",
    ]


@pytest.mark.real
def test_reloads_a_change_between_reading_and_start(tmp_path: Path) -> None:
    file, replanned = tmp_path / "promptai.toml", []
    file.write_text("")
    seen = file_identity(file)
    file.write_text("[gateway]\nqueue = 3\n")

    def replan(_setup: EngineSetup | None) -> ServePlan:
        replanned.append(True)
        return msgspec.structs.replace(PLAN)

    code = run(tmp_path, replan, lambda: bool(replanned), file=file, seen=seen)

    assert (code, replanned) == (0, [True])
