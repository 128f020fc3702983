import errno
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import msgspec
import pytest

from promptai.bench.events import Event, Opened
from promptai.bench.recorder import (
    Answer,
    Recorder,
    create_run,
    read_events,
    read_manifest,
    read_traces,
    write_manifest,
    write_whole,
)
from promptai.bench.trace import Trace
from promptai.device.sample import Sample
from promptai.errors import RunError
from support_runs import COST, make_failure, make_manifest, make_trace, talk, write_lines

MANIFEST = make_manifest([talk("a", "why?", "because.", "really?")])
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
FIRST, SECOND = make_trace(turn=0), make_trace(turn=1, at=3.0)


@contextmanager
def disk_full_after(path: Path, room: int) -> Iterator[None]:
    """No file may grow beyond ``room`` bytes more than ``path`` has: the kernel cuts the write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every fsync fail with this error number: the disk accepts the bytes but cannot keep them."""

    def fail(number: int) -> None:
        def fsync(_fd: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    return fail


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    """A recorder that has written one request to disk."""
    with Recorder(tmp_path) as recorder:
        recorder.append(FIRST, "one")
        yield recorder


@pytest.fixture
def under_a_file(tmp_path: Path) -> Path:
    """A path that even root cannot write: its parent is not a directory."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "runs"


def test_a_full_disk_leaves_no_partial_line(recorder: Recorder, tmp_path: Path) -> None:
    """The limit is reached within the trace, after its answer has been written."""
    before = (tmp_path / "traces.jsonl").read_bytes()

    with disk_full_after(tmp_path / "traces.jsonl", room=100), pytest.raises(RunError, match="no space left") as error:
        recorder.append(SECOND, "two")

    assert before == (tmp_path / "traces.jsonl").read_bytes()
    assert "--resume" in error.value.hint
    assert {FIRST.key} == recorder.answered()


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "Input/output error")],
    ids=["full", "over-quota", "failing"],
)
def test_removes_a_line_that_cannot_be_synced(
    recorder: Recorder, tmp_path: Path, fail_fsync: Callable[[int], None], number: int, message: str
) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fail_fsync(number)

    with pytest.raises(RunError, match=message):
        recorder.append(SECOND, "two")
    with pytest.raises(RunError, match=message):
        recorder.note(COST)

    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_recording_continues_once_space_is_free(recorder: Recorder, tmp_path: Path) -> None:
    with disk_full_after(tmp_path / "traces.jsonl", room=100), pytest.raises(RunError):
        recorder.append(SECOND, "two")
    recorder.append(SECOND, "two")

    assert read_traces(tmp_path) == [FIRST, SECOND]


def test_rejects_a_second_writer(recorder: Recorder) -> None:
    with pytest.raises(RunError, match="another process is writing run"), Recorder(recorder.directory):
        pass


def test_a_rejected_second_writer_changes_nothing(recorder: Recorder, tmp_path: Path) -> None:
    """The apparently truncated line belongs to the first writer, which is still writing it."""
    path = tmp_path / "traces.jsonl"
    path.write_bytes(path.read_bytes() + b'{"target":')
    before = path.read_bytes()

    with pytest.raises(RunError), Recorder(recorder.directory):
        pass

    assert before == path.read_bytes()


def test_the_next_writer_reads_the_existing_entries(tmp_path: Path) -> None:
    """A recorder created while another is writing reads the files again once it has the lock."""
    with Recorder(tmp_path) as one:
        two = Recorder(tmp_path)
        one.append(FIRST, "one")

    with two:
        assert {FIRST.key} == two.answered()


def test_rejects_an_unwritable_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write to") as error, Recorder(tmp_path / "absent"):
        pass

    assert "permissions" in error.value.hint


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"{\n", id="not-json"),
        pytest.param(b"\n", id="blank"),
        pytest.param(b"\0\0\0\n", id="nuls"),
        pytest.param(b'{"target":"m"}\n', id="fields-missing"),
        pytest.param(msgspec.json.encode(SECOND).replace(b'"stop"', b"7") + b"\n", id="wrong-type"),
        pytest.param(msgspec.json.encode(SECOND).replace(b'"stop"', b'"\xff"') + b"\n", id="not-utf-8"),
    ],
)
def test_rejects_a_damaged_line_with_its_number(tmp_path: Path, damage: bytes) -> None:
    """Reading half a run silently is worse than failing."""
    whole = msgspec.json.encode(FIRST) + b"\n"
    (tmp_path / "traces.jsonl").write_bytes(whole + damage + whole)

    with pytest.raises(RunError, match=r"traces\.jsonl, line 2 is damaged"):
        read_traces(tmp_path)


def test_rejects_an_unreadable_trace_file(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").mkdir()

    with pytest.raises(RunError, match=r"cannot read .*traces\.jsonl"):
        read_traces(tmp_path)


@pytest.mark.parametrize("tail", [b'{"target":"m","ca', b"\0\0\0\0"], ids=["half-a-line", "nuls"])
def test_drops_a_truncated_last_line(tmp_path: Path, tail: bytes) -> None:
    path = write_lines(tmp_path / "traces.jsonl", [FIRST])
    path.write_bytes(path.read_bytes() + tail)

    assert read_traces(tmp_path) == [FIRST]
    with Recorder(tmp_path) as recorder:
        recorder.append(SECOND, "two")
    assert read_traces(tmp_path) == [FIRST, SECOND]


def test_each_request_is_on_disk_before_the_next_begins(recorder: Recorder, tmp_path: Path) -> None:
    """Read while the recorder is open, as after SIGKILL."""
    assert read_traces(tmp_path) == [FIRST]
    recorder.append(SECOND, "two")
    assert read_traces(tmp_path) == [FIRST, SECOND]


def test_concurrent_conversations_are_recorded_in_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner appends from several threads. Removing a partial line must not remove another thread's."""
    busy, overlaps, real = Lock(), [], os.fsync

    def fsync(fd: int) -> None:
        alone = busy.acquire(blocking=False)
        overlaps.append(not alone)
        real(fd)
        if alone:
            busy.release()

    monkeypatch.setattr(os, "fsync", fsync)
    traces = [make_trace(conversation=f"c{n}", at=float(n)) for n in range(40)]
    with Recorder(tmp_path) as recorder, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda trace: recorder.append(trace, trace.conversation), traces))

    assert not any(overlaps)
    assert traces == sorted(read_traces(tmp_path), key=lambda trace: trace.t_sent)


