"""Arrays on disk between steps: complete or absent, so that a killed run resumes where it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.files import explained, rename, temporary_beside


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write array to path; the file appears complete and durable.

    Raises:
        DiskFull: nothing is left behind.
    """
    temporary = temporary_beside(path)
    try:
        with explained(path.parent):
            with temporary.open("wb") as handle:
                np.save(handle, array)
                handle.flush()
                os.fsync(handle.fileno())
            rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_array(path: Path, *, mapped: bool = False) -> NDArray[Any] | None:
    """Return the array in path, as a read-only memory map if mapped; None where it is missing or damaged."""
    try:  # not np.load, which takes a file that begins like an archive or a pickle for one
        if mapped:
            array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        else:
            with path.open("rb") as handle:
                array = np.lib.format.read_array(handle, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array
