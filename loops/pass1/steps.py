"""Steps: work that is done once per fingerprint and remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loops.events import Event, StepDone
from loops.fingerprint import fingerprint

Emit = Callable[[Event], None]
Result = dict[str, Any]


class Steps:
    """Finished steps of this and earlier runs; new ones are reported as they finish."""

    def __init__(self, emit: Emit, done: Mapping[str, Result], **common: Any) -> None:
        """Start with the steps already done; `common` enters every fingerprint."""
        self._emit, self._done, self._common = emit, dict(done), common
        self.reused = 0

    def name(self, kind: str, **parts: Any) -> str:
        """Return the fingerprint of a step."""
        return fingerprint(kind, **self._common, **parts)

    def run(self, kind: str, level: str, work: Callable[[], Result],
            valid: Callable[[Result], bool] = lambda _result: True, **parts: Any) -> Result:
        """Return the result of a step, from memory where it is there and still valid.

        Args:
            kind: what is done.
            level: for which level; '' for the original.
            work: does it; returns what JSON can hold.
            valid: tells whether a remembered result still holds, for instance its file exists.
            parts: everything besides the common parts that decides the result.
        """
        key = self.name(kind, **parts)
        found = self._done.get(key)
        if found is not None and valid(found):
            self.reused += 1
            return found
        result = work()
        self._done[key] = result
        self._emit(StepDone(key, kind, level, result))
        return result
