"""A short way of three stages that write real files, and a process that walks it: `finetune_pipeline.py BASE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from daemon.errors import WorkerRefused
from daemon.finetune_config import FinetuneSpec
from daemon.finetuning import Bench, Finetuned, Made, Stage, finetune
from daemon.grip import Grip
from daemon.settings import Settings
from state.ledger import Ledger


def spec(base: Path, **changes: Any) -> FinetuneSpec:
    """What is wanted: rows from a file of the test's."""
    dataset = {"files": [str(base / "rows.txt")], **changes.pop("dataset", {})}
    return FinetuneSpec.of({"name": "shop", "folder": str(base / "work"), "dataset": dataset, **changes})


class Way:
    """Rows are read, counted, and the count is written again; `done` tells which stage worked, `fail` breaks one."""

    def __init__(self, fail: str = "", grip: Grip | None = None) -> None:
        self.done: list[str] = []
        self.fail = fail
        self.grip = grip or Grip()

    def _work(self, name: str, text: str, folder: Path) -> Made:
        folder.mkdir(exist_ok=True)
        begun = folder / "begun"
        self.done.append(f"{name} again" if begun.exists() else name)
        begun.touch()
        if self.fail == name:
            raise WorkerRefused(f"{name} broke.", 35)
        (folder / "out.txt").write_text(text, encoding="utf-8")
        return Made({name: folder / "out.txt"}, {"length": len(text)})

    def read(self, bench: Bench, folder: Path) -> Made:
        return self._work("read", bench.spec.dataset.files[0].read_text(encoding="utf-8").upper(), folder)

    def count(self, bench: Bench, folder: Path) -> Made:
        text = bench.file("read", "read").read_text(encoding="utf-8")
        return self._work("count", str(text.count("\n") // bench.spec.dataset.min_tokens), folder)

    def tell(self, bench: Bench, folder: Path) -> Made:
        return self._work("tell", f"{bench.file('count', 'count').read_text(encoding='utf-8')} rows", folder)

    def stages(self) -> tuple[Stage, ...]:
        """Return the way."""
        return (
            Stage("read", lambda bench: {"rows": bench.spec.dataset.files[0]}, lambda _bench: {}, self.read),
            Stage("count", lambda bench: {"read": bench.file("read", "read")},
                  lambda bench: {"min": bench.spec.dataset.min_tokens}, self.count),
            Stage("tell", lambda bench: {"count": bench.file("count", "count")}, lambda _bench: {}, self.tell))

    def walk(self, base: Path, **changes: Any) -> Finetuned:
        """Walk it, and forget what was done before."""
        self.done.clear()
        with Ledger.open(base / "state", "test") as ledger:
            return finetune(spec(base, **changes), ledger, Settings(state_dir=base / "state"), self.grip,
                            lambda _event: None, stages=self.stages())


if __name__ == "__main__":
    Way().walk(Path(sys.argv[1]))
