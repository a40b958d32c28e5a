"""What commands do with a model that is no GGUF: find it, pull it, convert it, with the progress on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daemon.settings import Settings


def find(model: Path, settings: Settings) -> Path:
    """Return where a model lies, absolute; see `daemon.sources.locate`."""
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.sources import locate

    with Stages(console(stderr=True)) as stages:
        return locate(model, settings, stages.show)


@contextlib.contextmanager
def gguf_of(model: Path, settings: Settings) -> Iterator[Path]:
    """Yield a model's GGUF: itself, or what its folder is converted to, which is kept within the disk budget."""
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.sources import clean, converted
    from daemon.workers import grip_of_signals

    path = find(model, settings)
    if not path.is_dir():
        yield path
        return
    with Stages(console(stderr=True)) as stages, grip_of_signals() as grip:
        file, _source = converted(path, settings, grip, stages.show)
    yield file
    clean(settings)
