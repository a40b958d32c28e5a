"""Quantized models by content: `<root>/<sha256>.gguf`, read-only, under a disk budget.

A release hard-links its blob, so removing a blob here never touches a release.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import ClassVar

from state.faults import NightpressError, failpoint
from state.files import explained, fsync_folder, make_folder, sha256_file
from state.owner import has_live_tag

_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobDamaged(NightpressError):
    """A stored model file does not hold what its name says; it was not used. Run the level again."""

    exit_code: ClassVar[int] = 49


class BlobStore:
    """A folder of files named by their sha256; those that `loops.engine.quantize` still writes lie in `incoming`."""

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self.root = root
        self.budget_bytes = budget_bytes
        self.incoming = root / "incoming"

    def prepare(self) -> None:
        """Create the folders when missing.

        Raises:
            DiskFull, StateUnwritable: as the disk says.
        """
        with explained(self.root):
            make_folder(self.root, 0o700)
            make_folder(self.incoming, 0o700)

    def path(self, sha256: str) -> Path:
        """Return where the blob of this hash lies or would lie.

        Raises:
            BlobDamaged: `sha256` is not 64 lower-case hexadecimal digits.
        """
        if not _SHA256.fullmatch(sha256):
            raise BlobDamaged(f"{sha256[:80]!r} is not the name of a stored file.")
        return self.root / f"{sha256}.gguf"

    def has(self, sha256: str) -> bool:
        """Tell whether the blob is there."""
        return self.path(sha256).is_file()

    def touch(self, sha256: str) -> None:
        """Mark a blob as used now; the least recently used are collected first."""
        os.utime(self.path(sha256))

    def verify(self, sha256: str) -> None:
        """Hash a blob again.

        Raises:
            BlobDamaged: it is missing or its content has changed.
        """
        path = self.path(sha256)
        if not path.is_file():
            raise BlobDamaged(f"The stored model {sha256[:12]}… is missing; run the level again.")
        if sha256_file(path) != sha256:
            raise BlobDamaged(f"The stored model {path} has changed on disk; run the level again.")

    def blobs(self) -> list[Path]:
        """Return the finished blobs, least recently used first."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.glob("*.gguf") if _SHA256.fullmatch(path.stem)]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def total_bytes(self) -> int:
        """Return the bytes of all blobs and unfinished files."""
        waiting = self.incoming.iterdir() if self.incoming.is_dir() else ()
        return sum(path.stat().st_size for path in [*self.blobs(), *waiting] if path.is_file())

    def collect(self, keep: AbstractSet[str]) -> list[str]:
        """Remove least recently used blobs until the budget holds; return the hashes removed.

        Blobs in `keep` stay, even when the budget then does not hold.
        """
        total = self.total_bytes()
        removed: list[str] = []
        with explained(self.root):
            for path in self.blobs():
                if total <= self.budget_bytes:
                    break
                if path.stem in keep:
                    continue
                total -= path.stat().st_size
                path.unlink()
                removed.append(path.stem)
                failpoint("blob.removed")
            if removed:
                fsync_folder(self.root)
        return removed

    def orphans(self) -> list[Path]:
        """Return unfinished files whose process is gone."""
        if not self.incoming.is_dir():
            return []
        return sorted(path for path in self.incoming.iterdir() if not has_live_tag(path.name))

    def clean_incoming(self) -> list[Path]:
        """Remove unfinished files whose process is gone, and return their paths."""
        gone = self.orphans()
        with explained(self.root):
            for path in gone:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        return gone
