"""``promptai``: the composition root.

Each verb lives in a module of its own and is imported when it is asked for:
``promptai --help`` must answer at once on a board, and NumPy alone takes longer
than that. Errors of ours become one line on stderr and an exit code
(``promptai.errors``); anything else is a bug and keeps its traceback.
"""

import importlib
import os
import sys

import click

from promptai import __version__
from promptai.errors import PromptAIError

_INTERRUPTED = 130

#: Verb -> where it is, and its line in the help.
_VERBS = {
    "demo": ("promptai.cli.demo:demo", "Measure the bundled model on this machine: no download, one minute."),
    "bench": ("promptai.cli.bench:bench", "Measure models or servers and write a report."),
    "report": ("promptai.cli.report:report", "Write the report of a run again; measures nothing."),
    "engine": ("promptai.cli.engine:engine", "Engines: list them, or simulate one."),
    "models": ("promptai.cli.models:models", "Model files: inspect one, or write a synthetic one."),
    "doctor": ("promptai.cli.doctor:doctor", "Check this machine; --selftest measures the measuring."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which a newcomer meets them."""
        del ctx
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        del ctx
        if cmd_name not in _VERBS:
            return None
        module, attribute = _VERBS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)  # noqa: S101  our own table
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands, without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _VERBS.items()])


@click.command(
    cls=LazyGroup,
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
