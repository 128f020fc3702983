"""Calibrate this machine: run the probes on its engine, solve, and remember.

Two minutes on a PC, some more on a board; the probe files are written to the cache one at a
time and removed again. Every probe runs twice, the second time in reverse order: a machine's
speed drifts by a tenth within minutes (heat, neighbours on the same server), and prices
that rest on one moment are off by as much. A calibration holds for one engine, one processor and one number of
threads, and is looked up by these; nothing is measured behind anybody's back.
"""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from promptai.advisor.calibration import PROBES, SCHEMA, Calibration, Probe, Reading, fit
from promptai.advisor.work import work_of_file
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import free_port
from promptai.engine.locate import EngineBinary
from promptai.engine.probe import probe
from promptai.errors import EngineError
from promptai.models.gguf import read_header
from promptai.models.library import disk_errors, write_json
from promptai.models.synth import write_synthetic
from promptai.wire.malformed import MALFORMED

_CONTEXT = 2560
_PROMPT_TOKENS, _DEEP_TOKENS, _ANSWER_TOKENS, _TRIES = 512, 2304, 24, 3


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
        EngineError: The engine cannot be run, or its memory cannot be read.
    """
    readings = []
    order = (*PROBES, *reversed(PROBES))
    for done, chosen in enumerate(order):
        observe(done, len(order), chosen.name)
        readings.append(await _run(binary, chosen, threads, cache))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return fit(readings, engine=binary.label, cpu=cpu, threads=threads, created=created)


async def _run(binary: EngineBinary, chosen: Probe, threads: int, cache: Path) -> Reading:
    path = cache / "probe.gguf"
    log = cache / "probe.log"
    try:
        write_synthetic(path, chosen.shape, name="probe", quant=chosen.quant)
        flags = EngineFlags(model=str(path), port=free_port(), threads=threads, context=_CONTEXT)
        seen = await probe(
            binary,
            flags,
            log=log,
            prompt_tokens=_PROMPT_TOKENS,
            answer_tokens=_ANSWER_TOKENS,
            tries=_TRIES,
            deep_tokens=_DEEP_TOKENS if chosen.deep else None,
        )
        work = work_of_file(read_header(path))
    finally:
        path.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
    loaded, peak, mapped = seen.loaded.anon_bytes, seen.peak.anon_bytes, seen.loaded.file_bytes
    if loaded is None or peak is None or mapped is None:
        raise EngineError("the kernel does not tell the engine's memory", hint="is /proc restricted here?")
    return Reading(
        work=work,
        decode_s=seen.decode_s,
        depth=_PROMPT_TOKENS,
        prefill_s=seen.prefill_s,
        context=_CONTEXT,
        anon_loaded_bytes=loaded,
        anon_peak_bytes=peak,
        file_mapped_bytes=mapped,
        deep_decode_s=seen.deep_decode_s,
        deep_depth=_DEEP_TOKENS if seen.deep_decode_s is not None else 0,
    )


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
