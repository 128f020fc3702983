"""Generate the reference pages from the code, or check that they are current.

``python docs/generate.py`` writes docs/reference/*.md; ``--check`` writes nothing and fails when a page is out of
date. A hand-written reference is wrong within a month.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from promptai import settings
from promptai.bench import glossary
from promptai.cli.main import cli
from promptai.errors import PromptAIError

REFERENCE = Path(__file__).parent / "reference"


def cli_page() -> str:
    """Every command's help."""
    parts = ["# Command line\n\nGenerated from the code by `make docs`.\n"]
    root = click.Context(cli, info_name="promptai", max_content_width=100, terminal_width=100)
    parts.append(_help("promptai", cli, root))
    parts += _commands("promptai", cli, root)
    parts.append(_exit_codes())
    return "\n".join(parts)


def _commands(prefix: str, group: click.Group, parent: click.Context) -> Iterator[str]:
    """The help of every command below a group, depth first."""
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None:
            continue
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        yield _help(f"{prefix} {name}", command, context)
        if isinstance(command, click.Group):
            yield from _commands(f"{prefix} {name}", command, context)


def settings_page() -> str:
    """Every key of promptai.toml, with its default and its documentation."""
    parts = ["# Settings: promptai.toml\n\nGenerated from the code by `make docs`. Every section is optional.\n"]
    parts.append("| section | key | type | default | meaning |\n|---|---|---|---|---|")
    sections = {"fleet": "[[fleet]]", "serve": "[[serve]]", "aliases": "[aliases.NAME]"}
    structs: dict[str, type[msgspec.Struct]] = {"(top)": settings.Settings}
    structs |= {sections.get(name, f"[{name}]"): struct for name, struct in settings.SECTIONS.items()}
    for title, struct in structs.items():
        meanings = _attributes(struct)
        for field in msgspec.structs.fields(struct):
            if title == "(top)" and field.encode_name in settings.SECTIONS:
                continue
            kind = str(field.type) if hasattr(field.type, "__args__") else getattr(field.type, "__name__", "")
            kind = kind.replace("typing.", "").replace("|", "or")
            default = _default(field)
            parts.append(f"| {title} | `{field.encode_name}` | {kind} | {default} | {meanings[field.encode_name]} |")
    parts.append(
        "\nEnvironment: `PROMPTAI_CONFIG` names the file, `PROMPTAI_ENGINE` a llama-server, `PROMPTAI_RUNS` the "
        "directory of runs, `PROMPTAI_MODELS` that of models, `PROMPTAI_API_KEY` the key of a server that requires "
        "one, `PROMPTAI_KEYS` the file with the gateway's own keys. Options override the environment, which overrides "
        "the file. Unknown keys are refused.\n"
    )
    return "\n".join(parts)


def summary_page() -> str:
    """Every metric of summary.json."""
    head = (
        "# summary.json\n\nGenerated from the code by `make docs`. `schema` is 1. "
        "Each of `targets[]` has `load_s`, `findings[]` and, per cache setting, `cold` and `warm`: "
        "`planned`, `answered`, `failed`, `metrics` and `buckets` (the same rates by prompt length). "
        "Each metric is `{value, unit, n, ci95}`: `value` is null when it could not be measured, `n` is the number of "
        "values behind it, `ci95` a 95 % interval over conversations, null with fewer than five of them.\n"
    )
    parts = [head, "| metric | meaning |\n|---|---|"]
    parts += [f"| `{name}` | {words} |" for name, words in glossary.METRICS.items()]
    return "\n".join(parts) + "\n"


PAGES = {"cli.md": cli_page, "settings.md": settings_page, "summary.md": summary_page}


def main() -> int:
    """Write or check all pages; return 1 when one is out of date."""
    behind = []
    REFERENCE.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            behind.append(str(path.relative_to(Path.cwd())))
    if behind:
        print(f"out of date: {', '.join(behind)}; run: make docs", file=sys.stderr)
    return int(bool(behind))


def _help(title: str, command: click.Command, context: click.Context) -> str:
    return f"## {title}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


def _exit_codes() -> str:
    rows = ["## Exit codes\n\n| code | error | when |\n|---|---|---|", "| 0 | | it worked |"]
    errors: list[type[PromptAIError]] = [PromptAIError, *PromptAIError.__subclasses__()]
    for error in errors:
        first = (inspect.getdoc(error) or "").splitlines()[0]
        rows.append(f"| {error.exit_code} | {error.__name__} | {first} |")
    rows.append("| 130 | | interrupted with Ctrl-C |")
    return "\n".join(rows) + "\n"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "must be given"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "absent" if value is None or value in ({}, ()) else f"`{value!r}`"


def _attributes(struct: type) -> dict[str, str]:
    """Name -> text of the ``Attributes:`` section of a docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(struct) or "").partition("Attributes:\n")[2].splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


if __name__ == "__main__":
    sys.exit(main())
