"""Build llama-server and its companions for exactly this processor.

A wheel for every CPU omits the instructions that make a board usable, and a build by hand is six commands that fail in
six ways. ``build`` fetches the pinned source, unpacks, configures, compiles and installs. That takes a quarter of an
hour on a board, so an interruption (Ctrl-C, ``kill -9``, a power cut, a full disk) costs only the files being compiled:
each finished step leaves a stamp, and the next call resumes after the last one.

    engines/NAME/bin/         llama-server, llama-bench, llama-quantize, llama-perplexity;
                              appears whole or not at all
    engines/NAME/src/         the converter and the licences
    engines/NAME/engine.json  sources, flags and processor (``BuiltEngine``)
    engines/NAME/build.log    the output of pip, cmake and the compiler
    engines/NAME/build/       exists only until the build is finished

One build runs at a time. Nothing is installed outside of the folder, and nothing runs as root.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from promptai.device.cpu import CpuFacts, read_cpu
from promptai.engine import source
from promptai.engine.build_recipe import PROGRAMS, BuildRecipe, BuiltEngine, read_built
from promptai.engine.command_log import failure_lines, run_logged
from promptai.engine.locate import EngineBinary, output_of, probe
from promptai.engine.toolchain import CompileProgress, check_disk, check_tools, ninja_or_make
from promptai.errors import EngineError

#: Peak size of source, objects and installed programs, after the archive has been deleted.
_COMPILE_BYTES = 300_000_000
# ext4 may write data out 30 s later: after a power cut the newest object files may be empty.
_UNTRUSTED_S = 60.0
_WAIT_FOR_COMPILERS_S = 600.0
_RESUME = "run the same command again: it resumes where it stopped"
_FLAGS = (
    *("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "GGML_CCACHE=OFF"),
    *("LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF"),
    # The web page would be fetched while building; the server listens on loopback, without TLS and downloads.
    *("LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF"),
)


class BuildProgress(Protocol):
    """Receives the progress of a build."""

    def step(self, text: str) -> None:
        """Begin the next step."""

    def share(self, share: float, detail: str) -> None:
        """Report the finished share of the step, 0 to 1."""

    def tick(self) -> None:
        """Report that time has passed; called about twice a second."""


class _ObjectKey(msgspec.Struct, frozen=True):
    """Everything that the object files depend on; they are discarded when it changes."""

    sha256: str
    arguments: tuple[str, ...]
    machine: str
    cpu_features: tuple[str, ...]


def build(recipe: BuildRecipe, engines: Path, watch: BuildProgress) -> BuiltEngine:
    """
    Build an engine below ``engines``, or resume a build that was interrupted.

    Raises:
        EngineError: A tool, disk space or the source is missing, or the compiler failed.
    """
    folder = engines / recipe.name
    whole = read_built(folder)
    if whole is not None and not recipe.again:
        return whole
    check_tools()
    if recipe.archive is None and recipe.expected_sha256 is None:
        raise EngineError(
            f"the SHA-256 of llama-cpp-python {recipe.version} is unknown",
            hint=f"give it with --sha256, or build {source.PINNED}, which is pinned",
        )
    sha256 = recipe.expected_sha256
    if recipe.archive is not None:
        sha256 = source.verify(recipe.archive, sha256)
    if not (folder / "build" / "stamps" / "fetched").exists():
        check_disk(engines, max(source.FETCH_BYTES if recipe.archive is None else 0, _COMPILE_BYTES))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(engines, watch) as lock:
            return _Site(recipe, folder, watch, lock).build(sha256 or "")
    except OSError as error:
        reason = error.strerror or str(error)
        raise EngineError(
            f"cannot build the engine {recipe.name}: {error.filename or folder}: {reason}",
            hint=f"fix that, then {_RESUME}",
        ) from None


class _Site:
    """One build in its folders."""

    def __init__(self, recipe: BuildRecipe, folder: Path, watch: BuildProgress, lock: int) -> None:
        self.recipe = recipe
        self.folder = folder
        self.watch = watch
        self.lock = lock
        self.site = folder / "build"
        self.source = self.site / "source"
        self.tree = self.site / "tree"
        self.log = folder / "build.log"
        self.cpu: CpuFacts = read_cpu()
        self.arguments = (
            *ninja_or_make(),
            *(f"-D{flag}" for flag in _FLAGS),
            f"-DGGML_NATIVE={'OFF' if recipe.portable else 'ON'}",
        )

    def build(self, sha256: str) -> BuiltEngine:
        """Run the steps that have no stamp yet."""
        self._begin(_ObjectKey(sha256, self.arguments, platform.machine(), self.cpu.features))
        archive = self.recipe.archive or self.site / f"llama_cpp_python-{self.recipe.version}.tar.gz"
        take = "fetch the source" if self.recipe.archive is None else f"use {self.recipe.archive.name}"
        self._step("fetched", f"1/5 {take}", self._fetch)
        self._step("unpacked", "2/5 unpack", functools.partial(self._unpack, archive))
        self._step("configured", "3/5 configure", self._configure)
        self._step("built", f"4/5 compile ({self.recipe.jobs} in parallel)", self._compile)
        self.watch.step("5/5 install")
        built = self._install(sha256)
        if self.recipe.keep:
            self._stamp("installed").touch()
        else:
            shutil.rmtree(self.site)
        return built

    def _begin(self, key: _ObjectKey) -> None:
        """Discard the remains of a build with another key, or of one that was finished and kept."""
        written = self.site / "recipe.json"
        data = msgspec.json.encode(key)
        if self._stamp("installed").exists() or not written.exists() or written.read_bytes() != data:
            shutil.rmtree(self.site, ignore_errors=True)
            (self.site / "stamps").mkdir(parents=True)
            written.write_bytes(data)

    def _stamp(self, name: str) -> Path:
        return self.site / "stamps" / name

    def _step(self, name: str, text: str, act: Callable[[], str]) -> None:
        """Run a step that has no stamp; the stamp stores the step's result."""
        stamp = self._stamp(name)
        if stamp.exists():
            return
        self.watch.step(text)
        done = act()
        part = stamp.with_suffix(".part")
        part.write_text(done)
        part.replace(stamp)

    def _fetch(self) -> str:
        if self.recipe.archive is None:
            sha256 = self.recipe.expected_sha256 or ""
            source.fetch(
                self.recipe.version, sha256, self.site, log=self.log, share=self._share, keep_open=(self.lock,)
            )
        return ""

    def _unpack(self, archive: Path) -> str:
        commit = source.unpack(archive, self.source, self._share)
        if self.recipe.archive is None:
            archive.unlink()
        return commit or ""

    def _commit(self) -> str | None:
        return self._stamp("unpacked").read_text() or None

    def _configure(self) -> str:
        # Without these llama.cpp runs git, and gets the commit of any repository that contains the cache.
        commit = (self._commit() or "unknown")[:7]
        facts = ("-DLLAMA_BUILD_NUMBER=0", f"-DLLAMA_BUILD_COMMIT={commit}")
        self._run("cmake", "-S", str(self.source), "-B", str(self.tree), *self.arguments, *facts)
        return ""

    def _compile(self) -> str:
        working = self.site / "compiling"
        if working.exists():
            _distrust_youngest(self.tree)
        working.touch()
        progress = CompileProgress(PROGRAMS)
        try:
            self._run(
                *("cmake", "--build", str(self.tree), "--parallel", str(self.recipe.jobs), "--target", *PROGRAMS),
                seen=lambda line: self._share(progress.see(line), ""),
            )
        finally:  # after kill -9 or a power cut the marker stays
            working.unlink()
        return ""

    def _run(self, *command: str, seen: Callable[[str], None] = lambda _: None) -> None:
        before = self.log.stat().st_size if self.log.exists() else 0
        code = run_logged(
            command,
            log=self.log,
            seen=seen,
            tick=self.watch.tick,
            environ={"MAKEFLAGS": ""},  # those of an outer make would reach the inner one
            keep_open=(self.lock,),
        )
        if code != 0:
            with self.log.open("rb") as log:
                log.seek(before)
                raise _failed(log.read().decode("utf-8", "replace"), self.log, compiling="--build" in command)

    def _install(self, archive_sha256: str) -> BuiltEngine:
        part, final = self.folder / "bin.part", self.folder / "bin"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for program in PROGRAMS:
            shutil.copy2(self.tree / "bin" / program, part / program)
        tried = probe("built", part / "llama-server")
        if tried.trouble is not None:
            raise EngineError(f"the new llama-server does not start: {tried.trouble}", hint=f"see {self.log}")
        built = self._describe(tried, part, archive_sha256)
        source.keep_converter(self.source, self.folder / "src")
        described = self.folder / "engine.json.part"
        described.write_bytes(msgspec.json.format(msgspec.json.encode(built), indent=2) + b"\n")
        os.sync()  # names and contents of every file, before the engine counts as built
        described.replace(self.folder / "engine.json")
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)
        return built

    def _describe(self, tried: EngineBinary, programs: Path, archive_sha256: str) -> BuiltEngine:
        report = output_of([str(programs / "llama-server"), "--version"]).text
        version, compiler = (
            re.search(r"^version: (.+)$", report, re.MULTILINE),
            re.search(r"^built with (.+)$", report, re.MULTILINE),
        )
        return BuiltEngine(
            name=self.recipe.name,
            release=self.recipe.release,
            archive_sha256=archive_sha256,
            commit=self._commit(),
            version=version[1] if version else None,
            compiler=compiler[1] if compiler else None,
            flags=self.arguments,
            features=tried.features,
            cpu=self.cpu.model_name,
            cpu_features=self.cpu.features,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            sha256={program: _sha256(programs / program) for program in PROGRAMS},
        )

    def _share(self, share: float, detail: str) -> None:
        self.watch.share(share, detail)


