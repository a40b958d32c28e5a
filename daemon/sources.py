"""Where a model is, by what a person calls it: a GGUF, a Hugging Face folder, or the id of one that was pulled."""

from __future__ import annotations

from pathlib import Path

from daemon.pulling import models_folder
from daemon.settings import Settings


def place_of(path: Path, settings: Settings) -> Path:
    """Return an absolute path: the file or folder of that name, else the folder of a pulled model of that id."""
    there = path.expanduser().absolute()
    pulled = models_folder(settings.state_dir, str(path))
    return pulled if not there.exists() and not path.is_absolute() and pulled.is_dir() else there
