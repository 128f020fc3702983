from io import StringIO

from msgspec.structs import replace
from rich.console import Console

from promptai.cli.doctor import _machine_table
from promptai.device.memory import read_memory
from promptai.engine.locate import EngineBinary
from support_runs import CPU, MACHINE


def test_shows_markup_in_machine_names_literally() -> None:
    """A board's name comes from its firmware and an engine's from its path: square brackets in them are not markup."""
    machine = replace(MACHINE, board="Board [/b]", cpu=replace(CPU, model_name="CPU [red]x[", governor="[bold]"))
    engine = EngineBinary("/opt/e[avx2]/llama-server", ("llama-server",), "b1 [abc]", ("[x]",))
    out = StringIO()

    Console(file=out, width=200).print(_machine_table(machine, read_memory(), [engine], "[pmic]"))

    words = ("Board [/b]", "CPU [red]x[,", "[bold]", "/opt/e[avx2]/llama-server", "[abc]", "[x]", "[pmic]")
    assert [word for word in words if word not in out.getvalue()] == []
