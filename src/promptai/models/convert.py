"""Turn a checkpoint (a directory of safetensors files) into one GGUF file, with llama.cpp's own converter.

Knowing every architecture's tensors is llama.cpp's work, not ours, so its
``convert_hf_to_gguf.py`` is run: ``promptai engine build`` keeps it. It needs PyTorch
and transformers, gigabytes that do not belong into the product; they go into a
virtual environment of their own, ``convert`` in the cache directory.

It loads tokenizers with ``trust_remote_code``: a checkpoint may bring Python of its
own, which then runs as you. So a directory with ``.py`` files is refused unless its
code is trusted, and the converter is kept from fetching code.
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
#: What it imports, as far as most architectures need it.
NEEDS = ("torch", "transformers", "sentencepiece", "protobuf", "safetensors")
_VENV = "convert"
_LAST_WORDS = 30
#: Nothing is fetched while a stranger's tokenizer is loaded.
_OFFLINE = ("env", "HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1")


class Checkpoint(msgspec.Struct, frozen=True):
    """
    A directory with a model as it was trained.

    Attributes:
        folder: From the root, for ``.`` is no name.
        weights: Its safetensors files, by name.
        bytes: Size of all of them.
    """

    folder: Path
    weights: tuple[Path, ...]
    bytes: int


class Converter(msgspec.Struct, frozen=True):
    """
    llama.cpp's converter.

    Attributes:
        python: The interpreter that has what it needs.
        run: How to run it.
    """

    script: Path
    python: Path
    run: ToolRunner


def read_checkpoint(folder: Path, *, trust_code: bool) -> Checkpoint:
    """
    Look whether a directory is a checkpoint that can be converted.

    Raises:
        ModelError: It has no weights or no configuration, or brings code that is not trusted.
    """
    weights = tuple(sorted(folder.glob("*.safetensors")))
    if not weights or not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"{folder} holds no checkpoint: it needs config.json and at least one .safetensors file",
            hint="fetch the whole repository, not a file of it",
        )
    code = sorted(path.name for path in folder.rglob("*.py"))
    if code and not trust_code:
        raise ModelError(
            f"{folder} brings code that converting it may run ({', '.join(code[:3])})",
            hint="read it; then delete it, or allow it with --trust-code",
        )
    return Checkpoint(folder.absolute(), weights, sum(path.stat().st_size for path in weights))


def find_converter(engines: Path, cache: Path, run: ToolRunner) -> Converter:
    """
    Find the converter that the newest built engine brought, and the Python to run it with.

    Raises:
        ModelError: There is none.
    """
    found = sorted(engines.glob(f"*/src/{NAME}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ModelError(
            f"converting a checkpoint needs llama.cpp's {NAME}, and there is none on this machine",
            hint="promptai engine build keeps it",
        )
    python = cache / _VENV / "bin" / "python"
    return Converter(found[-1], python if os.access(python, os.X_OK) else Path(sys.executable), run)


def origin_of(checkpoint: Checkpoint, progress: ProgressReporter) -> Origin:
    """Its name, and the SHA-256 of its safetensors files one after the other by name: of one file its own."""
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
    Give a checkpoint as a GGUF of 16-bit numbers, beside ``target``; it goes at the end of the block.

    Args:
        cache: Where the virtual environment for the converter belongs, for the advice when something is missing.

    Raises:
        ModelError: There is no space for it, another process writes it, or the converter failed: with what it said.
    """
    check_space(target, checkpoint.bytes)
    middle = target.with_name(f"{target.name}.16bit{PART}")
    with locked_part_file(middle, target):
        _convert(checkpoint, middle, converter, progress, cache)
        yield middle
        middle.unlink(missing_ok=True)


def _convert(checkpoint: Checkpoint, part: Path, converter: Converter, progress: ProgressReporter, cache: Path) -> None:
    words: deque[str] = deque(maxlen=_LAST_WORDS)
    shown = 0

    def tick() -> None:
        nonlocal shown
        size = min(part.stat().st_size if part.exists() else 0, checkpoint.bytes)
        progress.advance(size - shown)
        shown = size

    progress.begin(f"converting {checkpoint.folder.name}", checkpoint.bytes)
    command = [*_OFFLINE, str(converter.python), str(converter.script), "--outfile", str(part)]
    code = converter.run([*command, str(checkpoint.folder)], seen=words.append, tick=tick)
    if code == 0:
        return
    missing = next((line for line in words if "ModuleNotFoundError" in line or "ImportError" in line), None)
    if missing is not None:
        venv = cache / _VENV
        raise ModelError(
            f"the converter cannot start with {converter.python}: {missing.strip()[:200]}",
            hint=f"python3 -m venv {venv} && {venv}/bin/pip install {' '.join(NEEDS)}",
        )
    # The last line of a traceback may be a name alone; the one before it is the code.
    reason = " / ".join([line.strip() for line in words if line.strip()][-2:]) or "it printed nothing"
    raise ModelFormatError(
        f"{checkpoint.folder} cannot be converted: {reason[:300]}",
        hint="does this llama.cpp know its architecture? a newer one may: promptai engine build",
    )
