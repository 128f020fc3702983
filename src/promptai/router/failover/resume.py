"""Continue an answer on another engine after the first one failed.

Half an answer is worse than none: it took a board a minute, and the client's program cannot see that it is
incomplete. So the next engine gets the prompt and the text sent so far, both as token ids, and continues from there.
Nothing is repeated or missing at the seam, and every later token is the model's own.

The token ids are exact if the engine reported them (``logprobs``). Otherwise prompt and text are tokenised
separately, which is exact as long as the model writes as its tokenizer would.

An answer in the middle of a tool call, a grammar or a reasoning block cannot be resumed, since its text does not
contain the engine's state; ``resume_blocker`` names the obstacle. This module decides and rewrites, and
``failover.attempt`` sends. Pure: engines are queried through a callback.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from promptai.errors import EngineRefusedError
from promptai.wire.inference import InferenceRequest
from promptai.wire.llamaserver import NativeChunk, Timings
from promptai.wire.openai import CompletionChunk

#: Sends a quick request to an engine: path and body; returns the response's object.
Query = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]

#: Fields of a chat request that /completion does not know or reads differently.
_CHAT_ONLY = frozenset(
    (
        *("messages", "model", "stream_options", "max_tokens", "max_completion_tokens", "tools", "tool_choice"),
        *("parallel_tool_calls", "response_format", "functions", "function_call", "n", "logprobs", "top_logprobs"),
        *("reasoning_format", "chat_template_kwargs", "add_generation_prompt", "user", "store", "metadata"),
    )
)
_STREAM_ONLY = frozenset(("stream", "stream_options"))
#: Number of tokens in a chat's ``logprobs`` if the request names none.
_DEFAULT_LOGPROBS = 20
_LINE_BREAK = "\n"


class SentText:
    """
    The part of an answer that the client has received.

    Args:
        answers: Number of answers requested.

    Attributes:
        text: The answer's text.
        token_ids: The answer's token ids; ``None`` once one of them was not reported.
        chunks: Chunks with text: at most, and nearly always exactly, the number of tokens.
        common: Fields that all chunks share: one answer has one id.
        beyond_text: Content that cannot be resumed, e.g. "a tool call"; empty without it.
        prompt_tokens: Tokens of the prompt; ``None`` until an engine reports them.
        usage_sent: Whether the client has received a usage report.
    """

    def __init__(self, answers: int = 1) -> None:
        self.text = ""
        self.token_ids: list[int] | None = []
        self.chunks = 0
        self.common: dict[str, Any] = {}
        self.beyond_text = ""
        self.prompt_tokens: int | None = None
        self.usage_sent = False
        self._answers = self._unfinished = answers
        self._withheld_ids: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether every answer has its finish reason."""
        return self._unfinished <= 0

    @property
    def tokens(self) -> int:
        """Number of tokens sent, as far as known."""
        return max(self.chunks, len(self.token_ids or ()))

    @property
    def started(self) -> bool:
        """Whether the client has received a part of the answer."""
        return bool(self.text or self.beyond_text or self._unfinished < self._answers)

    def record(self, chunk: CompletionChunk) -> bool:
        """Record a chunk; returns whether it carries text."""
        text = ""
        ids: list[int | None] = []
        for choice in chunk.choices or ():
            delta = choice.delta
            if delta is not None:
                text += delta.content or ""
                self.beyond_text = self.beyond_text or _beyond_text(delta.tool_calls, delta.thought)
            text += choice.text or ""
            self._unfinished -= choice.finish_reason is not None
            ids += [token.id for token in (choice.logprobs.content or ())] if choice.logprobs else []
        if chunk.prompt_progress is not None:
            self.text += text  # a tag at the prompt's end, repeated for the client: no token was generated for it
        elif text:
            self._append(text, ids)
        self.usage_sent = self.usage_sent or chunk.usage is not None
        return bool(text)

    def resume_from(self, point: "ResumePoint") -> None:
        """Record that an engine continues from these token ids."""
        self.prompt_tokens, self.token_ids, self._withheld_ids = len(point.prompt), list(point.answer), []

    def record_native(self, chunk: NativeChunk) -> None:
        """Record a chunk of a resumed answer."""
        if chunk.content:
            self._append(chunk.content, [*self._withheld_ids, *chunk.tokens])
            self._withheld_ids = []
        else:  # the engine withholds its text because a stop word may have begun
            self._withheld_ids += chunk.tokens
        self._unfinished -= chunk.stop

    def finish(self) -> None:
        """Record that no more will be sent."""
        self._unfinished = 0

    def _append(self, text: str, ids: list[int | None]) -> None:
        self.text += text
        self.chunks += 1
        known = [token for token in ids if token is not None]
        if self.token_ids is not None and known and len(known) == len(ids):
            self.token_ids += known
        else:
            self.token_ids = None


