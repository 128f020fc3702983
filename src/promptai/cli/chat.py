"""``promptai chat``: a conversation in the terminal with a gateway or any OpenAI-compatible server.

Every request contains the whole conversation, as with every client of such servers, so the server's prompt cache is
used as in production. Tokens, speed and cache hits are printed below each answer.
"""

import asyncio
import contextlib
import difflib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from promptai.cli.progress import duration
from promptai.cli.terminal_text import one_line, strip_controls
from promptai.engine.client import EngineClient
from promptai.errors import (
    EngineDiedError,
    EngineError,
    EngineRefusedError,
    ModelNotFoundError,
    PromptAIError,
    SettingsError,
)
from promptai.router.selection import AUTO, parse_budget
from promptai.settings import load_secrets
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import CompletionChunk, Usage

_HELP = """\
/new            start a new conversation
/model NAME     continue with another model; without a name, list the models
/quit           leave (also Ctrl-D)
Ctrl-C          stop the answer"""
_URL = "http://127.0.0.1:8400"

#: Called with the kind of a piece (``text`` or ``thought``) and the piece.
OnPiece = Callable[[str, str], None]
#: Called with each status event of a gateway, and with the headers of the response.
OnStatus = Callable[[Mapping[str, Any]], None]


class ChatSession:
    """
    One conversation.

    Attributes:
        model: Model of the next request.
        budget: Time limit for ``auto``; other models ignore it. ``None``: no limit.
    """

    def __init__(self, url: str, model: str, *, system: str | None, budget: str | None, api_key: str | None) -> None:
        self.model = model
        self.budget = budget
        self._url = url
        self._api_key = api_key
        self._headers = {"x-promptai-status": "1"} | ({"x-promptai-budget": budget} if budget else {})
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []

    def restart(self) -> None:
        """Start a new conversation."""
        self._messages = []

    async def ask(self, question: str, on_piece: OnPiece, on_status: OnStatus) -> "AnswerStats":
        """
        Send a question and stream the answer; an interrupted answer stays in the conversation.

        Raises:
            EngineError: The answer is missing or incomplete.
        """
        loop, answer = asyncio.get_running_loop(), ""
        stats = AnswerStats(began=loop.time())
        messages = [*self._messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": [*self._system, *messages]}
        try:
            async with (
                EngineClient(self._url, api_key=self._api_key, headers=self._headers, on_status=on_status) as client,
                contextlib.aclosing(client.stream_chat(body)) as arrivals,
            ):
                async for arrival in arrivals:
                    thought, text = arrival.chunk.thought, arrival.chunk.content
                    if thought:
                        on_piece("thought", thought)
                    if text:
                        on_piece("text", text)
                    answer += text
                    stats.add(arrival.chunk, loop.time(), has_text=bool(thought or text))
        finally:
            if answer:
                self._messages = [*messages, {"role": "assistant", "content": answer}]
        return stats


class AnswerStats(msgspec.Struct):
    """
    Timing and token counts of an answer.

    Attributes:
        began: Time of the request; ``first`` and ``last``: times of the first and last piece with text.
    """

    began: float
    first: float | None = None
    last: float | None = None
    timings: Timings | None = None
    usage: Usage | None = None

    def add(self, chunk: CompletionChunk, now: float, *, has_text: bool) -> None:
        """Add a chunk."""
        if has_text:
            self.first = now if self.first is None else self.first
            self.last = now
        self.timings = chunk.timings or self.timings
        self.usage = chunk.usage or self.usage

    def summary(self, replica: str | None) -> str:
        """Describe the answer in one line."""
        if self.first is None or self.last is None:
            return "no answer"
        parts = []
        counts = self.usage.exact() if self.usage is not None else None
        if counts is not None:  # pieces are not tokens, so they cannot be counted instead
            tokens = counts.completion_tokens
            parts.append(f"{tokens} tokens")
            if tokens > 1 and self.last > self.first:
                parts.append(f"{(tokens - 1) / (self.last - self.first):,.1f} tokens/s")
        parts.append(f"first token after {self.first - self.began:.1f} s")
        cached = self._cached()
        if cached is not None and counts is not None:
            parts.append(f"{cached} of {counts.prompt_tokens} prompt tokens from the cache")
        return ", ".join([*parts, *([f"by {replica}"] if replica else [])])

    def _cached(self) -> int | None:
        if self.timings is not None and self.timings.cache_n is not None:
            return self.timings.cache_n
        return self.usage.cached_tokens if self.usage is not None else None


@click.command(
    epilog="""\b
Examples:
  promptai chat
  promptai chat tinyllama-1.1b --system "Answer in one sentence."
  promptai chat --budget 10s                   the most capable model that answers in time
  echo "What is a base station?" | promptai chat
"""
)
@click.argument("model", required=False)
@click.option("--url", default=_URL, show_default=True, help="URL of the server; PROMPTAI_API_KEY holds its API key.")
@click.option("--system", help="System prompt.")
@click.option("--budget", help="Time limit for a whole answer, e.g. 10s; the best model that meets it answers.")
def chat(*, model: str | None, url: str, system: str | None, budget: str | None) -> None:
    """
    Chat with a gateway or any OpenAI-compatible server.

    In a terminal this is a conversation; /help lists the commands. Piped input is a single question, and only
    its answer is printed.
    """
    if budget is not None:
        try:
            parse_budget(budget)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--budget") from None
        if model not in {None, AUTO}:
            raise SettingsError("--budget chooses the model and cannot be combined with MODEL", hint="use one of them")
    _check_utf8(system)
    key = load_secrets().api_key
    known = asyncio.run(_models(url, key))
    wanted = model or (AUTO if budget and AUTO in known else next(iter(known), ""))
    session = ChatSession(url, _resolve(wanted, known), system=system, budget=budget, api_key=key)
    if sys.stdin.isatty():
        _run_conversation(session, known, url)
    elif question := _piped():
        asyncio.run(session.ask(question, _answer_alone, lambda _: None))
        _print("\n")


def _piped() -> str:
    """Read the question from standard input."""
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"standard input is not UTF-8 (byte {error.start})", hint="convert it with iconv -t utf-8"
        ) from None


