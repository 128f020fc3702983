"""Convert a checkpoint (a directory of safetensors files) to one GGUF file, with llama.cpp's converter.

llama.cpp maintains the tensor names of every architecture, so this module runs its
``convert_hf_to_gguf.py``, which ``promptai engine build`` keeps. The script needs
PyTorch and transformers, gigabytes that do not belong in this package; they go into
their own virtual environment, ``convert`` in the cache directory.

The script loads tokenizers with ``trust_remote_code``: a checkpoint may contain Python
code, which then runs with the user's rights. So a directory with ``.py`` files is rejected
unless the user trusts it, and the converter runs offline so that it cannot download code.
"""

import contextlib
import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from promptai.errors import ModelError, ModelFormatError, ModelNotFoundError
from promptai.models.library import PART, ProgressReporter, disk_errors, hash_into
from promptai.models.quantize import Origin, ToolRunner, check_space, locked_part_file

NAME = "convert_hf_to_gguf.py"
#: Packages that the converter imports for most architectures.
NEEDS = ("torch", "transformers", "sentencepiece", "protobuf", "safetensors")
_VENV = "convert"
_TAIL_LINES = 30
#: Prevents downloads while an untrusted tokenizer is loaded.
_OFFLINE = ("env", "HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1")


class Checkpoint(msgspec.Struct, frozen=True):
    """
    A directory with a model's original weights.

    Attributes:
        folder: Absolute path: ``.`` would not give the model a name.
        weights: Its safetensors files, sorted by name.
        bytes: Their total size.
    """

    folder: Path
    weights: tuple[Path, ...]
    bytes: int


class Converter(msgspec.Struct, frozen=True):
    """
    llama.cpp's converter.

    Attributes:
        python: Interpreter with the packages in ``NEEDS``, if they are installed.
        run: Runs it.
    """

    script: Path
    python: Path
    run: ToolRunner


def read_checkpoint(folder: Path, *, trust_code: bool) -> Checkpoint:
    """
    Check that a directory is a checkpoint that can be converted.

    Raises:
        ModelError: It lacks weights or a configuration, or contains code that the user does not trust.
    """
    weights = tuple(sorted(folder.glob("*.safetensors")))
    if not weights or not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"{folder} is not a checkpoint: it needs config.json and at least one .safetensors file",
            hint="download the whole repository, not a single file",
        )
    code = sorted(path.name for path in folder.rglob("*.py"))
    if code and not trust_code:
        raise ModelError(
            f"{folder} contains code that the conversion may run ({', '.join(code[:3])})",
            hint="review it, then delete it or allow it with --trust-code",
        )
    return Checkpoint(folder.absolute(), weights, sum(path.stat().st_size for path in weights))


def find_converter(engines: Path, cache: Path, run: ToolRunner) -> Converter:
    """
    Find the converter of the most recently built engine, and the Python interpreter to run it with.

    Raises:
        ModelError: No built engine has one.
    """
    found = sorted(engines.glob(f"*/src/{NAME}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ModelError(
            f"llama.cpp's {NAME}, which converts checkpoints, is not on this machine",
            hint="promptai engine build installs it",
        )
    python = cache / _VENV / "bin" / "python"
    return Converter(found[-1], python if os.access(python, os.X_OK) else Path(sys.executable), run)


def origin_of(checkpoint: Checkpoint, progress: ProgressReporter) -> Origin:
    """Return a checkpoint's name, and the SHA-256 of its safetensors files concatenated in name order."""
    progress.begin(f"hashing {checkpoint.folder.name}", checkpoint.bytes)
    digest = hashlib.sha256()
    for path in checkpoint.weights:
        with disk_errors(path), path.open("rb") as file:
            hash_into(digest, file, progress)
    return Origin(checkpoint.folder.name, digest.hexdigest())


@contextlib.contextmanager
def converted_checkpoint(
    checkpoint: Checkpoint, target: Path, *, converter: Converter, progress: ProgressReporter, cache: Path
) -> Iterator[Path]:
    """
    Convert a checkpoint to a 16-bit GGUF beside ``target``; the file is deleted at the end of the block.

    Args:
        cache: Parent of the converter's virtual environment, for the hint when a package is missing.

    Raises:
        ModelError: Too little space, another process is writing the file, or the converter failed (with its output).
    """
    check_space(target, checkpoint.bytes)
    middle = target.with_name(f"{target.name}.16bit{PART}")
    with locked_part_file(middle, target):
        _convert(checkpoint, middle, converter, progress, cache)
        yield middle
        middle.unlink(missing_ok=True)


def _convert(checkpoint: Checkpoint, part: Path, converter: Converter, progress: ProgressReporter, cache: Path) -> None:
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    shown = 0

    def tick() -> None:
        nonlocal shown
        size = min(part.stat().st_size if part.exists() else 0, checkpoint.bytes)
        progress.advance(size - shown)
        shown = size

    progress.begin(f"converting {checkpoint.folder.name}", checkpoint.bytes)
    command = [*_OFFLINE, str(converter.python), str(converter.script), "--outfile", str(part)]
    code = converter.run([*command, str(checkpoint.folder)], seen=tail.append, tick=tick)
    if code == 0:
        return
    missing = next((line for line in tail if "ModuleNotFoundError" in line or "ImportError" in line), None)
    if missing is not None:
        venv = cache / _VENV
        raise ModelError(
            f"{converter.python} lacks a package that the converter needs: {missing.strip()[:200]}",
            hint=f"python3 -m venv {venv} && {venv}/bin/pip install {' '.join(NEEDS)}",
        )
    # The last line of a traceback may be a bare exception name; the line before it is the code.
    reason = " / ".join([line.strip() for line in tail if line.strip()][-2:]) or "the converter printed nothing"
    raise ModelFormatError(
        f"{checkpoint.folder} cannot be converted: {reason[:300]}",
        hint="a newer llama.cpp may support its architecture: promptai engine build",
    )
