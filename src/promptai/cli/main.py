"""``promptai``: the command line.

Each command is a module of its own and is imported only when it runs. A ``PromptAIError`` becomes one line on stderr
and an exit code (``promptai.errors``); any other exception is a bug and keeps its traceback.
"""

import os
import sys

import click

from promptai import __version__
from promptai.cli.lazy import LazyGroup
from promptai.cli.terminal_text import one_line
from promptai.errors import PromptAIError

_INTERRUPTED = 130

#: Command -> location and line of help.
_COMMANDS = {
    "demo": ("promptai.cli.demo:demo", "Measure the bundled model on this machine; no download, one minute."),
    "bench": ("promptai.cli.bench:bench", "Measure models or servers and write a report."),
    "report": ("promptai.cli.report:report", "Write the report of a run again, without measuring."),
    "engine": ("promptai.cli.engine:engine", "List, build, compare, choose and simulate engines."),
    "models": ("promptai.cli.models:models", "Find, download, check, quantise and synthesise model files."),
    "keys": ("promptai.cli.keys:keys", "Add, list and revoke API keys of the gateway."),
    "serve": ("promptai.cli.serve:serve", "Serve models over an OpenAI-compatible API, on one board or several."),
    "chat": ("promptai.cli.chat:chat", "Chat with a gateway or any OpenAI-compatible server."),
    "doctor": ("promptai.cli.doctor:doctor", "Check this machine; --selftest checks the measurement."),
}


@click.group(
    cls=LazyGroup,
    verbs=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: promptai demo",
)
@click.version_option(__version__, prog_name="promptai")
def cli() -> None:
    """Measure, advise and serve generative AI on CPU-only boards."""


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        code = cli(standalone_mode=False)
    except PromptAIError as error:
        _print_error(f"promptai: error: {error}")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _print_error("promptai: interrupted")
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe; Python must not flush stdout into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports it
    sys.exit(code if isinstance(code, int) else 0)


def _print_error(line: str) -> None:
    """Print one line, without escapes and line feeds that a server or a file name may contain."""
    click.echo(one_line(" ".join(line.split())), err=True)
