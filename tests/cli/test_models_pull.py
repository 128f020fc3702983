"""``promptai models pull`` across processes, on a bad connection and on a full disk."""

import contextlib
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from promptai.models.library import Library
from support_cli import PROMPTAI, clean_environment, promptai, wait_for
from support_hub import Faults, Hub, hub_with, unused_url

pytestmark = pytest.mark.real

NAME = "hub:people/tiny-GGUF"
FILE = "tiny-Q4_K_M.gguf"
MODEL, HUB, INTERRUPTED = 3, 7, 130
#: Slow enough to interrupt, fast enough to wait for.
SLOW_BYTES_PER_S = 100_000


@pytest.fixture
def weights(small_model: Path) -> bytes:
    return small_model.read_bytes()


@pytest.fixture
def hub(weights: bytes) -> Iterator[Hub]:
    with hub_with(people__tiny_GGUF={FILE: weights, "tiny-Q8_0.gguf": weights}) as hub:
        yield hub


def pull(hub: Hub, home: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return promptai("models", "pull", *(arguments or (NAME,)), cwd=home, **(hub.environment(home) | environ))


def begin(hub: Hub, home: Path, *, models: Path | None = None) -> "subprocess.Popen[str]":
    """Start a pull in the background."""
    environ = hub.environment(home) | ({"PROMPTAI_MODELS": str(models)} if models else {})
    return subprocess.Popen(
        [*PROMPTAI, "models", "pull", NAME],
        cwd=home,
        env=clean_environment() | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def parts(models: Path) -> list[Path]:
    return [path for path in Library(models).leftovers() if path.stat().st_size > 0]


def names(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").rglob("*") if path.is_file())


def only_error(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """Return the single line of an error."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("promptai: error:")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    return errors[0]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_resumes_a_lost_download_in_the_next_process(tmp_path: Path, hub: Hub, weights: bytes, share: float) -> None:
    """No byte is transferred twice."""
    hub.faults = Faults(cut_at=share, cut_first=99)
    error = only_error(pull(hub, tmp_path, NAME, "--tries", "1"), HUB)
    assert "connection lost" in error
    assert "run the same command again to resume" in error
    hub.seen.clear()
    hub.faults = Faults()

    done = pull(hub, tmp_path, NAME, "--json")

    assert done.returncode == 0, done.stderr
    stored = msgspec.json.decode(done.stdout)
    assert Path(stored["path"]).read_bytes() == weights
    have = int(len(weights) * share)
    assert [(seen.range, seen.bytes) for seen in hub.bodies()] == [(f"bytes={have}-", len(weights) - have)]
    assert names(tmp_path) == [FILE, f"{FILE}.json"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_resumes_an_interrupted_download(tmp_path: Path, hub: Hub, weights: bytes, how: signal.Signals) -> None:
    hub.faults.bytes_per_s = SLOW_BYTES_PER_S
    process = begin(hub, tmp_path)
    wait_for(lambda: bool(parts(tmp_path / "models")), what="the first bytes")
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == INTERRUPTED
        assert f"downloaded; resume with: promptai models pull {NAME}" in stderr
        assert "Traceback" not in stderr
    have = parts(tmp_path / "models")[0].stat().st_size
    hub.seen.clear()
    hub.faults = Faults()

    assert pull(hub, tmp_path).returncode == 0
    assert [(seen.range, seen.bytes) for seen in hub.bodies()] == [(f"bytes={have}-", len(weights) - have)]
    assert (tmp_path / "models" / "people--tiny-GGUF" / FILE).read_bytes() == weights


def test_two_concurrent_pulls_share_one_download(tmp_path: Path, hub: Hub, weights: bytes) -> None:
    hub.faults.bytes_per_s = SLOW_BYTES_PER_S
    first = begin(hub, tmp_path)
    wait_for(lambda: bool(parts(tmp_path / "models")), what="the first bytes")
    second = begin(hub, tmp_path)
    ended = [process.communicate(timeout=60) for process in (first, second)]

    assert (first.returncode, second.returncode) == (0, 0), ended
    assert [seen.bytes for seen in hub.bodies()] == [len(weights)]
    assert "waiting for another process that is downloading the same file" in ended[1][1]
    assert ended[0][0] == ended[1][0]
    assert names(tmp_path) == [FILE, f"{FILE}.json"]


def test_sets_a_file_with_a_wrong_checksum_aside(tmp_path: Path, hub: Hub, weights: bytes) -> None:
    hub.faults.flip_byte = len(weights) // 2

    error = only_error(pull(hub, tmp_path), MODEL)

    assert "expected" in error
    assert names(tmp_path) == [f"{FILE}.wrong-checksum"]


@pytest.mark.parametrize(("token", "status"), [("", 401), ("hf_of_somebody_else", 403)])
def test_a_gated_model_needs_a_licence_and_a_token(tmp_path: Path, hub: Hub, token: str, status: int) -> None:
    hub.repositories["people/tiny-GGUF"].gated = True

    error = only_error(pull(hub, tmp_path, HF_TOKEN=token), HUB)

    assert f"HTTP {status}" in error
    assert "accept the licence" in error
    assert "HF_TOKEN" in error
    assert names(tmp_path) == []


def test_suggests_similar_names_for_a_misspelt_one(tmp_path: Path, hub: Hub) -> None:
    assert "hub:people/tiny-GGUF" in only_error(pull(hub, tmp_path, "hub:people/tiny-GUF"), HUB)


def test_offline_finds_a_stored_model_and_rejects_others_at_once(tmp_path: Path, hub: Hub) -> None:
    assert pull(hub, tmp_path).returncode == 0

    found = pull(hub, tmp_path, HF_HUB_OFFLINE="1")
    missing = pull(hub, tmp_path, f"{NAME}:Q8_0", HF_ENDPOINT=unused_url())

    assert (found.returncode, FILE in found.stdout) == (0, True), found.stderr
    assert "using the stored model" in found.stderr
    assert "no connection" in only_error(missing, HUB)


def test_reports_a_full_disk_and_keeps_the_partial_file(tmp_path: Path, hub: Hub) -> None:
    """The kernel's file size limit simulates a full disk: writes fail in the middle."""
    process = begin(hub, tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    _, stderr = process.communicate(timeout=60)
    done = subprocess.CompletedProcess(process.args, process.returncode, "", stderr)

    assert "pull again to resume" in only_error(done, MODEL)
    assert [path.stat().st_size for path in parts(tmp_path / "models")] == [30_000]


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A real file system of this size, where the tests may mount one."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_handles_a_real_disk_that_is_small_or_fills_up(tmp_path: Path, hub: Hub, weights: bytes) -> None:
    models = tmp_path / "card"
    with small_disk(models, 1 << 20):
        error = only_error(pull(hub, tmp_path, NAME, PROMPTAI_MODELS=str(models)), MODEL)
        assert "too little for" in error
        assert list(models.iterdir()) == []
        assert hub.bodies() == []

        subprocess.run(["mount", "-o", "remount,size=2m", models], check=True)
        hub.faults.bytes_per_s = SLOW_BYTES_PER_S
        process = begin(hub, tmp_path, models=models)
        wait_for(lambda: bool(parts(models)), what="the first bytes")
        with contextlib.suppress(OSError), (models / "photos").open("wb", buffering=0) as photos:
            while True:  # until the disk is full
                photos.write(bytes(4096))
        _, stderr = process.communicate(timeout=60)
        done = subprocess.CompletedProcess(process.args, process.returncode, "", stderr)
        assert "No space left on device" in only_error(done, MODEL)

        (models / "photos").unlink()
        hub.faults = Faults()
        have = parts(models)[0].stat().st_size
        hub.seen.clear()
        assert pull(hub, tmp_path, NAME, PROMPTAI_MODELS=str(models)).returncode == 0
        assert [seen.bytes for seen in hub.bodies()] == [len(weights) - have]


def test_bench_suggests_a_pull_for_a_missing_model(tmp_path: Path, workload: Path) -> None:
    done = promptai("bench", "tinier", "--workload", workload, cwd=tmp_path, PROMPTAI_MODELS=str(tmp_path))

    assert "promptai models pull tinier" in only_error(done, MODEL)
