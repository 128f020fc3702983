"""``promptai``: the composition root.

Each verb lives in a module of its own and is imported when it is asked for.
Errors of ours become one line on stderr and an exit code (``promptai.errors``);
anything else is a bug and keeps its traceback.
"""

import os
import sys

import click

from promptai import __version__
from promptai.cli.lazy import LazyGroup
from promptai.errors import PromptAIError

_INTERRUPTED = 130

#: Verb -> where it is, and its line in the help.
_VERBS = {
    "demo": ("promptai.cli.demo:demo", "Measure the bundled model on this machine: no download, one minute."),
    "bench": ("promptai.cli.bench:bench", "Measure models or servers and write a report."),
    "report": ("promptai.cli.report:report", "Write the report of a run again; measures nothing."),
    "engine": ("promptai.cli.engine:engine", "Engines: list, build, compare, choose or simulate them."),
    "models": ("promptai.cli.models:models", "Model files: find, fetch, check, quantise and imitate them."),
    "keys": ("promptai.cli.keys:keys", "API keys of the gateway: add, list, revoke."),
    "serve": ("promptai.cli.serve:serve", "Serve models over an OpenAI-compatible API, on one board or several."),
    "chat": ("promptai.cli.chat:chat", "Talk to a gateway or any OpenAI-compatible server."),
    "doctor": ("promptai.cli.doctor:doctor", "Check this machine; --selftest measures the measuring."),
}


@click.group(
    cls=LazyGroup,
    verbs=_VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: promptai demo",
)
@click.version_option(__version__, prog_name="promptai")
def cli() -> None:
    """Measure, advise and serve generative AI on CPU-only boards."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = cli(standalone_mode=False)
    except PromptAIError as error:
        _say(f"promptai: error: {error}")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _say("promptai: interrupted")
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has gone; stdout must not be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports it
    sys.exit(code if isinstance(code, int) else 0)


def _say(line: str) -> None:
    """One line; what a server or a file name smuggles in (escapes, line feeds) does not reach the terminal."""
    click.echo("".join(c if c.isprintable() else "?" for c in " ".join(line.split())), err=True)
