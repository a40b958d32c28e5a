"""The extra `nightpress[train]`: what needs it says so in one sentence before any work."""

from __future__ import annotations

from importlib.util import find_spec

from state.faults import NightpressError

INSTALL = "pip install 'nightpress[train]'"
#: what converting needs, by the names that are imported; the converter itself asks for the last two
CONVERTING = ("torch", "transformers", "safetensors", "sentencepiece", "google.protobuf")


class TrainExtraMissing(NightpressError):
    """This needs more libraries: pip install 'nightpress[train]'."""

    exit_code = 93


def require(what: str, *libraries: str) -> None:
    """Make sure that libraries are installed, without importing them.

    Args:
        what: that needs them, as the beginning of a sentence.
        libraries: by the names that are imported.

    Raises:
        TrainExtraMissing: naming the first that is missing and the command that installs it.
    """
    for library in libraries:
        try:
            there = find_spec(library) is not None
        except ModuleNotFoundError:  # its parent package is missing
            there = False
        if not there:
            raise TrainExtraMissing(f"{what} needs {library}, which is not installed: {INSTALL}")
