"""``promptai models quantize`` on the command line."""

import json
import math
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from promptai.bench.agreement import Agreement
from promptai.cli import models_quantize
from promptai.cli.models_quantize import quantize_model
from promptai.errors import EngineProtocolError, LibraryError, ModelError, ModelTooLargeError, SettingsError
from promptai.models.gguf import read_header
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_cli import children_of, promptai, start, wait_for
from support_quantize import write_half

INTERRUPTED = 130


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the developer's engines, library and tools."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTAI_MODELS", str(tmp_path / "library"))


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 16 bits."""
    return write_half(tmp_path_factory.mktemp("half") / "tiny-f16.gguf")


def printed(*arguments: str | Path) -> str:
    """Run the command in this process; returns its output, raises its error."""
    done = CliRunner().invoke(quantize_model, [str(argument) for argument in arguments])
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.stdout


def tool(tmp_path: Path, *lines: str) -> None:
    """A llama-quantize on the PATH, as a shell script."""
    path = tmp_path / "bin" / "llama-quantize"
    path.parent.mkdir()
    path.write_text("\n".join(("#!/bin/sh", 'case "$*" in *--dry-run*) exit 1;; esac', *lines, "")))
    path.chmod(0o755)


@pytest.mark.real
def test_quantises_a_real_model_and_compares_it_with_its_source(half: Path, tmp_path: Path) -> None:
    """With nothing but our own dependencies installed."""
    done = promptai("models", "quantize", half, "--type", "q8_0", "--threads", "1", "--json", cwd=tmp_path)

    facts = json.loads(done.stdout)
    assert facts["path"] == "tiny-q8_0.gguf"
    assert facts["file_bytes"] == (tmp_path / "tiny-q8_0.gguf").stat().st_size < facts["source"]["file_bytes"]
    assert (facts["source"]["name"], facts["source"]["quantization"]) == ("tiny-f16.gguf", "F16")
    assert facts["agreement"]["by"] == "engine"
    assert facts["agreement"]["positions"] > 400
    assert facts["agreement"]["share"] > 0.95
    assert facts["not_checked"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-q8_0.gguf"]


def test_does_not_compare_random_weights(tmp_path: Path) -> None:
    """Agreement would mean nothing; the result is still marked as synthetic."""
    shape = Shape(layers=1, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=512)
    write_synthetic(tmp_path / "random.gguf", shape, name="x", quant="f16")

    text = printed("random.gguf", "-o", "small.gguf")

    assert "not checked: the weights are random" in text
    assert read_header(Path("small.gguf")).synthetic


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("--type", "q4_k_m"), ModelError, "needs llama.cpp's llama-quantize"),
        (("-o", "here.gguf"), SettingsError, "already exists"),
    ],
)
def test_rejects_bad_options_before_writing_anything(
    half: Path, tmp_path: Path, arguments: tuple[str, ...], kind: type[Exception], words: str
) -> None:
    """Existing files are unchanged."""
    (tmp_path / "here.gguf").write_text("precious")

    with pytest.raises(kind, match=words):
        printed(half, *arguments)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("here.gguf", "precious")]


def test_reports_an_unwritable_folder_in_one_line(half: Path) -> None:
    """Without a traceback."""
    with pytest.raises(LibraryError, match=r"/proc/new\.gguf: "):
        printed(half, "-o", "/proc/new.gguf")


def test_a_checkpoint_in_the_current_directory_is_named_after_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dot is not a name; the result is written there."""
    folder = tmp_path / "edge-1b"
    folder.mkdir()
    (folder / "edge-1b-q4_0.gguf").write_text("precious")
    monkeypatch.chdir(folder)

    with pytest.raises(SettingsError, match=r"^edge-1b-q4_0\.gguf already exists"):
        printed(".")


def test_force_replaces_a_result(half: Path, tmp_path: Path) -> None:
    """The default name is the source's without its type, plus the new type."""
    (tmp_path / "tiny-q4_0.gguf").write_text("old")

    text = printed(half, "--force", "--no-check")

    assert read_header(Path("tiny-q4_0.gguf")).quantization == "Q4_0"
    assert "made by promptai" in text
    assert "not checked: --no-check" in text


@pytest.mark.parametrize(
    "error",
    [ModelTooLargeError("needs 30 GiB"), EngineProtocolError("did not report"), OSError(28, "No space left on device")],
    ids=["memory", "engine", "disk"],
)
def test_a_failed_comparison_keeps_the_result(half: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The reason is printed."""

    def fail(*_arguments: object, **_named: object) -> None:
        raise error

    monkeypatch.setattr(models_quantize, "check_fits", fail)

    assert f"not checked: {error}" in printed(half)
    assert read_header(Path("tiny-q4_0.gguf")).quantization == "Q4_0"


def test_warns_about_low_agreement(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file loads and generates like any other."""
    poor = Agreement("engine", 500, 200, 0.4, (0.36, 0.44), 5.0, 50.0, -2.3, (-2.5, -2.1))
    monkeypatch.setattr(models_quantize, "_check", lambda *_: poor)

    text = printed(half)

    assert "200 of 500, 40.0 % (95 %: 36.0–44.0), by engine" in text
    assert "perplexity there: 5.00 → 50.0; log-likelihood -2.300 nats per token (95 %: -2.500 to -2.100)" in text
    assert "warning" in text


def test_prints_no_invented_figures_for_a_broken_model(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its perplexity is infinite, and there is no difference to report."""
    broken = Agreement("engine", 500, 0, 0.0, (0.0, 0.01), 5.0, math.inf, None, None)
    monkeypatch.setattr(models_quantize, "_check", lambda *_: broken)

    assert "perplexity there: 5.00 → inf; log-likelihood not finite\n" in printed(half)


@pytest.mark.real
def test_ctrl_c_stops_the_tool_and_leaves_no_file(half: Path, tmp_path: Path) -> None:
    """Its partial file is deleted."""
    tool(
        tmp_path,
        "for last; do part=$before; before=$kind; kind=$last; done",
        'echo half > "$part"',
        "exec /bin/sleep 99",
    )
    process = start("models", "quantize", half, "--type", "q4_k_m", cwd=tmp_path)
    part = tmp_path / "tiny-q4_k_m.gguf.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, what="the tool writing")
    sleepers = children_of(process.pid, "sleep")

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)

    assert (process.returncode, errors.strip().splitlines()[-1]) == (INTERRUPTED, "promptai: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    assert sleepers
    assert not [pid for pid in sleepers if Path(f"/proc/{pid}").exists()]


@pytest.mark.real
def test_a_failing_tool_s_last_line_is_the_error(half: Path, tmp_path: Path) -> None:
    """One line, exit code 3, no file left."""
    tool(tmp_path, "echo main: out of paper >&2", "exit 7")

    done = promptai("models", "quantize", half, "--type", "q4_k_m", cwd=tmp_path)

    assert done.returncode == ModelError.exit_code
    assert "llama-quantize failed with exit code 7: main: out of paper" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