def test_stores_answers_separately_and_only_for_successful_requests(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.append(FIRST, "ein Wörtchen")
        recorder.append(make_failure(turn=1), "half a")

    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines()
    assert [Answer(FIRST.key, "ein Wörtchen")] == [msgspec.json.decode(line, type=Answer) for line in lines]
    assert "Wörtchen" not in (tmp_path / "traces.jsonl").read_text()
    with Recorder(tmp_path) as resumed:
        assert {FIRST.key: "ein Wörtchen"} == resumed.answers


def test_a_resumed_run_knows_answered_and_hopeless_requests_and_its_last_time(tmp_path: Path) -> None:
    long, lost = make_failure("ContextExceeded: 900 > 512", turn=1, at=10), make_failure(turn=2, at=20)
    with Recorder(tmp_path) as recorder:
        for trace in (FIRST, long, lost):
            recorder.append(trace, "")

    with Recorder(tmp_path) as resumed:
        assert {FIRST.key} == resumed.answered()
        assert {long.key} == resumed.hopeless()
        assert resumed.last_t() == 21.0


@pytest.mark.parametrize("trace", [[FIRST], []], ids=["one-answered", "none-answered"])
def test_the_clock_of_a_run_includes_every_entry(tmp_path: Path, trace: list[Trace]) -> None:
    """A session killed during a long request leaves telemetry and events later than its traces."""
    write_lines(tmp_path / "traces.jsonl", trace)
    samples = write_lines(tmp_path / "telemetry.jsonl", [Sample(t=4.0), Sample(t=310.0)])
    samples.write_bytes(samples.read_bytes() + b'{"t":311.0,"cpu')
    with Recorder(tmp_path) as resumed:
        assert resumed.last_t() == 310.0
        resumed.note(Opened(312.0, "m", None, 1.5))
        assert resumed.last_t() == 312.0


def test_a_new_run_is_empty(tmp_path: Path) -> None:
    with Recorder(tmp_path) as new:
        assert (new.answered(), new.hopeless(), new.last_t()) == (set(), set(), 0.0)


def test_events_read_back_unchanged(tmp_path: Path) -> None:
    events: list[Event] = [Opened(0.5, "m", None, 1.5), COST]
    with Recorder(tmp_path) as recorder:
        for event in events:
            recorder.note(event)

    assert events == read_events(tmp_path)


def test_rejects_a_run_directory_below_a_file(under_a_file: Path) -> None:
    with pytest.raises(RunError, match="cannot write to") as error:
        create_run(under_a_file, MANIFEST, label="m", now=NOON)

    assert "--runs" in error.value.hint


def test_a_failed_manifest_leaves_no_directory(tmp_path: Path, fail_fsync: Callable[[int], None]) -> None:
    fail_fsync(errno.ENOSPC)

    with pytest.raises(RunError, match="no space left"):
        create_run(tmp_path, MANIFEST, label="m", now=NOON)

    assert list(tmp_path.iterdir()) == []


def test_rejects_the_hundredth_run_of_a_second(tmp_path: Path) -> None:
    for number in range(1, 100):
        (tmp_path / f"2026-11-20T12-00-00_m{f'.{number}' if number > 1 else ''}").mkdir()

    with pytest.raises(RunError, match="a hundred runs from this second"):
        create_run(tmp_path, MANIFEST, label="m", now=NOON)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        pytest.param("yi-coder-1.5b_pi5", "yi-coder-1.5b_pi5", id="as-it-is"),
        pytest.param("Yi Coder (1.5B)", "yi-coder-1.5b", id="spaces-and-brackets"),
        pytest.param("../../etc/passwd", "..-..-etc-passwd", id="path"),
        pytest.param("模型", "run", id="nothing-usable"),
        pytest.param("x" * 300, "x" * 80, id="too-long"),
    ],
)
def test_names_a_run_by_second_and_label(tmp_path: Path, label: str, name: str) -> None:
    directory = create_run(tmp_path / "runs", MANIFEST, label=label, now=NOON)

    assert tmp_path / "runs" / f"2026-11-20T12-00-00_{name}" == directory
    assert read_manifest(directory) == MANIFEST
    assert [path.name for path in directory.iterdir()] == ["manifest.json"]


