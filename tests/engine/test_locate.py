import importlib.metadata
import os
from pathlib import Path

import pytest

from promptai.device.cpu import read_cpu
from promptai.engine.choice import (
    Comparison,
    MeasuredEngine,
    Round,
    processor_key,
    write_choice,
    write_comparison,
)
from promptai.engine.flags import EngineFlags
from promptai.engine.locate import (
    EngineBinary,
    find_engines,
    fingerprint_of,
    locate,
    missing_features,
    parse_build,
    parse_features,
    wrong_processor,
)
from promptai.errors import EngineNotFoundError, EngineStartError
from support_engine import Script

#: As printed on the machines of llama.cpp's own continuous integration, and by the wheel.
X86_2024 = """\
build: 3906 (7eee341b) with cc (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0 for x86_64-linux-gnu
0.00.029.801 I
0.00.029.875 I system_info: n_threads = 4 (n_threads_batch = 4) / 8 | AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | AVX512 = 1 | \
AVX512_VBMI = 1 | AVX512_VNNI = 1 | AVX512_BF16 = 0 | FMA = 1 | NEON = 0 | SVE = 0 | ARM_FMA = 0 | F16C = 1 | \
FP16_VA = 0 | RISCV_VECT = 0 | WASM_SIMD = 0 | BLAS = 0 | SSE3 = 1 | SSSE3 = 1 | VSX = 0 | MATMUL_INT8 = 0 | \
LLAMAFILE = 1 |
"""
ARM_2025 = """\
build: 4571 (acd38efe) with gcc-12 (Debian 12.2.0-14) 12.2.0 for aarch64-linux-gnu
system_info: n_threads = 4 (n_threads_batch = 4) / 4 | CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1 | DOTPROD = 1 | \
LLAMAFILE = 1 | OPENMP = 1 | AARCH64_REPACK = 1 |
"""
X86_2026 = """\
0.00.008.499 I cmn  common_param: common_params_print_info: build 1 (0c1e570) with GNU 12.2.0 for Linux x86_64
0.00.008.678 I cmn  common_param: system_info: n_threads = 2 (n_threads_batch = 2) / 2 | CPU : SSE3 = 1 | SSSE3 = 1 | \
AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 |
"""
WHEEL = "system_info: CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | REPACK = 1 | \n"
FLAGS = EngineFlags(model="/m/yi.gguf", port=1, threads=1, context=1)
FLAGS_AS_JSON = (
    '{"model":"/m/yi.gguf","port":1,"threads":1,"context":1,"slots":1,"batch":512,"ubatch":512,'
    '"cache_type_k":"f16","cache_type_v":"f16","cache_ram_mib":0,"mmap":true}'
)


def says(build: int) -> str:
    """A script line that prints a build like llama-server, on standard error."""
    return f'echo "build: {build} (abc) with cc for x86_64-linux-gnu" >&2; exit 1'


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with an empty PATH and without the wheel."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("promptai.engine.locate.version", absent)


@pytest.mark.parametrize("log", ["", "llama-server: command not found\n", "system info: AVX = 1\n", "build: unknown\n"])
def test_a_log_without_features_is_unknown(log: str) -> None:
    """Unknown is not the same as no feature."""
    assert parse_features(log) is None
    assert parse_build(log) is None


@pytest.mark.parametrize(
    ("log", "build", "features"),
    [
        pytest.param(
            X86_2024,
            "b3906 (7eee341b)",
            "AVX AVX2 AVX512 AVX512_VBMI AVX512_VNNI FMA F16C SSE3 SSSE3 LLAMAFILE",
            id="x86-2024",
        ),
        pytest.param(
            ARM_2025, "b4571 (acd38efe)", "NEON ARM_FMA FP16_VA DOTPROD LLAMAFILE OPENMP AARCH64_REPACK", id="arm-2025"
        ),
        pytest.param(
            X86_2026, "b1 (0c1e570)", "SSE3 SSSE3 AVX AVX2 F16C FMA BMI2 LLAMAFILE OPENMP REPACK", id="x86-2026"
        ),
        pytest.param(WHEEL, None, "SSE3 SSSE3 AVX AVX2 F16C FMA REPACK", id="wheel"),
        pytest.param("system_info: n_threads = 1 / 1 | AVX = 0 |\n", None, "", id="no-feature"),
    ],
)
def test_reads_logs_of_several_years(log: str, build: str | None, features: str) -> None:
    """A feature marked 0 is absent; a number of threads is not a feature."""
    assert build == parse_build(log)
    assert tuple(features.split()) == parse_features(log)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        pytest.param(None, [], id="features-unknown"),
        pytest.param(("AVX2", "FMA", "F16C", "AVX512", "AVX512_VNNI"), [], id="uses-all"),
        pytest.param(("AVX2", "FMA", "LLAMAFILE"), ["AVX512", "AVX512_VNNI", "F16C"], id="lacks-three"),
    ],
)
def test_lists_only_features_that_change_the_speed(engine: tuple[str, ...] | None, expected: list[str]) -> None:
    """SSE3 and BMI2 do not; without the engine's features nothing is claimed."""
    cpu = ("SSE3", "BMI2", "AVX2", "FMA", "F16C", "AVX512", "AVX512_VNNI")

    assert expected == missing_features(EngineBinary("PATH", ("llama-server",), None, engine), cpu)