def _beyond_text(tool_calls: object, thought: str) -> str:
    if tool_calls is not None:
        return "a tool call"
    return "reasoning" if thought else ""


# Can it be resumed?


def resume_blocker(request: InferenceRequest, sent: SentText) -> str | None:
    """Return why a partly sent answer cannot be resumed; ``None`` if it can."""
    if sent.beyond_text:
        return f"{sent.beyond_text} cannot be resumed on another engine"
    for name, given in (
        ("tools", request.tools),
        ("functions", request.functions),
        ("grammar", request.grammar),
        ("json_schema", request.json_schema),
        ("echo", request.echo),
        ("suffix", request.suffix),
    ):
        if given:
            return f"an answer with {name} cannot be resumed on another engine"
    if (request.response_format or {}).get("type", "text") != "text":
        return "an answer with response_format cannot be resumed on another engine"
    if request.answers > 1 or (request.best_of or 1) > 1 or not _is_one_text(request.prompt):
        return "several answers cannot be resumed on another engine"
    if any(_has_media(message.get("content")) for message in request.messages or ()):
        return "an answer to images or audio cannot be resumed on another engine"
    return None


def _is_one_text(prompt: str | list[Any] | None) -> bool:
    """Whether a prompt is one text or one list of token ids; a list with text in it counts as several."""
    return not isinstance(prompt, list) or all(isinstance(token, int) for token in prompt)


def _has_media(content: object) -> bool:
    """Whether a message contains an image or audio, whose encoding the text does not contain."""
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type", "text") != "text" for part in content
    )


# The resume point


class ResumePoint(NamedTuple):
    """
    The tokens before the first resumed one.

    Attributes:
        prompt: Token ids of the prompt, with the begin token.
        answer: Token ids of the text sent so far.
        source: Origin of the answer's ids: reported as ``ids``, or tokenised from ``text``.
    """

    prompt: list[int]
    answer: list[int]
    source: Literal["ids", "text"]


async def resume_tokens(query: Query, request: InferenceRequest, body: dict[str, Any], sent: SentText) -> ResumePoint:
    """
    Find the token ids from which an engine can continue.

    Reported ids count only if they decode to the text sent: for a character of several tokens, and for text withheld
    because of a possible stop word, llama-server reports only the last id (b11549). Otherwise the text is tokenised
    separately from the prompt, so that no text of the model is read as a mark of its template. Where a template opens
    the reasoning itself and the client wants it as text (``reasoning_format: none``), the answer begins with the
    prompt's last tag; that part is not repeated.

    Args:
        body: The request's body as the client sent it.
    """
    before, text = request.prompt, sent.text
    if request.messages is not None:
        rendered = await query("/apply-template", {k: v for k, v in body.items() if k not in _STREAM_ONLY})
        before = str(rendered.get("prompt", ""))
        text = text[_repeated_tag_chars(before, text) :]
    if isinstance(before, str):
        prompt = await _tokenize(query, before, special=True)
    else:
        prompt = [int(token) for token in before or ()]
    if sent.token_ids and await _decodes_to(query, sent.token_ids, text):
        return ResumePoint(prompt, list(sent.token_ids), "ids")
    return ResumePoint(prompt, await _text_tokens(query, text), "text")


def _repeated_tag_chars(prompt: str, text: str) -> int:
    """Length of an answer's beginning that repeats a tag, and the text after it, from the end of its prompt."""
    if not text.startswith("<"):
        return 0
    tag = text.find(">") + 1
    lengths = range(min(len(prompt), len(text)), tag - 1, -1) if tag else ()
    return next((length for length in lengths if prompt.endswith(text[:length])), 0)


