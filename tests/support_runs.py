"""Values for the tests of measuring and reporting: one answer, one board, one run."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from promptai.bench.events import Event, MeasurementCost, Opened
from promptai.bench.manifest import EngineFacts, MachineFacts, Manifest, ModelFacts, TargetFacts, describe_workload
from promptai.bench.plan import Protocol
from promptai.bench.recorder import write_manifest
from promptai.bench.summary import RecordedRun
from promptai.bench.trace import Trace
from promptai.bench.workload import Conversation, Workload
from promptai.device.cpu import CpuFacts
from promptai.device.sample import Sample
from promptai.engine.flags import EngineFlags
from promptai.wire.openai import Message

CPU = CpuFacts(
    model_name="Cortex-A76",
    architecture="aarch64",
    logical_cpus=4,
    physical_cores=4,
    usable_cpus=4,
    usable_cores=4,
    features=("NEON", "DOTPROD"),
    governor="performance",
)
MACHINE = MachineFacts("Raspberry Pi 5 Model B Rev 1.0", CPU, 8 * 1024**3, "Linux 6.6", "3.11.2")
MODEL = ModelFacts("m.gguf", "00ff", 1_000_000_000, "Mini 1B", "llama", 1_700_000_000, "Q4_0", 8192, False)
ENGINE = EngineFacts(
    "PATH", ("llama-server",), "b1 (abc)", CPU.features, (), EngineFlags(model="m.gguf", port=0, threads=4, context=512)
)
FACTS = TargetFacts("m", model=MODEL, engine=ENGINE)

#: 1 s to the first token, then 20 more in 2 s; 100 prompt tokens in 0.5 s; the engine agrees.
_ANSWER = Trace(
    target="m",
    cache="cold",
    repeat=0,
    conversation="a",
    turn=0,
    t_scheduled=0.0,
    t_sent=0.0,
    t_first=1.0,
    t_last=3.0,
    t_end=3.0,
    prompt_tokens=100,
    cached_tokens=0,
    generated_tokens=21,
    chunks=21,
    prompt_n=100,
    prompt_ms=500.0,
    predicted_n=21,
    predicted_ms=2000.0,
    finish_reason="stop",
    text_sha256="5e",
)


_FAILURE = Trace(
    target="m",
    cache="cold",
    repeat=0,
    conversation="a",
    turn=0,
    t_scheduled=0.0,
    t_sent=0.0,
    t_end=1.0,
    error="EngineDied: gone",
)


def make_trace(*, at: float = 0.0, **changes: Any) -> Trace:
    """The trace of an answer that took 3 s, sent at second ``at``, with some fields changed."""
    times = {"t_scheduled": at, "t_sent": at, "t_first": at + 1, "t_last": at + 3, "t_end": at + 3}
    return msgspec.structs.replace(_ANSWER, **(times | changes))


def make_failure(error: str = "EngineDied: gone", *, at: float = 0.0, **changes: Any) -> Trace:
    """The trace of a request that failed after 1 s."""
    times = {"t_scheduled": at, "t_sent": at, "t_end": at + 1}
    return msgspec.structs.replace(_FAILURE, error=error, **(times | changes))


def talk(id_: str, *contents: str) -> Conversation:
    """A conversation in which user and assistant take turns."""
    return Conversation(
        id_, tuple(Message("user" if n % 2 == 0 else "assistant", content) for n, content in enumerate(contents))
    )


def long_talk(id_: str, *, turns: int, chars: int) -> Conversation:
    """A conversation of ``turns`` user turns whose messages are all ``chars`` long."""
    return talk(id_, *("x" * chars for _ in range(2 * turns - 1)))


def make_manifest(
    conversations: Iterable[Conversation], targets: Sequence[TargetFacts] = (FACTS,), **protocol: Any
) -> Manifest:
    """The manifest of a run of all conversations on these targets."""
    everything = list(conversations)
    workload = Workload("talks.jsonl", "talks.jsonl", "all conversations of the file", tuple(everything))
    return Manifest(
        created="2026-11-20T12:00:00+00:00",
        command=("promptai", "bench", "m.gguf"),
        machine=MACHINE,
        workload=describe_workload(workload, everything, "all"),
        protocol=Protocol(**protocol),
        targets=tuple(targets),
    )


#: 100 s of measuring that took 1 s of the client's CPU and 0.5 s of the sampler's.
COST = MeasurementCost(
    t=100.0,
    wall_s=100.0,
    client_cpu_s=1.0,
    client_max_rss_bytes=50_000_000,
    telemetry_cpu_s=0.5,
    telemetry_wall_s=100.0,
    telemetry_max_rss_bytes=18_000_000,
    energy_source="pmic_rails",
)


def make_run(*, conversations: int = 6, turns: int = 5, with_telemetry: bool = True) -> RecordedRun:
    """A complete run of one target, cold and warm, with short warm prefills; telemetry once a second."""
    talks = [long_talk(f"c{n}", turns=turns, chars=200) for n in range(conversations)]
    traces, at = [], 0.0
    for cache in ("cold", "warm"):
        for number, conversation in enumerate(talks):
            for turn in range(turns):
                tokens = 100 * (turn + 1)
                cached = tokens - 100 if cache == "warm" else 0
                traces.append(
                    make_trace(
                        at=at,
                        cache=cache,
                        conversation=conversation.id,
                        turn=turn,
                        prompt_tokens=tokens,
                        cached_tokens=cached,
                        prompt_n=tokens - cached,
                        prompt_ms=5.0 * (tokens - cached) + number,
                    )
                )
                at += 3
    samples = [
        Sample(
            t=float(t),
            cpu_percent=95.0,
            engine_cpu_percent=94.0,
            engine_anon_bytes=200 * 1024**2,
            engine_file_bytes=900 * 1024**2,
            engine_rss_bytes=1100 * 1024**2,
            temperature_c=61.0,
            watts=8.0,
        )
        for t in range(round(at))
    ]
    return RecordedRun(
        "2026-11-20T12-00-00_m_pi5",
        make_manifest(talks),
        traces,
        samples if with_telemetry else [],
        [Opened(0.0, "m", 2.0, 1.0), COST],
    )


def write_lines(path: Path, lines: Iterable[msgspec.Struct]) -> Path:
    """Write a JSON Lines file."""
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return path


def write_run(directory: Path, run: RecordedRun) -> Path:
    """Write the directory of a run."""
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, run.manifest)
    files: dict[str, Iterable[Trace | Sample | Event]] = {"traces": run.traces, "telemetry": run.samples}
    for name, lines in (files | {"events": run.events}).items():
        write_lines(directory / f"{name}.jsonl", lines)
    return directory
