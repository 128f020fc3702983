"""Write a run as one HTML file that opens anywhere, at any time, without a network.

Reports that load their charts from a CDN go blank (guidellm #303). This file contains everything:
data, styles, and the JavaScript that draws, which a Content Security Policy forbids to fetch
anything. Names of models come from untrusted files, so the template engine escapes every value,
and data inside scripts cannot close the script.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from promptai.bench.manifest import Manifest
from promptai.bench.plan import Protocol
from promptai.bench.recorder import write_whole
from promptai.bench.summary import RecordedRun, Summary
from promptai.errors import RunError
from promptai.report import format as fmt
from promptai.report.figures import Figure, draw, javascript, to_png, to_svg
from promptai.report.rows import ROWS


def write_report(directory: Path, run: RecordedRun, summary: Summary) -> Path:
    """
    Write ``report.html`` into the run's directory.

    Raises:
        RunError: The file cannot be written.
    """
    path = directory / "report.html"
    write_whole(path, render(run, summary, draw(run, summary)).encode())
    return path


def write_figures(directory: Path, run: RecordedRun, summary: Summary) -> list[Path]:
    """Write every figure as SVG and PNG to ``figures/``; raises ``RunError`` if that fails."""
    folder = directory / "figures"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}", hint="check its permissions") from None
    written = []
    for figure in draw(run, summary):
        for suffix, data in ((".svg", to_svg(figure).encode()), (".png", to_png(figure))):
            path = folder / f"{figure.name}{suffix}"
            write_whole(path, data)
            written.append(path)
    return written


def render(run: RecordedRun, summary: Summary, figures: list[Figure]) -> str:
    """Render the page."""
    environment = Environment(
        loader=PackageLoader("promptai.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"metric": fmt.metric, "number": fmt.number, "script_json": _script_json}
    page = environment.get_template("report.html.jinja")
    return page.render(
        run=run,
        summary=summary,
        manifest=run.manifest,
        command=shlex.join(run.manifest.command),
        rows=ROWS,
        figures=figures,
        facts=_facts(run.manifest),
        quantity=fmt.quantity,
        javascript=Markup(javascript().replace("</script", "<\\/script")),  # noqa: S704  our own bundle
    )


def _script_json(value: object) -> Markup:
    """Encode JSON for a script element: without ``<`` it cannot close the element."""
    text = json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(text)  # noqa: S704  escaped on the line above


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Return label and text of every fact about machine, workload, protocol and targets."""
    machine, cpu = manifest.machine, manifest.machine.cpu
    quota = f", CPU quota {cpu.quota_cpus:g}" if cpu.quota_cpus is not None else ""
    found: list[tuple[str, Any]] = [
        ("board", machine.board),
        ("processor", f"{cpu.model_name}, {cpu.architecture}, {cpu.physical_cores} cores{quota}"),
        ("SIMD", " ".join(cpu.features) or "unknown"),
        ("governor", cpu.governor or "unknown (no cpufreq)"),
        ("memory", fmt.quantity(machine.memory_bytes, "bytes")),
        ("kernel", machine.kernel),
        ("workload", f"{manifest.workload.name}: {manifest.workload.selection}; {manifest.workload.rule}"),
        ("workload SHA-256", manifest.workload.sha256),
        ("conversations", ", ".join(manifest.workload.selected)),
        ("protocol", _protocol(manifest)),
    ]
    for target in manifest.targets:
        if target.url is not None:
            found.append((target.name, f"server at {target.url}"))
        if target.model is not None:
            model = target.model
            found.append(
                (
                    target.name,
                    (
                        f"{model.name}: {model.architecture}, {model.parameters:,} parameters, "
                        f"mostly {model.quantization}, {fmt.quantity(model.file_bytes, 'bytes')}"
                        f"{', synthetic weights' if model.synthetic else ''}"
                    ),
                )
            )
            found.append((f"{target.name} SHA-256", model.sha256))
        if target.engine is not None:
            engine, flags = target.engine, target.engine.flags
            found.append(
                (
                    f"{target.name} engine",
                    (
                        f"{engine.source}, build {engine.build or 'unknown'}; {flags.threads} threads, "
                        f"context {flags.context}, slots {flags.slots}, batch {flags.batch}, "
                        f"KV cache {flags.cache_type_k}, prompt cache {flags.cache_ram_mib} MiB, "
                        f"mmap {'on' if flags.mmap else 'off'}"
                    ),
                )
            )
    found.append(("promptai", f"{manifest.promptai}, schema {manifest.schema}"))
    return found


def _protocol(manifest: Manifest) -> str:
    protocol = manifest.protocol
    history = "data set" if protocol.history == "data" else "model itself"
    return (
        f"greedy (temperature 0, top-k 1), seed {protocol.seed}, at most {protocol.max_tokens} tokens, "
        f"{' and '.join(protocol.caches)}, history from the {history}, "
        f"passes: {protocol.repeats}, {_arrivals(protocol)}"
    )


def _arrivals(protocol: Protocol) -> str:
    if protocol.arrivals.rate_per_s is None:
        return f"closed loop, concurrent conversations: {protocol.concurrency}"
    return f"{protocol.arrivals.kind} arrivals at {protocol.arrivals.rate_per_s:g} conversations per second"
