"""Check that ``models.tensors`` assigns the same quantisation to each tensor as llama.cpp's own quantiser.

Run with ``python benchmarks/quantisation_mix.py``; one minute.

For every architecture and quantisation, a small F16 model with random weights goes through the real
``llama-quantize`` (built with ``promptai engine build``, or on PATH), and the type of every tensor is compared with
the plan of ``models.tensors``.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from promptai.models.gguf import read_header
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from promptai.models.tensors import ARCHITECTURES, Quant, plan_tensors
from promptai.settings import cache_directory

_UNTIED = ("internlm2", "phi2", "stablelm")  # their loaders demand an output matrix
QUANTS: tuple[Quant, ...] = ("q4_0", "q4_k_m", "q8_0")
#: Ten layers: first eighth, last eighth and every third differ. One width is a multiple of 256, one is not.
SHAPES = [
    Shape(10, width, 4, 2, 512, 2100, architecture=name, tied=tied)
    for name in ARCHITECTURES
    for width in (512, 576)
    for tied in ((True,) if name.startswith("gemma") else (False,) if name in _UNTIED else (False, True))
]


def quantizer() -> Path | None:
    """The newest ``llama-quantize`` built by PromptAI, else the one on PATH."""
    built = sorted((cache_directory() / "engines").glob("*/bin/llama-quantize"), key=lambda path: path.stat().st_mtime)
    on_path = shutil.which("llama-quantize")
    return built[-1] if built else Path(on_path) if on_path else None


def disagreements(tool: Path, source: Path, target: Path, shape: Shape, quant: Quant) -> list[str]:
    """List tensors whose type differs between the real quantiser and the plan."""
    command = [str(tool), str(source), str(target), quant.upper(), "2"]
    subprocess.run(command, check=True, capture_output=True)
    real = {tensor.name: tensor.quantization for tensor in read_header(target).tensors}
    planned = {tensor.name: tensor.quantization for tensor in plan_tensors(shape, quant)}
    names = sorted(real.keys() | planned.keys())
    return [
        f"{name}: {real.get(name)} not {planned.get(name)}" for name in names if real.get(name) != planned.get(name)
    ]


def main() -> int:
    """Print a line for each combination; return 1 when one differs, 4 without a ``llama-quantize``."""
    tool = quantizer()
    if tool is None:
        sys.stderr.write("no llama-quantize found (build one with: promptai engine build)\n")
        return 4
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source.gguf", Path(name) / "target.gguf"
        for shape in SHAPES:
            write_synthetic(source, shape, name="source", quant="f16")
            for quant in QUANTS:
                wrong = disagreements(tool, source, target, shape, quant)
                failed += bool(wrong)
                what = f"{shape.architecture:10} {shape.width} {'tied' if shape.tied else 'untied':6} {quant:7}"
                sys.stdout.write(f"{what} {'agrees' if not wrong else '; '.join(wrong[:4])}\n")
    sys.stdout.write(f"{failed} of {len(SHAPES) * len(QUANTS)} differ\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
