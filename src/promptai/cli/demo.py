"""``promptai demo``: the main job on what comes with the package."""

import click
import msgspec
from rich.console import Console

from promptai.cli.bench import default_options, start
from promptai.cli.measure import OutputOptions
from promptai.settings import BenchSettings, load_settings

_CONVERSATIONS = 10


@click.command(
    epilog="""\b
Example:
  promptai demo        then open the report that it names
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo(*, as_json: bool) -> None:
    """
    Measure the bundled model on this machine, without network, download or compiler.

    Starts the engine, plays ten of the bundled conversations cold and warm,
    watches the machine meanwhile, prints a table and writes a report.
    """
    console = Console(stderr=as_json)
    # The demo is the same everywhere; of the user's settings, only those of the engine and the directories apply.
    settings = msgspec.structs.replace(load_settings(), bench=BenchSettings())
    options = msgspec.structs.replace(default_options(settings), conversations=_CONVERSATIONS)
    start(options, OutputOptions(console, as_json, write_report=True))
    console.print(
        "\nnext:    promptai bench YOUR-MODEL.gguf     measure a model of your own, by the paper's protocol\n"
        "         promptai bench http://HOST:8080    measure a server that is already running\n"
        "         promptai doctor --selftest         see how exact these measurements are here",
        highlight=False,
    )
