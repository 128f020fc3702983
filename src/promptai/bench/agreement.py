"""Measure how closely a quantised model agrees with its source, with intervals.

4-bit weights cost almost nothing in some models and files and much in others, and a damaged file
still loads and generates text. So source and result read the same text token by token
(teacher-forced: each model gets the text, not its own continuation), and two things are compared
at each position: whether both choose the same next token, and the probability that each assigns
to the token that really follows.

There are two methods. ``score`` works with any llama-server, one decode step per position, exactly.
``run_perplexity`` runs llama.cpp's ``llama-perplexity``, which is faster. Its agreement is exact,
but the likelihoods that it stores for the source are clipped: a model compared with itself came
out 0.21 ± 0.03 nats better than itself (b1 of 0c1e570). So its perplexities come from the two
runs, each exact, and their difference has no interval.

Positions of one text are correlated, so the intervals are somewhat too narrow. Agreement is not a
measure of correct answers, and means nothing for random weights.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import msgspec

from promptai.bench.workload import load_bundled
from promptai.engine.client import EngineClient
from promptai.engine.command_log import failure_lines, run_logged
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary
from promptai.engine.scoring import force_token
from promptai.errors import EngineProtocolError

#: q2_K keeps 71 % for an 8 B model (llama.cpp's tools/perplexity/README.md); less points to a fault.
DOUBTFUL = 0.7
_Z95 = NormalDist().inv_cdf(0.975)
_TEXTS = 16
POSITIONS_PER_TEXT = 32
_CONTEXT = 2048
#: llama-perplexity scores the second half of each chunk, without its last token.
_CHUNK_TOKENS, _CHUNKS = 512, 2
_SCORED = _CHUNK_TOKENS - 1 - _CHUNK_TOKENS // 2
#: Placeholder for the log-probability of a model that computes NaN; no figure includes it.
_NO_NUMBER = -1000.0


class Passage(NamedTuple):
    """A context, and the text after it that is scored."""

    before: str
    scored: str


class Position(NamedTuple):
    """
    A model's prediction at one position of a text.

    Attributes:
        logprob: Natural logarithm of the probability of the token that follows.
        top: The most probable token; -1 when the model computes NaN.
    """

    logprob: float
    top: int


class Agreement(msgspec.Struct, frozen=True):
    """
    The effect of quantising.

    Attributes:
        by: ``engine`` or ``llama-perplexity``.
        positions: Number of positions compared.
        agreed: Number of positions at which both models choose the same token.
        share: ``agreed`` / ``positions``, with its 95 % interval (Wilson's).
        source_perplexity, result_perplexity: Perplexity on the same tokens.
        difference: Mean log-probability of the text's tokens, result minus source, in nats per token; ``None`` if a
            perplexity is infinite.
        difference_ci95: Its 95 % interval; ``None`` if ``difference`` is, or single positions are unknown.
    """

    by: str
    positions: int
    agreed: int
    share: float
    share_ci95: tuple[float, float]
    source_perplexity: float
    result_perplexity: float
    difference: float | None
    difference_ci95: tuple[float, float] | None

    @property
    def doubtful(self) -> bool:
        """Whether even the upper end of the interval is below what a good 2-bit model keeps."""
        return self.share_ci95[1] < DOUBTFUL


def compare(source: Sequence[Position | None], result: Sequence[Position | None]) -> Agreement:
    """
    Compare two models' positions in the same text.

    Raises:
        EngineProtocolError: Fewer than half of the positions, or fewer than two, are known for both models.
    """
    pairs = [(old, new) for old, new in zip(source, result, strict=True) if old is not None and new is not None]
    n = len(pairs)
    if n < max(2, len(source) / 2):
        raise EngineProtocolError(
            f"the engine reported {n} of {len(source)} probabilities",
            hint="scoring needs a llama-server that supports n_probs and logit_bias",
        )
    differences = [new.logprob - old.logprob for old, new in pairs]
    agreed = sum(old.top == new.top >= 0 for old, new in pairs)
    mean, reach = fmean(differences), _Z95 * stdev(differences) / math.sqrt(n)
    perplexities = perplexity([old for old, _ in pairs]), perplexity([new for _, new in pairs])
    known = math.inf not in perplexities
    return Agreement(
        "engine",
        n,
        agreed,
        agreed / n,
        wilson(agreed, n),
        *perplexities,
        mean if known else None,
        (mean - reach, mean + reach) if known else None,
    )


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): stays within 0 and 1, and keeps a width even if all agree."""
    share, z2 = count / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def perplexity(positions: Sequence[Position]) -> float:
    """Exponential of the mean negative log-probability; infinite on overflow or NaN."""
    if any(position.top < 0 for position in positions):
        return math.inf
    try:
        return math.exp(-fmean(position.logprob for position in positions))
    except OverflowError:
        return math.inf


def texts(count: int = _TEXTS) -> list[Passage]:
    """The first answers of the bundled conversations with the shortest openings, which are prefilled fastest."""
    found = []
    for conversation in load_bundled().conversations:
        opening = conversation.prompt(0)
        answer = conversation.messages[len(opening)]
        found.append(Passage("\n\n".join(message.content for message in opening) + "\n\n", answer.content))
    return sorted(found, key=lambda text: len(text.before))[:count]


async def score(
    model: Path,
    passages: Sequence[Passage],
    *,
    engine: EngineBinary,
    threads: int,
    log: Path,
    most_context: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Position | None]:
    """
    Return a model's prediction at each scored position of ``passages``.

    A token that ends within a character gives ``None``: llama-server does not report these, for any model.

    Args:
        log: File for the engine's output.
        most_context: The model's context length in tokens; ``None``: unknown.
        progress: Receives the number of positions just finished.

    Raises:
        EngineError: The engine cannot be started, or fails.
    """
    context = min(_CONTEXT, most_context or _CONTEXT)
    flags = EngineFlags(model=str(model), port=free_port(), threads=threads, context=context)
    found: list[Position | None] = []
    async with RunningEngine(engine, flags, log=log) as running, EngineClient(running.base_url) as client:
        for text in passages:
            scored = (await client.tokenize(text.scored))[:POSITIONS_PER_TEXT]
            # llama-server requires room for one token of an answer.
            room = max(1, context - len(scored) - 1)
            prompt = (await client.tokenize(text.before, add_special=True))[-room:]
            for token in scored:
                found.append(await _position(client, prompt, token))
                prompt.append(token)
                if progress is not None:
                    progress(1)
    return found


async def _position(client: EngineClient, prompt: list[int], token: int) -> Position | None:
    """Score ``token``; the top choice beside it is unaffected by the forcing (tried: b1, b11549)."""
    try:
        reported = await force_token(client, prompt, token)
    except EngineProtocolError as error:
        if "got `null`" in error.message:  # NaN in JSON
            return Position(_NO_NUMBER, -1)
        raise
    if reported is None or reported.id != token or not reported.top_logprobs:
        return None
    return Position(reported.logprob, reported.top_logprobs[0].id)


def run_perplexity(
    program: Path,
    source: Path,
    result: Path,
    *,
    threads: int,
    folder: Path,
    progress: Callable[[str, float], None],
) -> Agreement:
    """
    Compare two models with ``llama-perplexity``, on the bundled conversations as plain text.

    Args:
        folder: Folder for its files: about 60 MB for each 32 k of vocabulary.
        progress: Receives ``source`` or ``result``, and the seconds expected for it.

    Raises:
        EngineProtocolError: The program fails, or its output lacks a figure.
    """
    corpus, base = folder / "text", folder / "logits"
    corpus.write_text("\n\n".join(m.content for c in load_bundled().conversations for m in c.messages))
    kept = ("--kl-divergence-base", str(base))
    size = ("-c", str(_CHUNK_TOKENS), "-b", str(_CHUNK_TOKENS), "-t", str(threads), "--chunks", str(_CHUNKS))
    first = _run(program, ["-m", str(source), "-f", str(corpus), *size, *kept], folder, "source", progress)
    second = _run(program, ["-m", str(result), *size, *kept, "--kl-divergence"], folder, "result", progress)
    source_perplexity = _perplexity(r"(?:Final estimate: PPL = |Unexpected )", first, "source")
    result_perplexity = _perplexity(r"Mean PPL\(Q\) *: *", second, "result")
    n = _CHUNKS * _SCORED
    agreed = round(n * _number(r"Same top p *: *", second) / 100)
    return Agreement(
        "llama-perplexity",
        n,
        agreed,
        agreed / n,
        wilson(agreed, n),
        source_perplexity,
        result_perplexity,
        math.log(source_perplexity) - math.log(result_perplexity),
        None,
    )


def _run(
    program: Path, arguments: Sequence[str], folder: Path, what: str, progress: Callable[[str, float], None]
) -> str:
    # llama.cpp reads LLAMA_* variables; the user's are not meant for this run.
    without = [word for name in os.environ if name.startswith("LLAMA_") for word in ("-u", name)]
    lines: list[str] = []

    def seen(line: str) -> None:
        lines.append(line)
        left = re.search(r"seconds per pass - ETA (\d+(?:\.\d+)?) minutes", line)
        if left is not None:
            progress(what, 60 * float(left[1]))

    command = ["env", *without, str(program), *arguments]
    code = run_logged(command, log=folder / f"{what}.log", seen=seen, tick=lambda: None)
    text = "\n".join(lines)
    if code != 0:
        raise EngineProtocolError(
            f"{program} exited with code {code}: {(failure_lines(text, 1) or ['it printed nothing'])[0]}",
            hint="see promptai doctor",
        )
    return text


def _perplexity(before: str, text: str, what: str) -> float:
    """Read a perplexity; for NaN, llama-perplexity may report a negative standard deviation instead."""
    if re.search(before + r"(?:-?nan|inf|negative standard deviation)", text) is not None:
        raise EngineProtocolError(
            f"llama-perplexity reports no perplexity of the {what}: the model computes NaN",
            hint="the type is too coarse for this model, or the source is damaged",
        )
    return _number(before, text)


def _number(before: str, text: str) -> float:
    match = re.search(before + r"(\d+(?:\.\d+)?)", text)
    if match is None:
        raise EngineProtocolError(
            "llama-perplexity did not print the expected figures", hint="use a newer build: promptai engine build"
        )
    return float(match[1])
