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

#: Stands for llama.cpp's: writes the environment that it sees and the model's size.
SCRIPT = """
import os, sys
from pathlib import Path
_, flag, out, folder = sys.argv
assert flag == "--outfile"
print("INFO: reading", folder)
Path(out).write_text(os.environ["HF_HUB_OFFLINE"] + Path(folder, "model.safetensors").read_text())
"""


def run(command: Sequence[str], *, seen: Callable[[str], None], tick: Callable[[], None]) -> int:
    """Run it, as the command line's runner does."""
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
    """A converter of this text."""
    path = tmp_path / NAME
    path.write_text(script)
    return Converter(path, Path(sys.executable), run)


def test_a_directory_without_weights_or_configuration_is_no_checkpoint(tmp_path: Path, folder: Path) -> None:
    """Said before anything is looked for."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no checkpoint"):
        read_checkpoint(tmp_path / "empty", trust_code=False)

    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="holds no checkpoint"):
        read_checkpoint(folder, trust_code=False)


def test_a_checkpoint_that_brings_code_is_refused_unless_trusted(folder: Path) -> None:
    """llama.cpp's converter would run it, as us."""
    assert read_checkpoint(folder, trust_code=False).bytes == 12
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenization_own.py").write_text("print('hello')")

    with pytest.raises(ModelError, match=r"may run \(tokenization_own\.py\)"):
        read_checkpoint(folder, trust_code=False)
    assert read_checkpoint(folder, trust_code=True).bytes == 12


def test_its_checksum_is_that_of_its_weights_in_order(folder: Path) -> None:
    """Of one file its own, as the hub shows it."""
    one = origin_of(read_checkpoint(folder, trust_code=False), Quiet())
    assert (one.name, one.sha256) == ("edge-1b", hashlib.sha256(b"twelve bytes").hexdigest())

    (folder / "a.safetensors").write_text("first, ")
    two = origin_of(read_checkpoint(folder, trust_code=False), Quiet())
    assert two.sha256 == hashlib.sha256(b"first, twelve bytes").hexdigest()


def test_the_folder_that_one_stands_in_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dot is none, neither in the result nor in front of a progress bar."""
    monkeypatch.chdir(folder)
    progress = Quiet()

    assert origin_of(read_checkpoint(Path(), trust_code=False), progress).name == "edge-1b"
    assert progress.begun == [("hashing edge-1b", 12)]


def test_the_16_bit_file_is_there_while_it_is_needed(tmp_path: Path, folder: Path) -> None:
    """Nothing is fetched meanwhile, and nothing stays."""
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


def test_two_at_once_do_not_convert_into_the_same_file(tmp_path: Path, folder: Path) -> None:
    """The second is told so; nor does it delete what the first has made, or whoever cleans the library."""
    checkpoint, target = read_checkpoint(folder, trust_code=False), tmp_path / "out" / "new.gguf"

    with converted_checkpoint(
        checkpoint, target, converter=converter(tmp_path), progress=Quiet(), cache=tmp_path
    ) as middle:
        with (
            pytest.raises(ModelError, match="is being written by another process"),
            converted_checkpoint(checkpoint, target, converter=converter(tmp_path), progress=Quiet(), cache=tmp_path),
        ):
            pytest.fail("it is not its turn")
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
        ("raise SystemExit(3)", "it printed nothing", "promptai engine build"),
    ],
    ids=["module", "architecture", "silent"],
)
def test_a_converter_that_fails_says_why_and_what_to_install(
    tmp_path: Path, folder: Path, script: str, words: str, hint: str
) -> None:
    """And leaves nothing."""
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


def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path: Path) -> None:
    """A 16-bit copy is needed on the way."""
    huge = Checkpoint(tmp_path, (), 10**18)

    with (
        pytest.raises(ModelError, match="free"),
        converted_checkpoint(
            huge, tmp_path / "new.gguf", converter=converter(tmp_path), progress=Quiet(), cache=tmp_path
        ),
    ):
        pytest.fail("there is nothing to go on with")


def test_the_newest_converter_runs_with_the_python_made_for_it(tmp_path: Path) -> None:
    """Else with ours, and without one there is none."""
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
