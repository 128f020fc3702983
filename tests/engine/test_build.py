import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from promptai.engine import source
from promptai.engine.build import build
from promptai.engine.build_recipe import PROGRAMS, BuildRecipe, read_built
from promptai.engine.locate import find_engines
from promptai.errors import EngineError
from support_cli import alive, wait_for
from support_toolchain import NAME, OBJECTS, TOP, Watched, objects, record, write_archive, write_toolchain


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / f"{TOP}.tar.gz")


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment with the stand-in tools first on PATH."""
    found = write_toolchain(tmp_path / "tools")
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "engines"


def start(recipe: BuildRecipe, engines: Path) -> "subprocess.Popen[bytes]":
    """Run a build in another process, which can be killed."""
    code = (
        "import sys, msgspec; from pathlib import Path; from promptai.engine.build import build; "
        "from promptai.engine.build_recipe import BuildRecipe\n"
        "class W:\n  step = lambda *a: None\n  share = step\n  tick = step\n"
        "build(msgspec.json.decode(sys.argv[1], type=BuildRecipe, dec_hook=lambda t, v: t(v)), Path(sys.argv[2]), W())"
    )
    words = msgspec.json.encode(recipe, enc_hook=str).decode()
    return subprocess.Popen([sys.executable, "-c", code, words, str(engines)], stderr=subprocess.DEVNULL)


# --- refusals, before anything starts ---


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_refuses_an_archive_with_another_checksum(archive: Path, engines: Path) -> None:
    """Nothing of it is unpacked."""
    with pytest.raises(EngineError, match=f"has SHA-256 .* instead of {'0' * 64}"):
        build(BuildRecipe(archive=archive, sha256="0" * 64), engines, Watched())

    assert not engines.exists()


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_checks_a_local_archive_of_the_pinned_release(tmp_path: Path, engines: Path) -> None:
    """A file with that name must have the pinned checksum."""
    brought = write_archive(tmp_path / f"llama_cpp_python-{source.PINNED}.tar.gz")

    with pytest.raises(EngineError, match=source.RELEASES[source.PINNED].sha256):
        build(BuildRecipe(archive=brought), engines, Watched())


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_does_not_fetch_a_release_without_a_known_checksum(engines: Path) -> None:
    with pytest.raises(EngineError, match=r"SHA-256 of llama-cpp-python 1\.2\.3 is unknown") as caught:
        build(BuildRecipe(version="1.2.3"), engines, Watched())

    assert "--sha256" in caught.value.hint
    assert not engines.exists()


def test_names_missing_tools_and_how_to_install_them(
    tmp_path: Path, engines: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(EngineError, match="without cmake and a C\\+\\+ compiler and make") as caught:
        build(BuildRecipe(archive=archive), engines, Watched())

    assert "apt-get install cmake g++ make" in caught.value.hint
    assert not engines.exists()


@pytest.mark.real
def test_refuses_an_old_cmake(
    archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_CMAKE", "3.13.4")

    with pytest.raises(EngineError, match=r"cmake 3\.13 is too old; 3\.14 or newer is needed"):
        build(BuildRecipe(archive=archive), engines, Watched())

    assert record(environ) == []


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_leaves_nothing_behind_on_a_full_disk(archive: Path, engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**12, 10**12, 5))

    with pytest.raises(EngineError, match="0 MiB are free"):
        build(BuildRecipe(archive=archive), engines, Watched())

    assert not engines.exists()


# --- a build ---


@pytest.mark.real
def test_a_build_makes_programs_converter_and_description(
    archive: Path, engines: Path, environ: dict[str, str]
) -> None:
    watched = Watched()

    built = build(BuildRecipe(archive=archive, jobs=3), engines, watched)

    folder = engines / NAME
    assert sorted(path.name for path in folder.iterdir()) == ["bin", "build.log", "engine.json", "src"]
    assert sorted(path.name for path in (folder / "bin").iterdir()) == sorted(PROGRAMS)
    assert (folder / "src" / "convert_hf_to_gguf.py").is_file()
    assert (folder / "src" / "conversion" / "__init__.py").is_file()
    assert (folder / "src" / "LICENSE").is_file()
    assert built == read_built(folder)
    assert built.features == ("SSE3", "LLAMAFILE")
    assert (built.version, built.compiler) == ("9.9-dev (build 0, commit 0c1e570)", "GNU 12.2.0 for Linux")
    assert set(built.sha256) == set(PROGRAMS)
    (configured,) = [line for line in record(environ) if line.startswith("configure")]
    assert "-DGGML_NATIVE=ON" in configured
    assert "-DLLAMA_BUILD_COMMIT=0c1e570 " in configured + " "
    assert [step.split()[0] for step in watched.steps] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    engine = find_engines(cache=engines)[0]
    assert (engine.source, engine.name, engine.command[1:]) == ("built", NAME, ("--fit", "off"))


@pytest.mark.real
def test_rebuilds_an_existing_engine_only_with_again(archive: Path, engines: Path, environ: dict[str, str]) -> None:
    first = build(BuildRecipe(archive=archive), engines, Watched())
    second = build(BuildRecipe(archive=archive), engines, Watched())
    count = len(objects(environ))
    build(BuildRecipe(archive=archive, again=True), engines, Watched())

    assert first == second
    assert [count, len(objects(environ))] == [OBJECTS, 2 * OBJECTS]


@pytest.mark.real
def test_keeps_portable_and_native_builds_side_by_side(archive: Path, engines: Path, environ: dict[str, str]) -> None:
    build(BuildRecipe(archive=archive, portable=True, keep=True), engines, Watched())

    assert "-DGGML_NATIVE=OFF" in record(environ)[0]
    assert (engines / NAME.replace("native", "portable") / "build" / "tree").is_dir()


@pytest.mark.real
def test_quotes_a_failing_compiler_and_keeps_the_finished_objects(
    archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call begins with the file that failed."""
    monkeypatch.setenv("STANDIN_FAIL_AT", "5")
    with pytest.raises(EngineError, match=r"the compiler failed: x\.cpp:3:1: error: expected") as caught:
        build(BuildRecipe(archive=archive), engines, Watched())
    assert str(engines / NAME / "build.log") in caught.value.hint
    assert not (engines / NAME / "bin").exists()
    monkeypatch.setenv("STANDIN_FAIL_AT", "")

    build(BuildRecipe(archive=archive), engines, Watched())

    assert objects(environ) == [1, 2, 3, 4, 5, 5, 6, 7, 8]


