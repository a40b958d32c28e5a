"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

StateDir = Annotated[Path | None, typer.Option(
    "--state-dir", help="Folder of the ledger and of finished levels. Default: $NIGHTPRESS_STATE_DIR, else "
                        "~/.local/state/nightpress.", show_default=False)]
DeployDir = Annotated[Path | None, typer.Option(
    "--deploy-dir", help="Folder of the releases. Default: `deploy` in the state folder.", show_default=False)]
MODEL = ("The unquantized GGUF, or the first of its shards; or a Hugging Face folder, the id of one that was pulled, "
         "or hf:OWNER/NAME to pull it first; or the word starter.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Domain = Annotated[list[str] | None, typer.Option(
    metavar="NAME", show_default=False,
    help="Calibrate with this domain's text, such as medical; repeat for more. `nightpress calibration list` shows "
         "them. Default: general, and only where a matrix is needed.")]
Calibration = Annotated[list[Path] | None, typer.Option(
    metavar="FILE", show_default=False, help="Calibrate with this text; repeat for more.")]
ImatrixFile = Annotated[Path | None, typer.Option(
    "--imatrix", metavar="FILE", show_default=False,
    help="Quantize with this importance matrix as it is, llama.cpp's GGUF or .dat.")]
Threads = Annotated[int | None, typer.Option(
    min=1, help="Threads of the engine. Default: one per processor.", show_default=False)]


def absolute(file: Path) -> str:
    """Return where a file lies whose name the user gave."""
    return str(file.expanduser().absolute())


def print_json(document: Any) -> None:
    """Print document as JSON."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))