async def _text_tokens(query: Query, text: str) -> list[int]:
    """Tokenise an answer; some tokenizers put a space before every text, but not after a line break."""
    plain = await _tokenize(query, text, special=False)
    if await _decodes_to(query, plain, text):
        return plain
    line_break = await _tokenize(query, _LINE_BREAK, special=False)
    joined = await _tokenize(query, _LINE_BREAK + text, special=False)
    rest = joined[len(line_break) :]
    exact = joined[: len(line_break)] == line_break and await _decodes_to(query, rest, text)
    return rest if exact else plain


async def _decodes_to(query: Query, tokens: Sequence[int], text: str) -> bool:
    """Whether tokens decode to exactly that text; assumed of an engine without ``/detokenize``."""
    try:
        found = await query("/detokenize", {"tokens": list(tokens)})
    except EngineRefusedError as error:
        if error.status == 404:
            return True
        raise
    return found.get("content") == text


async def _tokenize(query: Query, text: str, *, special: bool) -> list[int]:
    found = await query("/tokenize", {"content": text, "add_special": special, "parse_special": special})
    return [int(token) for token in found.get("tokens", ())]


# The request, and the chunks of its answer


def resume_body(body: dict[str, Any], point: ResumePoint, *, max_tokens: int | None) -> dict[str, Any]:
    """
    Rewrite a request as a ``/completion`` request that continues its answer.

    Args:
        max_tokens: Tokens that may follow; ``None``: limited only by the context.
    """
    kept = {name: value for name, value in body.items() if name not in _CHAT_ONLY}
    logprobs = body.get("logprobs")
    if logprobs:
        # A chat has a boolean and a number, a completion the number alone.
        number = body.get("top_logprobs") if logprobs is True else logprobs
        kept["n_probs"] = _DEFAULT_LOGPROBS if number is None else number
    if max_tokens is not None:
        kept["n_predict"] = max_tokens
    prompt = point.prompt + point.answer
    return {**kept, "prompt": prompt, "stream": True, "return_tokens": True, "return_progress": True}


def answer_chunks(chunk: NativeChunk, sent: SentText, request: InferenceRequest, tokens_before: int) -> list[bytes]:
    """
    Convert a chunk of ``/completion`` into chunks of the answer that it continues.

    Args:
        tokens_before: Tokens sent before the answer was resumed.
    """
    common, chat = sent.common, request.messages is not None
    found: list[dict[str, Any]] = []
    if chunk.content:
        text: dict[str, Any] = (
            {"delta": {"content": chunk.content}} if chat else {"text": chunk.content, "logprobs": None}
        )
        if chunk.completion_probabilities is not None:
            text["logprobs"] = {"content": chunk.completion_probabilities}
        found.append({**common, "choices": [{"index": 0, "finish_reason": None, **text}]})
    if chunk.stop:
        generated = tokens_before + chunk.timings.predicted_n if chunk.timings is not None else sent.tokens
        usage = None if sent.prompt_tokens is None else _usage(sent.prompt_tokens, generated)
        reason = "length" if chunk.stop_type == "limit" else "stop"
        found.append(_final_chunk(common, reason, chat=chat, usage=usage))
        if chat and request.include_usage and usage is not None:
            found.append({**common, "choices": [], "usage": usage})
        if chunk.timings is not None:
            found[-1]["timings"] = chunk.timings
    return [msgspec.json.encode(one) for one in found]


def missing_end(sent: SentText, request: InferenceRequest, timings: Timings | None) -> list[bytes]:
    """Return the final chunks of an answer whose text is complete but whose engine failed before sending them."""
    chat, found = request.messages is not None, []
    usage = None if sent.prompt_tokens is None else _usage(sent.prompt_tokens, sent.tokens)
    if not sent.finished:
        sent.finish()
        found.append(_final_chunk(sent.common, "length", chat=chat, usage=usage))
    if chat and request.include_usage and usage is not None and not sent.usage_sent:
        reported = {} if timings is None else {"timings": timings}
        found.append({**sent.common, "choices": [], "usage": usage, **reported})
    return [msgspec.json.encode(one) for one in found]


def _final_chunk(common: dict[str, Any], reason: str, *, chat: bool, usage: dict[str, int] | None) -> dict[str, Any]:
    """Return the chunk with the finish reason; a completion's also has the usage, as llama-server sends it."""
    end: dict[str, Any] = {"delta": {}} if chat else {"text": "", "logprobs": None}
    reported = {} if chat or usage is None else {"usage": usage}
    return {**common, "choices": [{"index": 0, "finish_reason": reason, **end}], **reported}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