def _check_utf8(system: str | None) -> None:
    """Reject a system prompt that is not UTF-8: Python decodes its bytes to lone surrogates, which servers reject."""
    try:
        (system or "").encode()
    except UnicodeEncodeError:
        raise SettingsError("--system is not UTF-8", hint="use a UTF-8 terminal") from None


async def _models(url: str, key: str | None) -> list[str]:
    """List the models of the server; raises ``EngineError`` if it does not answer."""
    async with EngineClient(url, api_key=key) as client:
        try:
            return await client.models()
        except EngineDiedError as error:
            raise EngineDiedError(f"no server answers at {url}", hint="start a gateway with promptai serve") from error
        except EngineRefusedError as error:
            if error.status == 401:
                raise EngineError(f"{url} requires an API key", hint="set PROMPTAI_API_KEY") from None
            raise


def _resolve(name: str, known: list[str]) -> str:
    """Check a model name against the server's list; without a list, the server checks it."""
    if not known or name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    raise ModelNotFoundError(
        f"the server has no model named {name}",
        hint=f"did you mean {close[0]}?" if close else f"known: {', '.join(known[:8])}",
    )


def _run_conversation(session: ChatSession, known: list[str], url: str) -> None:
    """Read questions and print answers until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  gives input() line editing and history
    console = Console(highlight=False, emoji=False)
    console.print(f"[bold]{_name(session.model or 'the server')}[/] at {_name(url)}; /help for help", soft_wrap=True)
    while True:
        try:
            line = input("\n> ").strip()
            line.encode()
        except KeyboardInterrupt:
            continue
        except UnicodeError:
            console.print("the input is not UTF-8; use a UTF-8 terminal")
            continue
        except EOFError:
            console.print()
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(session, line, known, console)
        elif line:
            _turn(session, line, console)


def _command(session: ChatSession, line: str, known: list[str], console: Console) -> None:
    word, _, rest = line.partition(" ")
    if word == "/new":
        session.restart()
        console.print("[dim]new conversation[/]")
    elif word == "/model" and not rest:
        console.print("\n".join(f"{'*' if name == session.model else ' '} {_name(name)}" for name in known))
    elif word == "/model":
        try:
            session.model = _resolve(rest.strip(), known)
            note = f"; the budget applies only to {AUTO}" if session.budget and session.model != AUTO else ""
            console.print(f"[dim]{_name(session.model)}, same conversation{note}[/]")
        except PromptAIError as error:
            console.print(one_line(str(error)), markup=False)
    else:
        console.print(_HELP if word == "/help" else f"unknown command {word}\n{_HELP}", markup=False)


def _turn(session: ChatSession, question: str, console: Console) -> None:
    """Print one answer; a status line shows the progress before it starts."""
    spinner, status_line = console.status("waiting for the server"), _GatewayStatus()
    begun = False

    def on_piece(kind: str, piece: str) -> None:
        nonlocal begun
        if not begun:
            spinner.stop()
            begun = True
        if kind == "thought":
            console.print(f"[dim]{escape(strip_controls(piece))}[/]", end="", soft_wrap=True)
        else:
            _print(piece)

    try:
        with spinner:
            stats = asyncio.run(session.ask(question, on_piece, lambda status: status_line.update(status, spinner)))
        console.print(f"\n[dim]{_name(stats.summary(status_line.replica))}[/]", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n[dim]stopped[/]" if begun else "[dim]stopped before the answer started[/]")
    except EngineError as error:
        if begun:
            console.print()
        console.print(f"[red]{escape(strip_controls(str(error)))}[/]", soft_wrap=True)


class _GatewayStatus:
    """The status that a gateway reports during an answer."""

    def __init__(self) -> None:
        self.replica: str | None = None

    def update(self, status: Mapping[str, Any], line: Status) -> None:
        """Show the stage and record the replica."""
        replica = status.get("replica") or status.get("x-promptai-replica")
        self.replica = str(replica) if replica else self.replica
        text = describe_stage(status)
        if text:
            line.update(_name(text))


def describe_stage(status: Mapping[str, Any]) -> str:
    """Describe the stage of a request: ``2 ahead of you, first token in about 40 s``; empty for other events."""
    stage, place, percent, left = (status.get(name) for name in ("stage", "place", "percent", "left_s"))
    text = {"queued": "waiting", "loading": "loading the model", "prefill": "reading the prompt"}.get(str(stage), "")
    if not text:
        return ""
    parts = [f"{place} ahead of you" if stage == "queued" and place else text]
    if isinstance(percent, int | float):
        parts[0] += f" {percent:.0f} %"
    if isinstance(left, int | float) and left >= 1:
        parts.append(f"first token in about {duration(left)}")
    return ", ".join(parts)


def _answer_alone(kind: str, piece: str) -> None:
    if kind == "text":
        _print(piece)


def _print(text: str) -> None:
    sys.stdout.write(strip_controls(text))
    sys.stdout.flush()


def _name(text: str) -> str:
    """Escape a line that contains a foreign name, for rich markup."""
    return escape(one_line(text))
