"""Write docs/cli.md, the reference of every command, from the commands themselves.

    python docs/cli_reference.py          write it
    python docs/cli_reference.py --check  exit 1 when it is stale

The text is made from what `--help` is made from, and depends on nothing else: no terminal,
no colour, no folder of this machine, and not on how the installed Typer lays help out.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"
PROGRAM = "nightpress"
HEAD = f"""# Commands of {PROGRAM}

<!-- Written by `python docs/cli_reference.py` (`make docs`) from the commands' own help. Do not edit. -->
"""

#: a command or a group, as (full name, Typer's object, its context)
Entry = tuple[str, Any, Any]


def commands() -> list[Entry]:
    """Return every visible command and group, depth first, in the order the help shows them."""
    os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="100", TERMINAL_WIDTH="100")
    sys.path.insert(0, str(ROOT))
    import typer.main

    from daemon.cli import app

    def walk(name: str, command: Any, parent: Any) -> Iterator[Entry]:
        context = command.make_context(name.rpartition(" ")[2], [], parent=parent, resilient_parsing=True)
        yield name, command, context
        for child, inner in _children(command, context):
            yield from walk(f"{name} {child}", inner, context)

    return list(walk(PROGRAM, typer.main.get_command(app), None))


def section(entry: Entry) -> str:
    """Return the Markdown of one command: usage, what it does, its arguments, options and commands."""
    name, command, context = entry
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params
               if param.param_type_name == "option" and not param.hidden and param.name != "help"]
    children = _children(command, context)
    usage = " ".join([name, "[OPTIONS]", *map(_argument, arguments),
                      *(["COMMAND [ARGS]..."] if children else [])])
    parts = [f"{'#' * min(1 + len(name.split()), 4)} {name}", f"```\n{usage}\n```"]
    if command.deprecated:
        parts.append("Deprecated.")
    if command.help:
        parts.append(_plain(command.help))
    if arguments:
        parts.append(_table("Argument", [(f"`{_argument(param)}`", _help(param)) for param in arguments]))
    if options:
        parts.append(_table("Option", [(f"`{_option(param)}`", _help(param)) for param in options]))
    if children:
        parts.append(_table("Command", [
            (f"[`{name} {child}`](#{f'{name} {child}'.replace(' ', '-')})", _first_line(inner.help))
            for child, inner in children]))
    return "\n\n".join(parts) + "\n"


def page() -> str:
    """Return the whole of docs/cli.md."""
    return "\n".join([HEAD, *map(section, commands()), exit_codes()])


def exit_codes() -> str:
    """Return the table of exit codes, from the errors' own docstrings."""
    import importlib
    import pkgutil

    from state.faults import NightpressError

    for name in ("daemon", "loops", "state"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)

    def below(kind: type[NightpressError]) -> Iterator[type[NightpressError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    known = {0: "Done.", 2: "The command was called with wrong arguments.",
             4: "`nightpress check` found something wrong.",
             **{kind.exit_code: _first_line(kind.__doc__) for kind in below(NightpressError)
                if "exit_code" in vars(kind)}}
    rows = [(str(code), known[code]) for code in sorted(known)]
    return "## Exit codes\n\n" + _table("Code", rows) + "\n"


def _children(command: Any, context: Any) -> list[tuple[str, Any]]:
    """The visible commands of a group, none for a command."""
    names = command.list_commands(context) if hasattr(command, "list_commands") else []
    found = [(name, command.get_command(context, name)) for name in names]
    return [(name, inner) for name, inner in found if not inner.hidden]


def _argument(param: Any) -> str:
    """MODEL, [MODEL] when it may be left out, MODEL... when it may be repeated."""
    name = (param.metavar or param.name.upper()) + ("..." if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _option(param: Any) -> str:
    """The flags of an option, and the name of its value unless it is a switch."""
    flags = ", ".join(param.opts)
    if param.is_flag or param.count:
        return f"{flags} / {', '.join(param.secondary_opts)}" if param.secondary_opts else flags
    value = param.metavar or "|".join(_choices(param)) or param.name.upper()
    return f"{flags} {value}" + ("..." if param.multiple else "")


def _choices(param: Any) -> list[str]:
    """The values that an enum or a literal offers, kept in different places by Typer's versions."""
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices: Any = kind
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
    else:
        choices = getattr(getattr(param, "type", None), "choices", ())
    return [str(getattr(choice, "value", choice)) for choice in choices]


def _help(param: Any) -> str:
    """What a parameter is for, and its default where it has one that says something."""
    text = _plain(param.help or "")
    shown, default = param.show_default, param.default
    if isinstance(shown, str):
        text += f" (default: {shown})"
    elif (shown is not False and default is not False and not getattr(param, "count", False)
          and isinstance(default, (str, int, float, Path, Enum))):
        value = getattr(default, "value", default)
        text += f" (default: {param.opts[0] if value is True else value})"
    return text


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {title} | |", "|---|---|",
                      *(f"| {_cell(left)} | {_cell(right)} |" for left, right in rows)])


def _first_line(text: str | None) -> str:
    return _plain(text or "").partition("\n\n")[0]


def _plain(text: str) -> str:
    """Help as Markdown: no indent, no Click marks, each paragraph on lines of its own."""
    text = inspect.cleandoc(text).replace("\f", "").replace("\b\n", "")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _cell(text: str) -> str:
    """Text that fits into a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the commands' own help.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    args = parser.parse_args(argv)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/cli.md is stale: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
