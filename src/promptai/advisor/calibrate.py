"""Calibrate this machine: run the probes on its engine, solve, and remember.

Two minutes on a PC, some more on a board; the probe files are written to the cache one at a
time and removed again. Every probe runs twice, the second time in reverse order: a machine's
speed drifts by a tenth within minutes (heat, neighbours on the same server), and prices
that rest on one moment are off by as much. A calibration holds for one engine, one processor and one number of
threads, and is looked up by these; nothing is measured behind anybody's back.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from promptai.advisor.attention import ATTENTION_PROBES, AttentionProbe, AttentionReading
from promptai.advisor.calibration import PROBES, SCHEMA, Calibration, Probe, Reading, fit_calibration
from promptai.advisor.cost import cost_of_file
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import free_port
from promptai.engine.locate import EngineBinary
from promptai.engine.probe import probe, probe_depths
from promptai.errors import EngineError
from promptai.models.gguf import read_header
from promptai.models.library import disk_errors, write_json
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from promptai.models.tensors import Quant
from promptai.wire.malformed import MALFORMED

_CONTEXT = 2560
_PROMPT_TOKENS, _ANSWER_TOKENS, _TRIES = 512, 24, 3
#: Next to nothing; behind the start and before the end of a step of 256 (``attention.CELLS``), which cost the same
#: where an engine rounds up; and so much that the cache is read from memory, as between the weights of a real model.
_DEPTHS = (8, 264, 488, 1288)
_DEPTH_ANSWER_TOKENS, _DEPTH_TRIES = 12, 4


async def calibrate(
    binary: EngineBinary, *, cpu: str, threads: int, cache: Path, observe: Callable[[int, int, str], None]
) -> Calibration:
    """
    Measure every probe and solve.

    Args:
        cpu: The processor's name, as the calibration will be looked up.
        cache: Where probe files may lie for a moment.
        observe: Told how many probes are done, of how many, and the name of the next before it runs.

    Raises:
        ModelError: A probe file cannot be written.
        EngineError: The engine cannot be run, its memory cannot be read, or the readings make no sense.
    """
    readings, attention_readings = [], []
    there: tuple[Probe | AttentionProbe, ...] = (*PROBES, *ATTENTION_PROBES)
    order = (*there, *reversed(there))
    for done, chosen in enumerate(order):
        observe(done, len(order), chosen.name)
        if isinstance(chosen, Probe):
            readings.append(await _run(binary, chosen, threads, cache))
        else:
            attention_readings.append(await _attend(binary, chosen, threads, cache))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return fit_calibration(
            readings, attention_readings, engine=binary.label, cpu=cpu, threads=threads, created=created
        )
    except ValueError:
        raise EngineError(
            "too much else ran meanwhile: more context did not cost more time",
            hint="calibrate again on a quiet machine",
        ) from None


async def _run(binary: EngineBinary, chosen: Probe, threads: int, cache: Path) -> Reading:
    with _written(cache, chosen.shape, chosen.quant) as (path, log):
        flags = EngineFlags(model=str(path), port=free_port(), threads=threads, context=_CONTEXT)
        seen = await probe(
            binary, flags, log=log, prompt_tokens=_PROMPT_TOKENS, answer_tokens=_ANSWER_TOKENS, tries=_TRIES
        )
        cost = cost_of_file(read_header(path))
    loaded, peak, mapped = seen.loaded.anon_bytes, seen.peak.anon_bytes, seen.loaded.file_bytes
    if loaded is None or peak is None or mapped is None:
        raise EngineError("the kernel does not tell the engine's memory", hint="is /proc restricted here?")
    return Reading(
        cost=cost,
        decode_s=seen.decode_s,
        depth=_PROMPT_TOKENS,
        prefill_s=seen.prefill_s,
        context=_CONTEXT,
        anon_loaded_bytes=loaded,
        anon_peak_bytes=peak,
        file_mapped_bytes=mapped,
    )


async def _attend(binary: EngineBinary, chosen: AttentionProbe, threads: int, cache: Path) -> AttentionReading:
    with _written(cache, chosen.shape, "q4_0") as (path, log):
        flags = EngineFlags(model=str(path), port=free_port(), threads=threads, context=_CONTEXT)
        found = await probe_depths(
            binary, flags, log=log, depths=_DEPTHS, answer_tokens=_DEPTH_ANSWER_TOKENS, tries=_DEPTH_TRIES
        )
        return AttentionReading(cost=cost_of_file(read_header(path)), decode_s=found)


@contextmanager
def _written(cache: Path, shape: Shape, quant: Quant) -> Iterator[tuple[Path, Path]]:
    """A probe's file and where its engine may log, as long as they are needed."""
    path, log = cache / "probe.gguf", cache / "probe.log"
    try:
        yield write_synthetic(path, shape, name="probe", quant=quant), log
    finally:
        path.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def save(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration; raises ``LibraryError`` when the disk refuses."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(_place(folder, calibration.engine, calibration.cpu, calibration.threads), calibration)


def load(folder: Path, *, engine: str, cpu: str, threads: int) -> Calibration | None:
    """The calibration of this engine here; ``None`` when there is none, or one of another version."""
    try:
        found = msgspec.json.decode(_place(folder, engine, cpu, threads).read_bytes(), type=Calibration)
    except MALFORMED:
        return None  # of another version
    except OSError:
        return None
    return found if found.schema == SCHEMA else None


def _place(folder: Path, engine: str, cpu: str, threads: int) -> Path:
    return folder / f"{hashlib.sha256(f'{engine}/{cpu}/{threads}'.encode()).hexdigest()[:16]}.json"