def test_numbers_a_second_run_of_the_same_second(tmp_path: Path) -> None:
    runs = [create_run(tmp_path, MANIFEST, label="m", now=NOON) for _ in range(3)]

    stem = "2026-11-20T12-00-00_m"
    assert [stem, f"{stem}.2", f"{stem}.3"] == [run.name for run in runs]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "is not a run", id="absent"),
        pytest.param(b"{", "is damaged", id="not-json"),
        pytest.param(b"{}", "is damaged or from another version", id="fields-missing"),
        pytest.param(msgspec.json.encode(MANIFEST).replace(b"Cortex", b"\xff"), "is damaged", id="not-utf-8"),
    ],
)
def test_rejects_an_unusable_manifest(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)

    with pytest.raises(RunError, match=reason):
        read_manifest(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, fail_fsync: Callable[[int], None]) -> None:
    write_manifest(tmp_path, MANIFEST)
    fail_fsync(errno.ENOSPC)

    with pytest.raises(RunError, match="no space left") as error:
        write_whole(tmp_path / "manifest.json", b"{}")

    assert "--resume" not in error.value.hint  # writing a report does not resume a run
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_rejects_a_file_in_an_impossible_place(under_a_file: Path) -> None:
    """On a disk that the kernel has made read-only, the partial file cannot be removed either."""
    with pytest.raises(RunError, match="cannot write to") as error:
        write_whole(under_a_file, b"{}")

    assert "--runs" not in error.value.hint


def test_a_trace_reads_back_with_every_field(tmp_path: Path) -> None:
    trace = make_trace(t_first_reasoning=0.25)
    assert [name for name in Trace.__struct_fields__ if getattr(trace, name) is None and name != "error"] == []

    with Recorder(tmp_path) as recorder:
        recorder.append(trace, "")

    assert [trace] == read_traces(tmp_path)
