"""`nightpress merge`: adapters into the full-precision base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.convert import Pickle, print_stages
from daemon.cli.options import AsJson, StateDir, print_json


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("merge")(merge)


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of LoRA adapters.")],
    base: Annotated[Path, typer.Option(
        metavar="DIR", help="The model that they were trained on, in BF16, F16 or F32; a folder or a pulled id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    weights: Annotated[str | None, typer.Option(
        metavar="W,W...", show_default=False,
        help="How much each adapter counts, such as 0.7,0.3; they need not add up to 1. Default: 1 for a single "
             "adapter, equal shares for several.")] = None,
    any_base: Annotated[bool, typer.Option(
        "--any-base", help="Accept an adapter that names another base.")] = False,
    allow_pickle: Pickle = False,
    no_parity: Annotated[bool, typer.Option(
        "--no-parity", help="Do not compare the merged model with base and adapter.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what was merged there before.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Merge LoRA adapters into the full-precision model, and make sure that it says what they say together.

    Computed tensor by tensor in 32 bits and rounded once, to the base's own type. A base that is stored in 4 bits is
    refused: what was trained would be lost. Then both read a fixed text, token by token; where they differ, nothing is
    written. Ctrl-C stops; the same command goes on where it was.
    """
    from daemon.cli.display import Stages
    from daemon.cli.tables import console, megabytes
    from daemon.merging import MergeSpec, as_json, shares
    from daemon.merging import merge as make
    from daemon.settings import Settings
    from daemon.training import find_model
    from daemon.workers import grip_of_signals

    settings = Settings.load(state_dir=state_dir)
    try:
        given = None if weights is None else [float(part) for part in weights.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{weights!r} is no list of numbers, such as 0.7,0.3.",
                                 param_hint="--weights") from None
    counted = shares(given, len(adapters))
    errors = console(stderr=True)
    if given is None and len(adapters) > 1:
        errors.print(f"Each of the {len(adapters)} adapters counts {counted[0]:.3g}; --weights says otherwise.",
                     markup=False)
    folders = [path.expanduser().absolute() for path in adapters]
    spec = MergeSpec(find_model(str(base), settings), tuple(zip(folders, counted, strict=True)),
                     output.expanduser().absolute(), allow_pickle, any_base, not no_parity, force)
    with Stages(errors) as stages, grip_of_signals() as grip:
        done = make(spec, settings, grip, stages.show)
    if json:
        print_json(as_json(done))
        return
    print_stages(done.stages, done.notes)
    typer.echo(f"{'Was merged before' if done.again else 'Merged'}: {done.folder}, {megabytes(done.n_bytes)}, "
               f"{done.tensors} tensors changed.")
