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
         "or hf:OWNER/NAME to pull it first.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(document: Any) -> None:
    """Print document as JSON."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))
