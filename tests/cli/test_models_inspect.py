"""``promptai models inspect`` with local files, a library and a hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from promptai.cli.models_inspect import inspect
from promptai.errors import ModelError, SettingsError
from promptai.models.bundled import bundled_model
from support_cli import promptai
from support_gguf import BOOL, STRING, TYPE_F32, U16, U32, array, entry, gguf, llama, tensor, text
from support_hub import hub_with

MODEL, HUB = 3, 7
FILE = "tiny-q8_0.gguf"
#: Clears the screen, then a mark that reverses the text direction.
NASTY = "a\x1b[2Jb\u202ec"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTAI_MODELS", str(tmp_path / "library"))
    monkeypatch.setenv("COLUMNS", "200")


def printed(*arguments: str | Path) -> str:
    """Run the command in this process; returns its output, raises its error."""
    done = CliRunner().invoke(inspect, [str(argument) for argument in arguments])
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.stdout


def test_inspects_the_bundled_model_by_name() -> None:
    """All facts in JSON, as documented in the model's card."""
    facts = json.loads(printed("promptai-tiny", "--json", "--tensors"))

    assert (facts["architecture"], facts["parameters"], facts["quantization"]) == ("llama", 2_238_528, "Q8_0")
    assert [(share["type"], share["tensors"]) for share in facts["mix"]] == [("Q8_0", 36), ("F32", 11)]
    assert sum(share["share"] for share in facts["mix"]) == pytest.approx(1)
    assert facts["kv_bytes_per_token_f16"] == 5 * 6 * 2 * 32 * 2
    assert facts["tokenizer"] == {
        "model": "gpt2",
        "pre": "gpt-2",
        "vocabulary": 2048,
        "special_tokens": {"bos": 0, "eos": 1, "eot": 1, "padding": 1},
    }
    assert (facts["chat_template"], facts["synthetic"], facts["parts"]) == (True, False, 1)
    assert facts["tensor_count"] == len(facts["tensors"]) == 47
    assert {"name": "output_norm.weight", "shape": [192], "quantization": "F32"}.items() <= facts["tensors"][1].items()
    assert facts["tensor_bytes"] == sum(one["size_bytes"] for one in facts["tensors"])


def test_prints_a_table_for_people(small_model: Path) -> None:
    """The table mentions that the weights are random."""
    table = printed(small_model, "--tensors")

    for words in ("random weights", "KV cache", "tokenizer", "blk.1.ffn_down.weight"):
        assert words in table


@pytest.mark.real
def test_inspects_a_file_on_the_hub_without_downloading_it(tmp_path: Path) -> None:
    """One range of 256 KiB contains the header, the hub reports the size, and nothing is stored."""
    whole = bundled_model().read_bytes()
    with hub_with(edge__tiny_GGUF={FILE: whole}) as hub:
        done = promptai(
            "models", "inspect", f"hub:edge/tiny-GGUF:{FILE}", "--json", cwd=tmp_path, **hub.environment(tmp_path)
        )

        facts = json.loads(done.stdout)
        assert (facts["path"], facts["parameters"]) == (f"hub:edge/tiny-GGUF:{FILE}", 2_238_528)
        assert facts["file_bytes"] == len(whole)
        assert sum(seen.bytes for seen in hub.bodies()) == 256 * 1024
    assert not (tmp_path / "models").exists()


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "code", "words"), [("cut.gguf", MODEL, "truncated"), ("none.gguf", HUB, "none.gguf in edge/bad")]
)
def test_distinguishes_a_bad_file_on_the_hub_from_a_missing_one(
    tmp_path: Path, file: str, code: int, words: str
) -> None:
    """A file truncated on upload is rejected after reading its header."""
    whole = bundled_model().read_bytes()
    with hub_with(edge__bad={"cut.gguf": whole[:-100]}) as hub:
        done = promptai("models", "inspect", f"hub:edge/bad:{file}", cwd=tmp_path, **hub.environment(tmp_path))

    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def split(number: int, tensors: list[bytes], data: int) -> bytes:
    """One part of two; only the first has the model's metadata."""
    entries = [entry("split.no", U16, number), entry("split.count", U16, 2)]
    return gguf([*(llama(context_length=512) if number == 0 else []), *entries], tensors, data)


@pytest.mark.parametrize("given", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
def test_combines_a_model_in_two_files(tmp_path: Path, given: str) -> None:
    """Regardless of which part is given."""
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(split(0, [tensor("a", (64,), TYPE_F32)], 256))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(split(1, [tensor("b", (32,), TYPE_F32)], 128))

    facts = json.loads(printed(given, "--json"))

    assert (facts["architecture"], facts["parts"], facts["parameters"]) == ("llama", 2, 96)
    assert facts["file_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))


def lone(folder: Path) -> str:
    (folder / "m-00001-of-00002.gguf").write_bytes(split(0, [tensor("a", (64,), TYPE_F32)], 256))
    return "m-00001-of-00002.gguf"


def renamed(folder: Path) -> str:
    (folder / "part.gguf").write_bytes(split(1, [tensor("a", (64,), TYPE_F32)], 256))
    return "part.gguf"


@pytest.mark.parametrize(
    ("make", "words"), [(lone, "m-00002-of-00002.gguf does not exist"), (renamed, "is part 2 of 2")]
)
def test_rejects_a_part_without_the_others(tmp_path: Path, make: Callable[[Path], str], words: str) -> None:
    """Before an engine fails on it."""
    with pytest.raises(ModelError, match=words):
        printed(make(tmp_path))


def test_escapes_untrusted_texts_for_the_terminal(tmp_path: Path) -> None:
    """Escape sequences, marks that reverse the text direction, and the markup of our own tables."""
    entries = [
        *llama(),
        entry("general.name", STRING, f"[bold]{NASTY}"),
        entry("tokenizer.ggml.model", STRING, NASTY),
        entry("tokenizer.chat_template", STRING, f"line 1\n{NASTY}"),
        entry("promptai.source.name", STRING, NASTY),
        entry("promptai.synthetic", BOOL, True),
        entry("tokenizer.ggml.bos_token_id", U32, 7),
        array("tokenizer.ggml.tokens", STRING, [text("a")]),
    ]
    (tmp_path / "nasty.gguf").write_bytes(gguf(entries, [tensor(NASTY, (1,), TYPE_F32)], 4))

    table, template = printed("nasty.gguf", "--tensors"), printed("nasty.gguf", "--template")

    assert "\x1b" not in table + template
    assert "\u202e" not in table + template
    assert r"[bold]a\x1b[2Jb\u202ec" in table
    assert template == "line 1\na\\x1b[2Jb\\u202ec\n"


def test_a_missing_template_is_an_error(small_model: Path) -> None:
    """A script must not mistake an empty output for a template."""
    with pytest.raises(SettingsError, match="has no chat template"):
        printed(small_model, "--template")


def test_reports_an_unknown_name() -> None:
    """One line, with a hint."""
    with pytest.raises(ModelError, match="no model named 'nobody-1b'"):
        printed("nobody-1b")
