"""Where an answer goes on: token ids of its prompt, and of what has been sent of it.

The next engine is asked how it would write both. Ids that the last one told are believed as long
as they spell out what was sent: of a character in several tokens, and of a text that was held back
because a stop word might have begun, llama-server tells only the last one (b11549). Else the text is
tokenised, apart from the prompt, because nothing that a model wrote may be read as a mark of its
template. Tokenizers that begin every text with a space would add one at the joint; behind a line
break they do not. And where a template opens the thinking itself and the client wants thoughts as text
(``reasoning_format: none``), the answer begins with what is the prompt's end: that stands there already.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

from promptai.errors import EngineRefusedError
from promptai.router.failover.resume import SentText
from promptai.wire.inference import InferenceRequest

#: Asks an engine something quick: path and body; the answer's object.
Ask = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]

_STREAM_ONLY = frozenset(("stream", "stream_options"))
_BREAK = "\n"


class ResumePoint(NamedTuple):
    """
    What stands before the first token of a continuation.

    Attributes:
        prompt: Token ids, the begin token among them; ``said`` of the answer.
        how: Where those of the answer come from.
    """

    prompt: list[int]
    said: list[int]
    how: Literal["ids", "text"]


async def find_joint(ask: Ask, request: InferenceRequest, body: dict[str, Any], said: SentText) -> ResumePoint:
    """Find where to go on; ``body`` is the request as it came."""
    before, text = request.prompt, said.text
    if request.messages is not None:
        rendered = await ask("/apply-template", {k: v for k, v in body.items() if k not in _STREAM_ONLY})
        before = str(rendered.get("prompt", ""))
        text = text[_opened(before, text) :]
    if isinstance(before, str):
        prompt = await _tokenize(ask, before, special=True)
    else:
        prompt = [int(token) for token in before or ()]
    if said.ids and await _spell(ask, said.ids, text):
        return ResumePoint(prompt, list(said.ids), "ids")
    return ResumePoint(prompt, await _tokens_of(ask, text), "text")


def _opened(prompt: str, text: str) -> int:
    """Characters at the beginning of an answer that are a tag at the end of its prompt, and what follows the tag."""
    if not text.startswith("<"):
        return 0
    tag = text.find(">") + 1
    lengths = range(min(len(prompt), len(text)), tag - 1, -1) if tag else ()
    return next((length for length in lengths if prompt.endswith(text[:length])), 0)


async def _tokens_of(ask: Ask, text: str) -> list[int]:
    plain = await _tokenize(ask, text, special=False)
    if await _spell(ask, plain, text):
        return plain
    mark, marked = await _tokenize(ask, _BREAK, special=False), await _tokenize(ask, _BREAK + text, special=False)
    behind = marked[len(mark) :]
    return behind if marked[: len(mark)] == mark and await _spell(ask, behind, text) else plain


async def _spell(ask: Ask, tokens: Sequence[int], text: str) -> bool:
    """Whether tokens make up exactly that text, as far as the engine can tell."""
    try:
        found = await ask("/detokenize", {"tokens": list(tokens)})
    except EngineRefusedError as error:
        if error.status == 404:
            return True
        raise
    return found.get("content") == text


async def _tokenize(ask: Ask, text: str, *, special: bool) -> list[int]:
    found = await ask("/tokenize", {"content": text, "add_special": special, "parse_special": special})
    return [int(token) for token in found.get("tokens", ())]
