"""Steps of work that belongs to no run, in a file: what was finished is not done again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loops.events import Event, StepDone, from_line, to_line
from loops.pass1.steps import Result
from state.files import explained, make_folder


def read_journal(file: Path) -> dict[str, Result]:
    """Return the finished steps by fingerprint; a line that a crash cut short is passed over."""
    done: dict[str, Result] = {}
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return done
    for line in lines:
        try:
            event = from_line(line)
        except ValueError:
            continue
        if isinstance(event, StepDone):
            done[event.fingerprint] = dict(event.result)
    return done


def journaling(file: Path, emit: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return an emit that appends every finished step to file, durably, instead of telling it.

    Several processes may append to one file: each line is one write.

    Raises:
        DiskFull, StateUnwritable: by the returned function; the steps before stay.
    """
    def take(event: Event) -> None:
        if not isinstance(event, StepDone):
            emit(event)
            return
        with explained(file.parent):
            make_folder(file.parent, 0o700)
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # a line cut short before must not swallow this one
                os.write(descriptor, f"\n{to_line(event)}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    return take
