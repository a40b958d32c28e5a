"""Fingerprints: the same inputs give the same name, so that finished work is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(kind: str, **parts: Any) -> str:
    """Return 32 hex digits over kind and parts, which must be what JSON can hold."""
    canonical = json.dumps([kind, parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def sha256_of_files(paths: tuple[Path, ...], progress: Any = None) -> str:
    """Return the sha256 over the content of paths, one after the other.

    Args:
        paths: files.
        progress: called with bytes read and bytes in all.
    """
    digest, done = hashlib.sha256(), 0
    total = sum(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("rb") as handle:
            while chunk := handle.read(4 << 20):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    return digest.hexdigest()
