import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from promptai.errors import ModelError
from promptai.models.convert import (
    NAME,
    Checkpoint,
    Converter,
    converted_checkpoint,
    find_converter,
    origin_of,
    read_checkpoint,
)
from promptai.models.library import Library
from support_quantize import Quiet

#: A stand-in for llama.cpp's converter: writes its environment and the model's size.
SCRIPT = """
import os, sys
from pathlib import Path
_, flag, out, folder = sys.argv
assert flag == "--outfile"
print("INFO: reading", folder)
Path(out).write_text(os.environ["HF_HUB_OFFLINE"] + Path(folder, "model.safetensors").read_text())
"""


def run(command: Sequence[str], *, seen: Callable[[str], None], tick: Callable[[], None]) -> int:
    """Run a command like the command line's runner."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        seen(line)
    tick()
    return done.returncode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of twelve bytes."""
    path = tmp_path / "edge-1b"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("twelve bytes")
    return path


def converter(tmp_path: Path, script: str = SCRIPT) -> Converter:
    """A converter with this script."""
    path = tmp_path / NAME
    path.write_text(script)
    return Converter(path, Path(sys.executable), run)


def test_rejects_a_directory_without_weights_or_configuration(tmp_path: Path, folder: Path) -> None:
    """Before searching for a converter."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not a checkpoint"):
        read_checkpoint(tmp_path / "empty", trust_code=False)

    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="is not a checkpoint"):
        read_checkpoint(folder, trust_code=False)


def test_rejects_a_checkpoint_with_code_unless_trusted(folder: Path) -> None:
    """llama.cpp's converter would run it with the user's rights."""
    assert read_checkpoint(folder, trust_code=False).bytes == 12
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenization_own.py").write_text("print('hello')")

    with pytest.raises(ModelError, match=r"may run \(tokenization_own\.py\)"):
        read_checkpoint(folder, trust_code=False)
    assert read_checkpoint(folder, trust_code=True).bytes == 12


def test_the_checksum_covers_the_weights_in_name_order(folder: Path) -> None:
    """With a single file it is the file's own checksum, as shown by the hub."""
    one = origin_of(read_checkpoint(folder, trust_code=False), Quiet())
    assert (one.name, one.sha256) == ("edge-1b", hashlib.sha256(b"twelve bytes").hexdigest())

    (folder / "a.safetensors").write_text("first, ")
    two = origin_of(read_checkpoint(folder, trust_code=False), Quiet())
    assert two.sha256 == hashlib.sha256(b"first, twelve bytes").hexdigest()


def test_the_current_directory_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dot is not a name, neither in the result nor in front of a progress bar."""
    monkeypatch.chdir(folder)
    progress = Quiet()

    assert origin_of(read_checkpoint(Path(), trust_code=False), progress).name == "edge-1b"
    assert progress.begun == [("hashing edge-1b", 12)]


def test_the_16_bit_file_exists_only_while_needed(tmp_path: Path, folder: Path) -> None:
    """The converter runs offline, and no file stays behind."""
    target, progress = tmp_path / "out" / "new.gguf", Quiet()

    with converted_checkpoint(
        read_checkpoint(folder, trust_code=False),
        target,
        converter=converter(tmp_path),
        progress=progress,
        cache=tmp_path,
    ) as middle:
        assert middle.read_text() == "1twelve bytes"
        assert middle.name == "new.gguf.16bit.part"

    assert list(target.parent.iterdir()) == []
    assert (progress.begun, progress.done) == ([("converting edge-1b", 12)], 12)


def test_two_conversions_do_not_write_the_same_file(tmp_path: Path, folder: Path) -> None:
    """The second fails, and neither it nor a cleaning of the library deletes the first one's file."""
    checkpoint, target = read_checkpoint(folder, trust_code=False), tmp_path / "out" / "new.gguf"

    with converted_checkpoint(
        checkpoint, target, converter=converter(tmp_path), progress=Quiet(), cache=tmp_path
    ) as middle:
        with (
            pytest.raises(ModelError, match="another process is writing"),
            converted_checkpoint(checkpoint, target, converter=converter(tmp_path), progress=Quiet(), cache=tmp_path),
        ):
            pytest.fail("the second conversion must not start")
        assert Library(tmp_path).clean() == (0, [middle])
        assert middle.read_text() == "1twelve bytes"


@pytest.mark.parametrize(
    ("script", "words", "hint"),
    [
        ("import torch_of_nobody", "No module named 'torch_of_nobody'", "bin/pip install torch transformers"),
        (
            "print('half', file=open(__import__('sys').argv[2], 'w')); raise SystemExit('no such model')",
            "cannot be converted: .*no such model",
            "promptai engine build",
        ),
        ("raise SystemExit(3)", "the converter printed nothing", "promptai engine build"),
    ],
    ids=["module", "architecture", "silent"],
)
def test_a_failing_converter_reports_why_and_what_to_install(
    tmp_path: Path, folder: Path, script: str, words: str, hint: str
) -> None:
    """No file stays behind."""
    failing = converter(tmp_path, script)
    checkpoint = read_checkpoint(folder, trust_code=False)

    with (
        pytest.raises(ModelError, match=words) as caught,
        converted_checkpoint(
            checkpoint, tmp_path / "new.gguf", converter=failing, progress=Quiet(), cache=tmp_path / "cache"
        ),
    ):
        pytest.fail("there is nothing to go on with")

    assert hint in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "edge-1b"]


def test_does_not_start_without_enough_space(tmp_path: Path) -> None:
    """The conversion needs space for a 16-bit copy."""
    huge = Checkpoint(tmp_path, (), 10**18)

    with (
        pytest.raises(ModelError, match="free"),
        converted_checkpoint(
            huge, tmp_path / "new.gguf", converter=converter(tmp_path), progress=Quiet(), cache=tmp_path
        ),
    ):
        pytest.fail("there is nothing to go on with")


def test_uses_the_newest_converter_with_its_own_python(tmp_path: Path) -> None:
    """Falls back to our interpreter; without a converter it fails."""
    with pytest.raises(ModelError, match=NAME):
        find_converter(tmp_path / "engines", tmp_path, run)

    for age_s, name in ((1000, "old"), (0, "new")):
        script = tmp_path / "engines" / name / "src" / NAME
        script.parent.mkdir(parents=True)
        script.write_text("")
        os.utime(script, (10_000 - age_s,) * 2)
    found = find_converter(tmp_path / "engines", tmp_path, run)
    assert (found.script, found.python) == (script, Path(sys.executable))

    python = tmp_path / "convert" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert find_converter(tmp_path / "engines", tmp_path, run).python == python
