"""``promptai chat``: a conversation in the terminal, with a gateway or any OpenAI-compatible server.

Every question goes with the whole conversation before it, as every client of such servers does, so
that the server's cache is used as it will be in earnest. What the answer cost stands below it.
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
/new            begin a new conversation
/model NAME     go on with another model; without a name, list them
/quit           leave, as Ctrl-D does
Ctrl-C          stop the answer"""
_URL = "http://127.0.0.1:8400"


OnPiece = Callable[[str, str], None]
OnStatus = Callable[[Mapping[str, Any]], None]


class ChatSession:
    """
    One conversation.

    Attributes:
        model: Who is asked.
        budget: What ``auto`` keeps to, and nobody else.
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
        """Forget what was said."""
        self._messages = []

    async def ask(self, question: str, on_piece: OnPiece, beside: OnStatus) -> "AnswerStats":
        """
        Ask; the answer is told piece by piece, and kept, also when it is stopped.

        Args:
            hear: Told the kind of each piece, ``text`` or ``thought``, and the piece.
            beside: As of ``EngineClient``.

        Raises:
            EngineError: There is no answer, or no end of it.
        """
        loop, answer = asyncio.get_running_loop(), ""
        cost = AnswerStats(began=loop.time())
        asked = [*self._messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": [*self._system, *asked]}
        try:
            async with (
                EngineClient(self._url, api_key=self._api_key, headers=self._headers, on_status=beside) as client,
                contextlib.aclosing(client.stream_chat(body)) as arrivals,
            ):
                async for arrival in arrivals:
                    thought, text = arrival.chunk.thought, arrival.chunk.content
                    if thought:
                        on_piece("thought", thought)
                    if text:
                        on_piece("text", text)
                    answer += text
                    cost.add(arrival.chunk, loop.time(), has_text=bool(thought or text))
        finally:
            if answer:
                self._messages = [*asked, {"role": "assistant", "content": answer}]
        return cost


class AnswerStats(msgspec.Struct):
    """
    What an answer took.

    Attributes:
        began: When it was asked for; ``first`` and ``last``: when pieces of it came.
    """

    began: float
    first: float | None = None
    last: float | None = None
    timings: Timings | None = None
    usage: Usage | None = None

    def add(self, chunk: CompletionChunk, now: float, *, has_text: bool) -> None:
        """Another chunk has come."""
        if has_text:
            self.first = now if self.first is None else self.first
            self.last = now
        self.timings = chunk.timings or self.timings
        self.usage = chunk.usage or self.usage

    def words(self, replica: str | None) -> str:
        """One line."""
        if self.first is None or self.last is None:
            return "no answer"
        parts = []
        counts = self.usage.exact() if self.usage is not None else None
        if counts is not None:  # a piece is no token, so that nothing else tells how many there were
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
@click.option("--url", default=_URL, show_default=True, help="The server; its key in PROMPTAI_API_KEY.")
@click.option("--system", help="What the model is told before everything else.")
@click.option("--budget", help="Seconds for a whole answer, e.g. 10s; the best model that keeps to it is asked.")
def chat(*, model: str | None, url: str, system: str | None, budget: str | None) -> None:
    """
    Talk to a gateway or any OpenAI-compatible server.

    In a terminal it is a conversation; /help says what else can be typed. Something piped in is one
    question, and nothing but its answer is printed.
    """
    if budget is not None:
        try:
            parse_budget(budget)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--budget") from None
        if model not in {None, AUTO}:
            raise SettingsError(
                "--budget chooses the model, so that it cannot stand beside a MODEL", hint="leave one of them out"
            )
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
    """The question that was piped in."""
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"what is piped in is not UTF-8 from byte {error.start} on", hint="iconv -t utf-8 converts it"
        ) from None


def _check_utf8(system: str | None) -> None:
    """Bytes that are no UTF-8 stand in a text of the command line as halves of characters, which no server takes."""
    try:
        (system or "").encode()
    except UnicodeEncodeError:
        raise SettingsError("--system is not UTF-8", hint="set the terminal to it") from None


async def _models(url: str, key: str | None) -> list[str]:
    """What the server serves; raises where there is none."""
    async with EngineClient(url, api_key=key) as client:
        try:
            return await client.models()
        except EngineDiedError as error:
            raise EngineDiedError(f"nobody answers at {url}", hint="promptai serve starts a gateway") from error
        except EngineRefusedError as error:
            if error.status == 401:
                raise EngineError(f"{url} wants an API key", hint="set PROMPTAI_API_KEY to one") from None
            raise


def _resolve(name: str, known: list[str]) -> str:
    """A name that the server lists; one that lists none is left to say so itself."""
    if not known or name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    raise ModelNotFoundError(
        f"no model is called {name} there",
        hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(known[:8])}",
    )


def _run_conversation(session: ChatSession, known: list[str], url: str) -> None:
    """Question and answer in turns, until somebody has had enough."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  input() edits lines and remembers them once it is there
    console = Console(highlight=False, emoji=False)
    console.print(f"[bold]{_name(session.model or 'the server')}[/] at {_name(url)}; /help for help", soft_wrap=True)
    while True:
        try:
            line = input("\n> ").strip()
            line.encode()
        except KeyboardInterrupt:
            continue
        except UnicodeError:
            console.print("that is not UTF-8; set the terminal to it")
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
        console.print("[dim]a new conversation[/]")
    elif word == "/model" and not rest:
        console.print("\n".join(f"{'*' if name == session.model else ' '} {_name(name)}" for name in known))
    elif word == "/model":
        try:
            session.model = _resolve(rest.strip(), known)
            freely = f"; the budget only counts for {AUTO}" if session.budget and session.model != AUTO else ""
            console.print(f"[dim]{_name(session.model)}, in the same conversation{freely}[/]")
        except PromptAIError as error:
            console.print(one_line(str(error)), markup=False)
    else:
        console.print(_HELP if word == "/help" else f"there is no {word}\n{_HELP}", markup=False)