@contextlib.contextmanager
def _locked(engines: Path, watch: BuildProgress) -> Iterator[int]:
    """Hold the lock of all builds; the compilers inherit it, so it stays held while any of them runs."""
    with (engines / "build.lock").open("a+") as file:
        deadline = time.monotonic() + _WAIT_FOR_COMPILERS_S
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
            if (owner.isdigit() and Path("/proc", owner).exists()) or time.monotonic() > deadline:
                raise EngineError(f"process {owner} is already building an engine", hint="wait for it, or end it")
            if not waiting:
                watch.step("waiting for the compilers of an interrupted build")
                waiting = True
            watch.tick()
            time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _distrust_youngest(tree: Path) -> None:
    """Remove files that were being written when the machine stopped, or may not have reached the disk."""
    products = [path for path in tree.rglob("*") if path.suffix in (".o", ".a") or path.parent.name == "bin"]
    times = {path: path.stat().st_mtime for path in products if path.is_file()}
    newest = max(times.values(), default=0.0)
    for path, written in times.items():
        if written > newest - _UNTRUSTED_S:
            path.unlink()


def _failed(log: str, path: Path, *, compiling: bool) -> EngineError:
    lines = failure_lines(log)
    reason = " | ".join(lines) or "no output"
    hint = f"see {path}; fix the cause, then {_RESUME}"
    if "No space left on device" in reason:
        hint = f"free disk space, then {_RESUME}"
    elif re.search(r"\bKilled\b", reason):
        hint = f"memory was full: close other programs or add --jobs 1, then {_RESUME}"
    return EngineError(f"{'the compiler' if compiling else 'cmake'} failed: {reason}", hint=hint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
