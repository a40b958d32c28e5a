"""What was generated so far: a file of one JSON line per answer, durable line by line, so that nothing is asked twice.

The first line says which request it belongs to. A line that a power cut tore off is dropped; its answer is asked anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from calibration_data.briefs import GenerationRefused
from calibration_data.text import Header, Sample, Turn
from state.files import explained, fsync_folder

FORMAT = "nightpress generation 1"


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        number: of the request.
        samples: that were accepted.
        dropped: how many were not, by reason.
        sent: tokens, as far as the provider counts them.
        received: the same.
    """

    number: int
    samples: tuple[Sample, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    sent: int = 0
    received: int = 0


class Journal:
    """The answers to one request, on disk; use `open_journal`."""

    def __init__(self, path: Path, stream: FileIO, entries: list[Entry]) -> None:
        self.path, self.entries = path, entries
        self._stream = stream

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All accepted samples, in the order in which they came."""
        return tuple(sample for entry in self.entries for sample in entry.samples)

    def append(self, entry: Entry) -> None:
        """Keep an answer; on return it is on disk.

        Raises:
            DiskFull, StateUnwritable: it cannot be written; what was kept before stands.
        """
        with explained(self.path):
            _write_line(self._stream, _as_json(entry))
        self.entries.append(entry)

    def remove(self) -> None:
        """Delete the file, as what it held lies elsewhere now."""
        self.path.unlink(missing_ok=True)


@contextmanager
def open_journal(path: Path, request: str, about: str, *, fresh: bool = False) -> Iterator[Journal]:
    """Open the journal of a request, or begin it, and close it afterwards; one process at a time.

    Args:
        path: of the file; its folder exists.
        request: fingerprint of what is asked for.
        about: the same for people.
        fresh: throw away what is there.

    Raises:
        GenerationRefused: it belongs to another request, is damaged, or is in use.
        DiskFull, StateUnwritable: it cannot be written.
    """
    with explained(path), path.open("ab+", buffering=0) as stream:  # a buffer would be written once more on closing
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(stream.fileno()).st_nlink == 0:  # whoever had the lock has removed the file
                raise BlockingIOError
        except BlockingIOError:
            raise GenerationRefused(f"Another command is generating into {path}: wait for it, or choose another "
                                    "name.") from None
        if fresh:
            stream.truncate(0)
        stream.seek(0)
        content = stream.read()
        whole = content[:content.rfind(b"\n") + 1]
        stream.truncate(len(whole))
        entries = _read(path, whole, request)
        if not whole:
            _write_line(stream, {"format": FORMAT, "request": request, "about": about})
            fsync_folder(path.parent)
        journal = Journal(path, stream, entries)
        try:
            yield journal
        finally:
            if not journal.entries:  # nobody needs it
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _read(path: Path, content: bytes, request: str) -> list[Entry]:
    """Return the entries of a journal's whole lines."""
    if not content:
        return []
    again = "`--fresh` throws it away and begins anew"
    try:
        first, *lines = (json.loads(line) for line in content.splitlines())
        if first["format"] != FORMAT:
            raise ValueError(first["format"])
        if first["request"] != request:
            raise GenerationRefused(f"{path} holds answers to another request ({first['about']}): {again}, or choose "
                                    "another name.")
        return [_from_json(line) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GenerationRefused(f"{path}, which keeps what was generated so far, is damaged: {again}.") from None


def _write_line(stream: FileIO, document: Mapping[str, Any]) -> None:
    rest = json.dumps(document).encode() + b"\n"
    while rest:
        rest = rest[stream.write(rest):]
    os.fsync(stream.fileno())


def _as_json(entry: Entry) -> dict[str, Any]:
    return {"number": entry.number, "dropped": dict(entry.dropped), "sent": entry.sent, "received": entry.received,
            "samples": [{"topic": sample.topic, "turns": [[turn.role, turn.text] for turn in sample.turns]}
                        for sample in entry.samples]}


def _from_json(line: Mapping[str, Any]) -> Entry:
    samples = tuple(Sample("", str(one["topic"]), tuple(Turn(str(role), str(text)) for role, text in one["turns"]),
                           Header("")) for one in line["samples"])
    dropped = {str(reason): int(count) for reason, count in line["dropped"].items()}
    return Entry(int(line["number"]), samples, dropped, int(line["sent"]), int(line["received"]))