def _turn(session: ChatSession, question: str, console: Console) -> None:
    """One answer, with what happens before it in a line that goes away."""
    waiting, told = console.status("asking"), _GatewayStatus()
    begun = False

    def on_piece(kind: str, piece: str) -> None:
        nonlocal begun
        if not begun:
            waiting.stop()
            begun = True
        if kind == "thought":
            console.print(f"[dim]{escape(strip_controls(piece))}[/]", end="", soft_wrap=True)
        else:
            _print(piece)

    try:
        with waiting:
            cost = asyncio.run(session.ask(question, on_piece, lambda status: told.take(status, waiting)))
        console.print(f"\n[dim]{_name(cost.words(told.replica))}[/]", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n[dim]stopped[/]" if begun else "[dim]stopped before it began[/]")
    except EngineError as error:
        if begun:
            console.print()
        console.print(f"[red]{escape(strip_controls(str(error)))}[/]", soft_wrap=True)


class _GatewayStatus:
    """What a gateway says beside its answers."""

    def __init__(self) -> None:
        self.replica: str | None = None

    def take(self, status: Mapping[str, Any], line: Status) -> None:
        """Show the stage, remember the replica."""
        replica = status.get("replica") or status.get("x-promptai-replica")
        self.replica = str(replica) if replica else self.replica
        words = describe_stage(status)
        if words:
            line.update(_name(words))


def describe_stage(status: Mapping[str, Any]) -> str:
    """Where a request is, for a person: ``2 before you, about 40 s left``."""
    stage, place, percent, left = (status.get(name) for name in ("stage", "place", "percent", "left_s"))
    words = {"queued": "waiting", "loading": "loading the model", "prefill": "reading the prompt"}.get(str(stage), "")
    if not words:
        return ""
    parts = [f"{place} before you" if stage == "queued" and place else words]
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
    """A name from outside, or a line with one in it, between marks of ours."""
    return escape(one_line(text))