@pytest.mark.real
@pytest.mark.parametrize(
    ("says", "hint"),
    [
        ("fatal error: error writing to x.o: No space left on device", "free disk space"),
        ("fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
    ],
    ids=["disk", "memory"],
)
def test_recognises_a_full_disk_and_full_memory(
    archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, says: str, hint: str
) -> None:
    del environ
    monkeypatch.setenv("STANDIN_FAIL_AT", "2")
    monkeypatch.setenv("STANDIN_ERROR", says)

    with pytest.raises(EngineError) as caught:
        build(BuildRecipe(archive=archive), engines, Watched())

    assert hint in caught.value.hint


@pytest.mark.real
def test_does_not_install_a_server_that_does_not_start(
    tmp_path: Path, archive: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in write_toolchain(tmp_path / "bad", program="#!/bin/sh\nkill -ILL $$\n").items():
        monkeypatch.setenv(name, value)

    with pytest.raises(EngineError, match="does not start: illegal instruction"):
        build(BuildRecipe(archive=archive), engines, Watched())

    assert not (engines / NAME / "bin").exists()


# --- interruption ---


def stopped_at(
    number: int, archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> "subprocess.Popen[bytes]":
    """Start a build in another process, and wait until it compiles an object that never ends."""
    monkeypatch.setenv("STANDIN_STOP_AT", str(number))
    process = start(BuildRecipe(archive=archive), engines)
    wait_for(Path(environ["STANDIN_RECORD"] + ".stopped").exists, what=f"object {number}")
    monkeypatch.setenv("STANDIN_STOP_AT", "")
    return process


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_resumes_an_interrupted_build(
    archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It is not fetched, unpacked or configured again; of the objects, only the unfinished one is rebuilt.

    After kill -9 half an object may be left, which make would take for a whole one.
    """
    process = stopped_at(5, archive, engines, environ, monkeypatch)
    process.send_signal(number)
    process.wait(20)
    assert not (engines / NAME / "bin").exists()
    if number == signal.SIGINT:
        (engines / NAME / "build" / "tree" / "objects" / "5.o").unlink()  # as make does at Ctrl-C
    watched = Watched()

    build(BuildRecipe(archive=archive), engines, watched)

    assert objects(environ) == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert len([line for line in record(environ) if line.startswith("configure")]) == 1
    assert [step.split()[0] for step in watched.steps if step[0].isdigit()] == ["4/5", "5/5"]
    assert read_built(engines / NAME) is not None


@pytest.mark.real
def test_ctrl_c_ends_the_compilers_too(
    archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = stopped_at(2, archive, engines, environ, monkeypatch)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

    process.send_signal(signal.SIGINT)
    process.wait(20)

    assert children
    assert not any(alive(pid) for pid in children)


@pytest.mark.real
def test_starts_over_with_another_compiler_setting(
    archive: Path, engines: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of two kinds in one program are worse than a build from the beginning."""
    monkeypatch.setenv("STANDIN_FAIL_AT", "4")
    with pytest.raises(EngineError):
        build(BuildRecipe(archive=archive), engines, Watched())
    monkeypatch.setenv("STANDIN_FAIL_AT", "")
    recipe = engines / NAME / "build" / "recipe.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"cpu_features": ["ANOTHER"]}))

    build(BuildRecipe(archive=archive), engines, Watched())

    assert [1, 2, 3, 4, *range(1, OBJECTS + 1)] == objects(environ)


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_refuses_a_second_build_while_one_is_running(archive: Path, engines: Path) -> None:
    engines.mkdir(parents=True)
    with (engines / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()

        with pytest.raises(EngineError, match=f"process {os.getpid()} is already building an engine"):
            build(BuildRecipe(archive=archive), engines, Watched())


@pytest.mark.real
@pytest.mark.usefixtures("environ")
def test_waits_for_compilers_that_outlive_their_build(archive: Path, engines: Path) -> None:
    """They still write into the tree that the next build continues."""
    engines.mkdir(parents=True)
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock = (engines / "build.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(str(gone.pid))
    lock.flush()
    threading.Timer(0.5, lock.close).start()
    watched = Watched()

    build(BuildRecipe(archive=archive), engines, watched)

    assert watched.steps[0].startswith("waiting for the compilers")
