"""Build, list, choose and compare engines as a user does; nothing real is compiled."""

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support_cli import PROMPTAI, clean_environment, promptai, wait_for
from support_fake_engine import write_fake_engine
from support_toolchain import NAME, OBJECTS, TOP, objects, write_archive, write_toolchain

pytestmark = pytest.mark.real

ENGINE, USAGE, INTERRUPTED = 4, 2, 130


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Environment with the stand-in tools and the test's own cache."""
    return write_toolchain(tmp_path / "tools") | {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / f"{TOP}.tar.gz")


def run(tmp_path: Path, environ: dict[str, str], *words: str | Path) -> "subprocess.CompletedProcess[str]":
    return promptai("engine", *words, cwd=tmp_path, **environ)


def listed(tmp_path: Path, environ: dict[str, str]) -> list[str]:
    """Return the names in the order in which the engines are used."""
    return [engine["name"] for engine in json.loads(run(tmp_path, environ, "list", "--json").stdout)]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["build", "--from", "absent.tar.gz"], USAGE, "absent.tar.gz"),
        (["build", "--from", f"{TOP}.tar.gz", "--sha256", "0" * 64], ENGINE, "has SHA-256"),
        (["build", "--release", "0.0.1"], ENGINE, "SHA-256 of llama-cpp-python 0.0.1 is unknown"),
        (["use", "embeded"], ENGINE, "did you mean embedded?"),
    ],
)
@pytest.mark.usefixtures("archive")
def test_reports_bad_input_in_one_line_and_leaves_nothing(
    tmp_path: Path, environ: dict[str, str], words: list[str], code: int, says: str
) -> None:
    done = run(tmp_path, environ, *words)

    assert says in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert (code, done.returncode) == (code, code), done.stderr
    assert not list((tmp_path / "cache").rglob("bin"))


def test_ctrl_c_prints_one_line_and_the_next_call_resumes(
    tmp_path: Path, environ: dict[str, str], archive: Path
) -> None:
    command = [*PROMPTAI, "engine", "build", "--from", str(archive)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=clean_environment() | environ | {"STANDIN_STOP_AT": "4"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(Path(environ["STANDIN_RECORD"] + ".stopped").exists, what="object 4")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    done = run(tmp_path, environ, "build", "--from", archive)

    assert (process.returncode, err.strip()) == (INTERRUPTED, "promptai: interrupted")
    assert "4/5 compile" in out
    assert (done.returncode, objects(environ)[:4]) == (0, [1, 2, 3, 4])
    assert f"{NAME} is built" in done.stdout
    assert "3/5" not in done.stdout


def test_a_built_engine_is_used_until_another_is_chosen(tmp_path: Path, environ: dict[str, str], archive: Path) -> None:
    """It is built once, however often the command runs."""
    built = run(tmp_path, environ, "build", "--from", archive, "--json")
    again = run(tmp_path, environ, "build", "--from", archive)
    chosen = run(tmp_path, environ, "use", "embedded")
    auto = run(tmp_path, environ, "use", "auto")

    assert json.loads(built.stdout)["features"] == ["SSE3", "LLAMAFILE"]
    assert "exists already" in again.stdout
    assert len(objects(environ)) == OBJECTS
    assert "used from now on: embedded" in chosen.stdout
    assert f"used from now on: {NAME}" in auto.stdout


def test_reports_and_skips_a_chosen_engine_that_is_gone(tmp_path: Path, environ: dict[str, str]) -> None:
    engines = tmp_path / "cache" / "promptai" / "engines"
    write_fake_engine(engines / "mine" / "bin" / "llama-server", prefill=1, decode=1)
    run(tmp_path, environ, "use", "mine")
    (engines / "mine" / "bin" / "llama-server").unlink()

    done = run(tmp_path, environ, "list")

    assert "the chosen engine mine no longer exists" in done.stdout
    assert "embedded" in done.stdout


def test_an_engine_that_does_not_start_cannot_be_chosen(tmp_path: Path, environ: dict[str, str]) -> None:
    path = tmp_path / "cache" / "promptai" / "engines" / "broken" / "bin" / "llama-server"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\nkill -ILL $$\n")
    path.chmod(0o755)

    done = run(tmp_path, environ, "use", "broken")

    assert (done.returncode, "illegal instruction" in done.stderr) == (ENGINE, True)
    assert "not used: illegal instruction" in run(tmp_path, environ, "list").stdout


def test_compare_with_one_engine_explains_how_to_build_another(tmp_path: Path, environ: dict[str, str]) -> None:
    done = run(tmp_path, environ, "compare")

    assert done.returncode == 0
    assert "nothing to compare: the only engine is xllamacpp wheel" in done.stdout
    assert "promptai engine build" in done.stdout


def test_the_faster_of_two_engines_is_used_from_then_on(
    tmp_path: Path, environ: dict[str, str], small_model: Path
) -> None:
    """The newer build comes first until they are measured; a wheel that does not start is not measured."""
    engines = tmp_path / "cache" / "promptai" / "engines"
    fast = write_fake_engine(engines / "fast" / "bin" / "llama-server", prefill=4000, decode=400)
    write_fake_engine(engines / "slow" / "bin" / "llama-server", prefill=2000, decode=200)
    os.utime(fast, (1, 1))
    words = ("compare", "--model", small_model, "--prompt-tokens", "32", "--tokens", "8")
    unsure = json.loads(run(tmp_path, environ, *words, "--repeats", "1", "--json").stdout)
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1 is missing')\n")
    environ |= {"PYTHONPATH": str(tmp_path / "shadow")}

    done = run(tmp_path, environ, *words)

    assert [engine["name"] for engine in unsure["comparison"]["engines"]] == ["slow", "fast", "embedded"]
    assert (unsure["kept"], unsure["ratios"]["slow"]["decode_tps"]["ci95"]) == (False, None)
    assert unsure["comparison"]["engines"][0]["rounds"][0] == pytest.approx({"prefill_tps": 2000, "decode_tps": 200})
    assert unsure["comparison"]["engines"][2]["rounds"][0]["decode_tps"] > 0
    assert "used from now on: fast (fastest in the comparison)" in done.stdout, done.stderr
    assert "n = 5 rounds" in done.stdout
    assert "comparing 2 engines, 5 rounds" in done.stdout
    assert "2.00 (2.00 to 2.00)" in done.stdout
    assert listed(tmp_path, environ) == ["fast", "slow", "embedded"]


def test_shows_a_bar_in_a_terminal(tmp_path: Path, environ: dict[str, str], archive: Path) -> None:
    """It is removed at the end."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*PROMPTAI, "engine", "build", "--from", str(archive)],
        cwd=tmp_path,
        env=clean_environment() | environ | {"TERM": "xterm"},
        stdout=child,
        stderr=child,
        stdin=subprocess.DEVNULL,
    )
    os.close(child)
    seen = read_all(lambda: os.read(parent, 65_536))
    process.wait(30)
    os.close(parent)

    assert process.returncode == 0
    assert "4/5 compile" in seen
    assert "is built" in seen


def read_all(read: Callable[[], bytes]) -> str:
    """Everything until the other end is closed, which a terminal reports as an error."""
    data = b""
    while True:
        try:
            piece = read()
        except OSError:
            break
        if not piece:
            break
        data += piece
    return data.decode(errors="replace")
