"""`nightpress recipe show|export`: which type each matrix of a quantized model has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.options import AsJson, StateDir, print_json

Source = Annotated[str, typer.Argument(metavar="FILE|RUN", help="A quantized GGUF, or the number of a run.")]
Level = Annotated[str | None, typer.Argument(
    help="Of the run, such as RECIPE-4.312. Default: the one it chose.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                        help="Show or export which type each matrix of a quantized model has.")
    group.command("show")(show)
    group.command("export")(export)
    app.add_typer(group, name="recipe")


def show(
    source: Source,
    level: Level = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every matrix.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Print the types by kind of matrix, with the layers that have them."""
    from daemon.cli.tables import console, plain_table

    name, types = _types(source, level, state_dir)
    if json:
        print_json({"source": name, "types": types,
                    "by_kind": [{"matrix": kind, "type": ggml_type, "layers": layers}
                                for kind, ggml_type, layers in _by_kind(types)]})
        return
    out = console()
    out.print(name, markup=False)
    if tensors:
        out.print(plain_table([("tensor", "left"), ("type", "left")], list(types.items())))
        return
    out.print(plain_table([("matrix", "left"), ("type", "left"), ("layers", "left")],
                          _by_kind(types)))


def export(
    source: Source,
    level: Level = None,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Where to write. Default: standard output.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Write the types in the form that `llama-quantize --tensor-type-file` reads."""
    from daemon.cli.calibration import write_text
    from loops.engine.quantize import tensor_type_file

    _, types = _types(source, level, state_dir)
    text = tensor_type_file(types)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_text(output, text, force=force)
    typer.echo(f"Wrote the types of {len(types)} matrices to {output}.")


def _types(source: str, level: str | None, state_dir: Path | None) -> tuple[str, dict[str, str]]:
    """Return a name and the type of every quantized matrix.

    Raises:
        UnknownRun, UnknownLevel: the run or the level is not there.
        NightpressError: the file is none that can be read.
        NoRecipe: there is nothing quantized in it.
    """
    from daemon.errors import NoRecipe, UnknownLevel
    from daemon.settings import Settings
    from loops.engine.gguf_check import check_model
    from loops.engine.levels import UNQUANTIZED
    from state.ledger import Ledger

    if source.isdecimal() and not Path(source).exists():
        with Ledger.read(Settings.load(state_dir=state_dir).state_dir) as ledger:
            run = ledger.run(int(source))
            wanted = (level or run["chosen_level"] or "").upper()
            rows = {row["level"]: row for row in ledger.candidates(run["id"])}
        if wanted not in rows:
            raise UnknownLevel(f"Run {source} has no level {wanted or 'that it chose'}; it has "
                               f"{', '.join(rows) or 'none'}.")
        name, types = f"Run {source}, {wanted}", dict(rows[wanted]["tensor_types"])
    else:
        model = check_model(Path(source).expanduser())
        name, types = model.path.name, {tensor.name: tensor.ggml_type for tensor in model.tensors}
    found = {tensor: ggml_type for tensor, ggml_type in types.items() if ggml_type not in UNQUANTIZED}
    if not found:
        raise NoRecipe(f"{name} holds nothing that is quantized.")
    return name, found


def _by_kind(types: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return per kind of matrix and type the layers that have it, as `0-3, 7`."""
    import re

    found: dict[str, dict[str, list[int]]] = {}
    for tensor, ggml_type in types.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", tensor)
        kind = match[2] if match else tensor.removesuffix(".weight")
        found.setdefault(kind, {}).setdefault(ggml_type, []).extend([int(match[1])] if match else [])
    return [(kind, ggml_type, _ranges(sorted(layers))) for kind, by_type in sorted(found.items())
            for ggml_type, layers in sorted(by_type.items(), key=lambda item: item[1])]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
