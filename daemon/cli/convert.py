"""`nightpress pull` and `nightpress convert`: from a hub, and from a Hugging Face folder to a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.cli.options import AsJson, StateDir, print_json

Pickle = Annotated[bool, typer.Option(
    "--allow-pickle", help="Accept weights that are there only as pickles (.bin, .pt); tensors alone are read.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("pull")(pull)
    app.command("convert")(convert)


def pull(
    model: Annotated[str, typer.Argument(metavar="HUB_ID", help="Such as OWNER/NAME.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Folder for the files. Default: models/OWNER/NAME in the state folder.",
        show_default=False)] = None,
    include: Annotated[list[str] | None, typer.Option(
        metavar="PATTERN", show_default=False,
        help="Download what matches, such as '*Q8_0.gguf'; repeat for more. Default: what a conversion needs.")] = None,
    allow_pickle: Pickle = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Download a model from a hub, every file checked by its hash.

    Interrupted, the same command goes on where it was; what is there already is not downloaded again. HF_TOKEN and
    HF_ENDPOINT are read as by Hugging Face's own tools.
    """
    from daemon.cli.display import Stages
    from daemon.cli.tables import console, megabytes
    from daemon.pulling import PullSpec, endpoint, models_folder, token
    from daemon.pulling import pull as download
    from daemon.settings import Settings

    settings = Settings.load(state_dir=state_dir)
    folder = (output.expanduser() if output else models_folder(settings.state_dir, model)).absolute()
    with Stages(console(stderr=True)) as stages:
        found = download(PullSpec(model, folder, revision, tuple(include or ()), allow_pickle, endpoint(), token()),
                         stages.show)
    if json:
        print_json({"folder": str(found.folder), "commit": found.commit, "files": list(found.files),
                    "bytes": found.n_bytes, "reused": found.reused})
        return
    there = f", {found.reused} of them there already" if found.reused else ""
    typer.echo(f"{found.folder}: {len(found.files)} files{there}, {megabytes(found.n_bytes)}, commit "
               f"{found.commit[:12]}.")


def convert(
    source: Annotated[Path, typer.Argument(
        metavar="DIR", help="Folder of a Hugging Face model or of a LoRA adapter, the id of a model that was pulled, "
                            "or a file of llama.cpp's formats before GGUF.")],
    outtype: Annotated[str, typer.Option(
        metavar="f16|bf16|f32|auto", help="Type of the weights; auto keeps 16 bits as they are.")] = "auto",
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="File to write. Default: NAME-TYPE.gguf in this folder.", show_default=False)] = None,
    base: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default=False,
        help="For an adapter, the model that it belongs to; with --adapter, the one that was merged into.")] = None,
    adapter: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default=False,
        help="The adapter that was merged: base and adapter are compared with the merged model too.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default=False,
        help="A llama.cpp whose converter to use. Default: that of the engine's own release, fetched once.")] = None,
    allow_pickle: Pickle = False,
    no_parity: Annotated[bool, typer.Option(
        "--no-parity", help="Do not compare the GGUF with the original.")] = False,
    gqa: Annotated[int | None, typer.Option(
        min=1, help="Of a file before GGUF: query heads per key-value head.", show_default=False)] = None,
    eps: Annotated[float | None, typer.Option(
        help="Of a file before GGUF: epsilon of its norms.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(
        min=1, help="Of a file before GGUF: tokens of context it was trained for.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    threads: Annotated[int | None, typer.Option(
        min=1, help="Threads of the engine. Default: one per processor.", show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Convert a Hugging Face model, or a LoRA adapter, to GGUF, and make sure that it still says the same.

    llama.cpp's own converter does it, of the very version of the engine. Then both forms read a fixed text: tokens,
    special tokens and chat template must be identical, and the logits of every token equal within bounds; else
    nothing is written. No code that lies in the folder runs. Ctrl-C stops; the same command goes on where it was.
    """
    from loops.finetune.converter import OUTTYPES

    if outtype not in OUTTYPES:
        raise typer.BadParameter(f"--outtype is one of {', '.join(OUTTYPES)}.")
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.converting import ConvertSpec
    from daemon.converting import convert as make
    from daemon.settings import Settings
    from daemon.sources import place_of
    from daemon.workers import grip_of_signals

    settings = Settings.load(state_dir=state_dir, threads=threads)

    legacy = {"gqa": gqa, "eps": eps, "context-length": context}
    spec = ConvertSpec(
        place_of(source, settings), output.expanduser().absolute() if output else None, outtype,
        place_of(base, settings) if base else None, place_of(adapter, settings) if adapter else None,
        llama_cpp.expanduser().absolute() if llama_cpp else None, allow_pickle,
        not no_parity, force, {name: str(value) for name, value in legacy.items() if value is not None})
    with Stages(console(stderr=True)) as stages, grip_of_signals() as grip:
        done = make(spec, settings, grip, stages.show)
    if json:
        print_json({"path": str(done.path), "type": done.weight_type, "bytes": done.n_bytes, "sha256": done.sha256,
                    "kind": done.kind, "converter": done.converter, "stages": list(done.stages),
                    "notes": list(done.notes)})
        return
    print_stages(done.stages, done.notes)
    typer.echo(f"Wrote {done.path}: {done.weight_type}, {done.n_bytes:,} bytes, by the converter of {done.converter}.")


def print_stages(stages: tuple[Any, ...], notes: tuple[str, ...]) -> None:
    """Print how the forms of a model agreed."""
    from daemon.cli.tables import console, percent, plain_table

    out = console()
    if stages:
        out.print(plain_table(
            [("stage", "left"), ("tokens", "right"), ("KL divergence, mean", "right"), ("largest", "right"),
             ("same most probable token", "right")],
            [(stage["stage"], str(stage["tokens"]), f"{stage['mean_kl']:.2g}", f"{stage['max_kl']:.2g}",
              percent(stage["same_top"])) for stage in stages]))
    for note in notes:
        out.print(note, markup=False, soft_wrap=True)
