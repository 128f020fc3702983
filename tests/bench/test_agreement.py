import asyncio
import json
import math
import stat
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from promptai.bench.agreement import (
    DOUBTFUL,
    Agreement,
    Passage,
    Position,
    compare,
    perplexity,
    run_perplexity,
    score,
    texts,
    wilson,
)
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineProtocolError
from promptai.models.gguf import read_header
from promptai.models.quantize import quantize
from support_quantize import Quiet, write_half

EMBEDDED = EngineBinary("embedded", (sys.executable, "-m", "promptai.engine.embedded"), None, None)


@pytest.mark.parametrize(
    ("count", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_the_interval_is_wilsons(count: int, n: int, expected: tuple[float, float]) -> None:
    """The examples of Newcombe, Statistics in Medicine 17 (1998), table I; the last is the third mirrored."""
    assert wilson(count, n) == pytest.approx(expected, abs=5e-5)


def test_agreement_matches_a_count_by_hand() -> None:
    """Three of four agree; tokens are a nat less or more likely in turn, so the mean is unchanged."""
    source = [Position(-1.0, 5), Position(-2.0, 6), Position(-3.0, 7), Position(-2.0, 8)]
    result = [Position(-2.0, 5), Position(-1.0, 6), Position(-4.0, 7), Position(-1.0, 9)]

    found = compare(source, result)

    assert (found.positions, found.agreed, found.share) == (4, 3, 0.75)
    assert found.source_perplexity == found.result_perplexity == pytest.approx(math.exp(2))
    deviation = math.sqrt(4 / 3)
    assert found.difference == 0
    assert found.difference_ci95 == pytest.approx((-1.96 * deviation / 2, 1.96 * deviation / 2), abs=1e-3)
    assert not found.doubtful


def test_skips_positions_that_either_model_lacks() -> None:
    """Tokens within a character may be missing, but not most of the text."""
    known = [Position(-1.0, 1), Position(-2.0, 2)]

    assert compare([*known, None], [*known, Position(-9.0, 9)]).positions == 2
    with pytest.raises(EngineProtocolError, match="reported 2 of 5 probabilities"):
        compare([*known, None, None, None], [*known, None, None, None])


def test_a_probability_of_zero_does_not_crash() -> None:
    """A damaged model may assign a token the probability 0."""
    assert perplexity([Position(-1e9, 1)]) == math.inf


@pytest.mark.parametrize("broken", [Position(-1000.0, -1), Position(-3.4e38, 3)], ids=["nan", "impossible"])
def test_a_model_that_computes_nan_has_no_difference(broken: Position) -> None:
    """A single NaN is enough: its placeholder is not a measurement."""
    good = [Position(-1.0, 1), Position(-2.0, 2), Position(-3.0, 3)]

    found = compare(good, [*good[:2], broken])

    assert (found.positions, found.result_perplexity) == (3, math.inf)
    assert found.source_perplexity == pytest.approx(math.exp(2))
    assert (found.difference, found.difference_ci95) == (None, None)


def test_the_passages_are_answers_after_their_openings() -> None:
    """Sixteen, the same on every machine."""
    found = texts()

    assert len(found) == 16
    assert all(text.before.strip() and text.scored.strip() for text in found)
    assert [len(text.before) for text in found] == sorted(len(text.before) for text in found)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in F16."""
    return write_half(tmp_path_factory.mktemp("half") / "tiny-f16.gguf")


def known_sentences(count: int) -> list[Passage]:
    """Sentences like the bundled model's training data."""
    lines = (files("promptai.bench") / "data" / "edge-pronouns.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines[: 2 * count : 2]]
    return [Passage("", item["sentence"].replace("_", item[f"option{item['answer']}"])) for item in items]


def damaged(path: Path, target: Path, *, by: type[np.uint8 | np.uint16]) -> Path:
    """A copy with the weights of some matrices in the wrong places, or with swapped bytes."""
    header = read_header(path)
    data = bytearray(path.read_bytes())
    for hurt in (tensor for tensor in header.tensors if "ffn_down" in tensor.name):
        place = slice(header.data_offset + hurt.offset, header.data_offset + hurt.offset + hurt.size_bytes)
        data[place] = np.frombuffer(bytes(data[place]), by)[::-1].tobytes()
    target.write_bytes(data)
    return target


@pytest.mark.real
def test_q8_agrees_with_f16_and_a_damaged_file_does_not(half: Path, tmp_path: Path) -> None:
    """On text that the model knows; the damaged file loads and generates text like any other."""
    eight = tmp_path / "q8.gguf"
    quantize(half, eight, "q8_0", tool=None, progress=Quiet(), threads=1)
    passages = known_sentences(18)
    done: list[int] = []

    def ask(model: Path) -> list[Position | None]:
        log = tmp_path / "engine.log"
        return asyncio.run(score(model, passages, engine=EMBEDDED, threads=1, log=log, progress=done.append))

    source = ask(half)
    good = compare(source, ask(eight))
    bad = compare(source, ask(damaged(half, tmp_path / "damaged.gguf", by=np.uint16)))

    assert good.positions > 200
    assert good.share >= 0.99
    assert good.difference is not None
    assert abs(good.difference) < 0.01
    assert sum(done) == 3 * good.positions
    assert good.source_perplexity < 4
    assert bad.share_ci95[1] < DOUBTFUL < good.share_ci95[0]
    assert bad.doubtful
    assert not good.doubtful
    assert bad.difference_ci95 is not None
    assert bad.difference_ci95[1] < -0.1


@pytest.mark.real
def test_a_model_that_computes_nan_never_agrees(half: Path, tmp_path: Path) -> None:
    """Not even with itself: llama-server reports null for NaN."""
    broken = damaged(half, tmp_path / "broken.gguf", by=np.uint8)
    log = tmp_path / "engine.log"
    found = asyncio.run(score(broken, known_sentences(2), engine=EMBEDDED, threads=1, log=log))

    assert {position.top for position in found if position is not None} == {-1}
    assert compare(found, found).agreed == 0
    assert compare(found, found).source_perplexity == math.inf


#: What llama-perplexity printed for the bundled model in Q8_0 (b1 of 0c1e570), shortened.
FIRST = (
    "perplexity: 0.27 seconds per pass - ETA 1.50 minutes\\n[1]5.1,[2]6.2,\\n"
    "0.00.4 I Final estimate: PPL = 20.0000 +/- 1.5\\n"
)
SECOND = (
    "Mean PPL(Q)                   : 40.000000 ± 1.6\\nMean PPL(base)                : 15.0 ± 1.2\\n"
    "Same top p: 98.039 ± 0.615 %\\n"
)
#: What it prints instead of an estimate when that is NaN.
UNEXPECTED = "Unexpected negative standard deviation of log(prob)"


def fake_perplexity(folder: Path, *, first: str = FIRST, second: str = SECOND, code: int = 0) -> Path:
    """A program that prints the recorded output of the real one, and records its arguments."""
    path = folder / "llama-perplexity"
    path.write_text(
        f'#!/bin/sh\nprintf "%s " "$@" "${{LLAMA_ARG_CTX_SIZE-unset}}" >> {folder}/called\n'
        f'case "$*" in *--kl-divergence) printf "{second.replace("%", "%%")}"; exit {code};; esac\n'
        f'printf "{first}"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def by_perplexity(folder: Path, program: Path) -> Agreement:
    """Compare with this program, and check that its expected time is passed on."""
    left: list[tuple[str, float]] = []
    found = run_perplexity(
        program,
        folder / "a.gguf",
        folder / "b.gguf",
        threads=1,
        folder=folder,
        progress=lambda what, seconds: left.append((what, seconds)),
    )
    assert left == [("source", 90.0)]
    return found


@pytest.mark.real
def test_takes_each_perplexity_from_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's perplexity from the stored file is clipped; the user's LLAMA_* variables are ignored."""
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "64")

    found = by_perplexity(tmp_path, fake_perplexity(tmp_path))

    assert (found.by, found.positions, found.agreed) == ("llama-perplexity", 510, 500)
    assert (found.source_perplexity, found.result_perplexity) == (20.0, 40.0)
    assert found.difference == pytest.approx(-math.log(2))
    assert found.difference_ci95 is None
    called = (tmp_path / "called").read_text()
    assert called.count("unset") == 2
    assert f"-m {tmp_path}/a.gguf -f " in called


@pytest.mark.real
@pytest.mark.parametrize(
    ("second", "code", "words"),
    [
        ("nothing", 0, "did not print the expected figures"),
        ("error: no memory", 1, "exited with code 1: error: no memory"),
        ("Mean PPL(Q)  : nan ± nan\\nSame top p: 0.196 ± 0.2 %", 0, "reports no perplexity of the result"),
    ],
)
def test_rejects_unexpected_output_of_llama_perplexity(tmp_path: Path, second: str, code: int, words: str) -> None:
    """An unknown agreement is not 0."""
    with pytest.raises(EngineProtocolError, match=words):
        by_perplexity(tmp_path, fake_perplexity(tmp_path, second=second, code=code))


@pytest.mark.real
def test_a_result_that_never_agrees_is_doubtful(tmp_path: Path) -> None:
    """Here 0 is a measurement, not a missing value."""
    found = by_perplexity(tmp_path, fake_perplexity(tmp_path, second=SECOND.replace("98.039", " 0.000")))

    assert (found.agreed, found.share, found.doubtful) == (0, 0.0, True)


@pytest.mark.real
def test_rejects_a_source_that_computes_nan(tmp_path: Path) -> None:
    """llama-perplexity exits with code 0 nevertheless."""
    first = FIRST.replace("Final estimate: PPL = 20.0000 +/- 1.5", UNEXPECTED)

    with pytest.raises(EngineProtocolError, match="reports no perplexity of the source"):
        by_perplexity(tmp_path, fake_perplexity(tmp_path, first=first))