@pytest.mark.usefixtures("nothing_installed")
def test_explains_how_to_get_an_engine_when_there_is_none(tmp_path: Path) -> None:
    """Neither named, built, on PATH nor in the wheel."""
    with pytest.raises(EngineNotFoundError, match="no llama-server on this machine") as caught:
        locate(cache=tmp_path / "never-made")

    assert "pip install" in caught.value.hint


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", ["absent", "folder", "plain"])
def test_a_named_engine_that_cannot_run_is_an_error(tmp_path: Path, script: Script, name: str) -> None:
    """Even if others could: measuring another engine than the named one would be wrong."""
    (tmp_path / "folder").mkdir()
    script("plain", says(1), mode=0o644)
    built = script("cache/x/bin/llama-server", says(2))

    with pytest.raises(EngineNotFoundError, match=f"{name} is not an executable file"):
        find_engines(tmp_path / name, cache=built.parents[2])


@pytest.mark.real
def test_the_order_is_named_built_path_embedded(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And locate returns the first."""
    named = script("named/my-server", says(1))
    built = script("cache/llama.cpp-b2/bin/llama-server", says(2))
    on_path = script("path/llama-server", says(3))
    monkeypatch.setenv("PATH", f"{tmp_path / 'no-such-folder'}:{on_path.parent}")

    found = find_engines(named, cache=tmp_path / "cache")

    assert [
        ("settings", str(named), "b1 (abc)"),
        ("built", str(built), "b2 (abc)"),
        ("PATH", str(on_path), "b3 (abc)"),
    ] == [(engine.source, engine.command[0], engine.build) for engine in found[:3]]
    assert ("embedded", importlib.metadata.version("xllamacpp")) == (found[3].source, found[3].build)
    assert found[3].features
    assert [found[3].embedded, found[0].embedded] == [True, False]
    assert found[0] == locate(named)


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_skips_a_built_engine_that_is_not_executable(tmp_path: Path, script: Script) -> None:
    """An interrupted build must not come before a working engine."""
    script("cache/z/bin/llama-server", says(9), mode=0o644)
    whole = script("cache/a/bin/llama-server", says(2))

    assert [(str(whole),)] == [engine.command for engine in find_engines(cache=tmp_path / "cache")]


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_finds_a_named_engine_in_the_current_folder(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not searched for on PATH, and is still found from another folder."""
    named = script("my-server", says(1))
    monkeypatch.chdir(tmp_path)

    engine = locate(Path("./my-server"))

    assert ("b1 (abc)", str(named)) == (engine.build, engine.command[0])


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("lines", [("exit 0",), ("exit 1",), ("echo '\\377\\376'",)], ids=["mute", "fails", "raw"])
def test_uses_an_engine_that_reports_nothing(script: Script, lines: tuple[str, ...]) -> None:
    """Its build and features are unknown, and its label shows that."""
    engine = locate(script("my-server", *lines))

    assert (engine.build, engine.features) == (None, None)
    assert engine.label == "llama-server of unknown build"


#: Ways in which an engine fails to start, and the reported reasons.
DEATHS = [
    pytest.param("kill -ILL $$", "illegal instruction", id="another-processor"),
    pytest.param("kill -SEGV $$", "killed by signal 11", id="crash"),
    pytest.param("echo 'libgomp.so.1: cannot open shared object file' >&2; exit 127", "libgomp.so.1", id="library"),
]


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("line", "words"), DEATHS)
def test_lists_an_engine_that_does_not_start_last(script: Script, line: str, words: str) -> None:
    """With the reason, however new it is."""
    whole = script("cache/old/bin/llama-server", says(2))
    broken = script("cache/new/bin/llama-server", line)
    os.utime(whole, (1, 1))

    first, last = find_engines(cache=broken.parents[2])

    assert [str(whole), None] == [first.command[0], first.trouble]
    assert str(broken) == last.command[0]
    assert words in str(last.trouble)
    assert words in last.label


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("line", "words"), DEATHS)
def test_a_named_engine_that_does_not_start_is_an_error(script: Script, line: str, words: str) -> None:
    """With the library to install when one is missing."""
    named = script("named/llama-server", line)
    built = script("cache/x/bin/llama-server", says(2))

    with pytest.raises(EngineStartError, match=words) as caught:
        locate(named, cache=built.parents[2])

    assert ("libgomp1" in caught.value.hint) == ("libgomp" in words)


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_a_program_of_another_architecture_does_not_start(tmp_path: Path) -> None:
    """For example an x86-64 program on a Pi."""
    path = tmp_path / "cache" / "x" / "bin" / "llama-server"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF" + bytes(100))
    path.chmod(0o755)

    with pytest.raises(EngineStartError, match="cannot be run: Exec format error"):
        locate(cache=tmp_path / "cache")


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_skips_a_build_with_missing_cpu_features(script: Script) -> None:
    """It may start here, and crash in the middle of an answer."""
    line = "system_info: CPU : SSE3 = 1 | AMX_INT8 = 1 | SVE = 1 |"
    foreign = script("cache/foreign/bin/llama-server", f'echo "{line}"; exit 1')
    own = script("cache/own/bin/llama-server", says(2))
    os.utime(own, (1, 1))

    found = find_engines(cache=foreign.parents[2])

    assert [str(own), str(foreign)] == [engine.command[0] for engine in found]
    assert "another processor" in str(found[1].trouble)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (None, None),
        (("SSE3", "BMI2", "LLAMAFILE", "NEON"), None),
        (("NEON", "DOTPROD"), "DOTPROD"),
        (("MATMUL_INT8", "DOTPROD"), "DOTPROD, MATMUL_INT8"),
    ],
)
def test_only_missing_features_make_an_engine_foreign(features: tuple[str, ...] | None, words: str | None) -> None:
    """An engine that reports no features is accepted."""
    found = wrong_processor(EngineBinary("built", ("/x",), None, features), ("NEON", "ARM_FMA"))

    assert (found is None) == (words is None)
    assert (words or "") in (found or "")


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_the_chosen_engine_comes_after_the_named(script: Script) -> None:
    """Until the choice is reset, or the engine no longer starts."""
    old = script("cache/old/bin/llama-server", says(2))
    new = script("cache/new/bin/llama-server", says(3))
    named = script("named/llama-server", says(1))
    os.utime(old, (1, 1))
    cache = old.parents[2]
    write_choice(cache, "old")

    chosen = [engine.command[0] for engine in find_engines(named, cache=cache)]
    old.write_text("#!/bin/sh\nkill -ILL $$\n")
    broken = [engine.command[0] for engine in find_engines(named, cache=cache)]

    assert [str(named), str(old), str(new)] == chosen
    assert [str(named), str(new), str(old)] == broken


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_uses_the_faster_engine_while_both_are_unchanged(script: Script) -> None:
    """A rebuilt engine invalidates the comparison."""
    old = script("cache/old/bin/llama-server", says(2))
    new = script("cache/new/bin/llama-server", says(3))
    os.utime(old, (1, 1))
    cache, cpu = old.parents[2], read_cpu()
    rounds = [Round(10, 10)]
    engines = [MeasuredEngine(e.name, e.label, fingerprint_of(e) or "", rounds) for e in find_engines(cache=cache)]
    comparison = Comparison(
        created="now",
        cpu=processor_key(cpu.model_name, cpu.features),
        threads=1,
        model="m",
        prompt_tokens=1,
        generated_tokens=1,
        engines=engines[::-1],
    )

    before = locate(cache=cache)
    write_comparison(cache, comparison)
    after = locate(cache=cache)
    os.utime(new)

    assert [str(new), str(old), str(new)] == [e.command[0] for e in (before, after, locate(cache=cache))]
    assert after.reason == "fastest in the comparison"


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_a_newer_build_gets_its_own_switches(script: Script) -> None:
    """They are part of its command, so every manifest records them."""
    helps = 'test "$1" = --help && echo "-fit, --fit [on|off]" && exit 0'
    newer = locate(script("newer", helps, says(9)))
    older = locate(script("older", says(1)))

    assert newer.command[1:] == ("--fit", "off")
    assert len(older.command) == 1
    assert newer.arguments(FLAGS) == [*newer.command, *FLAGS.to_argv()]


@pytest.mark.real
@pytest.mark.usefixtures("nothing_installed")
def test_a_probe_loads_no_model_and_fetches_nothing(tmp_path: Path, script: Script) -> None:
    """Probing must work on a board that is offline and busy."""
    locate(script("my-server", f'echo "$@" >> {tmp_path}/argv'))

    first, *others = (tmp_path / "argv").read_text().splitlines()
    argv = first.split()
    assert others == ["--help"]
    assert "--offline" in argv
    assert not Path(argv[argv.index("--model") + 1]).exists()


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        pytest.param(EngineBinary("PATH", ("/x/llama-server",), None, None), FLAGS.to_argv(), id="native"),
        pytest.param(
            EngineBinary("embedded", ("python", "-m", "x"), None, None),
            [FLAGS_AS_JSON],
            id="embedded",
        ),
    ],
)
def test_each_engine_gets_its_flags_in_its_own_format(engine: EngineBinary, expected: list[str]) -> None:
    """A command line for llama-server, one JSON argument for the wheel."""
    assert [*engine.command, *expected] == engine.arguments(FLAGS)
