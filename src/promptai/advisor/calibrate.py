"""Calibrate this machine: run the probe models on its engine, solve for the prices, store them.

Calibration takes two minutes on a PC and longer on a board. Probe files are written to the cache one at a time and
removed again. Every probe runs twice, the second time in reverse order: a machine's speed drifts by a tenth within
minutes (heat, neighbours on the same server), and prices from a single moment would be off by as much. A calibration
is valid for one engine, one processor and one number of threads, and is stored under these. It runs only on request.
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
#: Almost nothing; the start and the end of a step of 256 (``attention.CELLS``), which take equally long if the engine
#: rounds up; and enough that the cache is read from memory, as it is between the weights of a real model.
_DEPTHS = (8, 264, 488, 1288)
_DEPTH_ANSWER_TOKENS, _DEPTH_TRIES = 12, 4


async def calibrate(
    binary: EngineBinary, *, cpu: str, threads: int, cache: Path, observe: Callable[[int, int, str], None]
) -> Calibration:
    """
    Measure every probe and solve for the prices.

    Args:
        cpu: Processor name, part of the key of the calibration.
        cache: Directory for the temporary probe files.
        observe: Called before each probe with the number of finished probes, their total and the name of the next.

    Raises:
        ModelError: A probe file cannot be written.
        EngineError: The engine cannot run, its memory cannot be read, or the readings are inconsistent.
    """
    readings, attention_readings = [], []
    probes: tuple[Probe | AttentionProbe, ...] = (*PROBES, *ATTENTION_PROBES)
    order = (*probes, *reversed(probes))
    for done, probe_model in enumerate(order):
        observe(done, len(order), probe_model.name)
        if isinstance(probe_model, Probe):
            readings.append(await _measure(binary, probe_model, threads, cache))
        else:
            attention_readings.append(await _measure_attention(binary, probe_model, threads, cache))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return fit_calibration(
            readings, attention_readings, engine=binary.label, cpu=cpu, threads=threads, created=created
        )
    except ValueError:
        raise EngineError(
            "calibration failed: more context did not take more time, so other programs disturbed it",
            hint="calibrate again on an idle machine",
        ) from None


async def _measure(binary: EngineBinary, probe_model: Probe, threads: int, cache: Path) -> Reading:
    with _probe_file(cache, probe_model.shape, probe_model.quant) as (path, log):
        flags = EngineFlags(model=str(path), port=free_port(), threads=threads, context=_CONTEXT)
        measured = await probe(
            binary, flags, log=log, prompt_tokens=_PROMPT_TOKENS, answer_tokens=_ANSWER_TOKENS, tries=_TRIES
        )
        cost = cost_of_file(read_header(path))
    loaded, peak, mapped = measured.loaded.anon_bytes, measured.peak.anon_bytes, measured.loaded.file_bytes
    if loaded is None or peak is None or mapped is None:
        raise EngineError("the engine's memory cannot be read from /proc", hint="check whether /proc is restricted")
    return Reading(
        cost=cost,
        decode_s=measured.decode_s,
        depth=_PROMPT_TOKENS,
        prefill_s=measured.prefill_s,
        context=_CONTEXT,
        anon_loaded_bytes=loaded,
        anon_peak_bytes=peak,
        file_mapped_bytes=mapped,
    )


async def _measure_attention(
    binary: EngineBinary, probe_model: AttentionProbe, threads: int, cache: Path
) -> AttentionReading:
    with _probe_file(cache, probe_model.shape, "q4_0") as (path, log):
        flags = EngineFlags(model=str(path), port=free_port(), threads=threads, context=_CONTEXT)
        measured = await probe_depths(
            binary, flags, log=log, depths=_DEPTHS, answer_tokens=_DEPTH_ANSWER_TOKENS, tries=_DEPTH_TRIES
        )
        return AttentionReading(cost=cost_of_file(read_header(path)), decode_s=measured)


@contextmanager
def _probe_file(cache: Path, shape: Shape, quant: Quant) -> Iterator[tuple[Path, Path]]:
    """Write a probe model; yield its path and that of the engine's log, and remove both afterwards."""
    path, log = cache / "probe.gguf", cache / "probe.log"
    try:
        yield write_synthetic(path, shape, name="probe", quant=quant), log
    finally:
        path.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def save(folder: Path, calibration: Calibration) -> None:
    """Store a calibration; raises ``LibraryError`` if it cannot be written."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(_path(folder, calibration.engine, calibration.cpu, calibration.threads), calibration)


def load(folder: Path, *, engine: str, cpu: str, threads: int) -> Calibration | None:
    """Load the calibration for this key; ``None`` if it is missing, damaged or of another version."""
    try:
        measured = msgspec.json.decode(_path(folder, engine, cpu, threads).read_bytes(), type=Calibration)
    except MALFORMED:
        return None  # of another version
    except OSError:
        return None
    return measured if measured.schema == SCHEMA else None


def _path(folder: Path, engine: str, cpu: str, threads: int) -> Path:
    return folder / f"{hashlib.sha256(f'{engine}/{cpu}/{threads}'.encode()).hexdigest()[:16]}.json"
