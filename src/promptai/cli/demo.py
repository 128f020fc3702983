"""``promptai demo``: measure the bundled model on the bundled workload."""

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
  promptai demo        and open the report at the printed path
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo(*, as_json: bool) -> None:
    """
    Measure the bundled model on this machine, without network, download or compiler.

    Starts the engine, plays ten of the bundled conversations cold and warm,
    records the machine's load, prints a table and writes a report.
    """
    console = Console(stderr=as_json)
    # The demo is the same everywhere; of the user's settings, only those of the engine and the directories apply.
    settings = msgspec.structs.replace(load_settings(), bench=BenchSettings())
    options = msgspec.structs.replace(default_options(settings), conversations=_CONVERSATIONS)
    start(options, OutputOptions(console, as_json, write_report=True))
    console.print(
        "\nnext:    promptai bench YOUR-MODEL.gguf     measure your own model with the paper's protocol\n"
        "         promptai bench http://HOST:8080    measure a server that is already running\n"
        "         promptai doctor --selftest         check the accuracy of these measurements",
        highlight=False,
    )
