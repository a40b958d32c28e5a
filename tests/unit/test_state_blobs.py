"""Blobs are what their names say, and stay under the budget."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from state.blobs import BlobDamaged, BlobStore
from state.owner import has_live_tag, is_live, started, tag


def put(store: BlobStore, content: bytes) -> str:
    store.prepare()
    sha256 = hashlib.sha256(content).hexdigest()
    store.path(sha256).write_bytes(content)
    return sha256


def test_what_does_not_hold_its_hash_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 10**6)
    sha256 = put(store, b"others")
    assert store.total_bytes() == len(b"others")
    store.verify(sha256)
    store.path(sha256).write_bytes(b"0thers")
    with pytest.raises(BlobDamaged, match="has changed"):
        store.verify(sha256)


@pytest.mark.parametrize("name", ["", "../x", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 65, "/" + "a" * 63])
def test_only_a_hash_names_a_blob(name: str, tmp_path: Path) -> None:
    with pytest.raises(BlobDamaged):
        BlobStore(tmp_path, 0).path(name)


def test_the_least_recently_used_go_first_and_kept_ones_never(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 250)
    hashes = [put(store, bytes([number]) * 100) for number in range(4)]
    for age, sha256 in enumerate(hashes):
        os.utime(store.path(sha256), ns=(age, age))
    store.touch(hashes[1])
    assert store.collect({hashes[0]}) == [hashes[2], hashes[3]]
    assert store.total_bytes() == 200
    assert store.collect({hashes[0]}) == []
    store.budget_bytes = 0
    assert store.collect({hashes[0]}) == [hashes[1]]
    assert store.has(hashes[0]), "kept even above the budget"


def test_unfinished_files_of_the_dead_are_removed_and_of_the_living_stay(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 0)
    store.prepare()
    mine = store.incoming / f".Q8_0.gguf.{tag()}-0011aabb.tmp"
    mine.write_bytes(b"half")
    dead = store.incoming / f"{os.getpid()}-00000000-abc.gguf"
    dead.write_bytes(b"half")
    assert store.clean_incoming() == [dead]
    assert mine.exists()


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    since = started(os.getpid())
    assert is_live(os.getpid(), since)
    assert not is_live(os.getpid(), "another start")
    assert not is_live(None, None)
    assert has_live_tag(f".x.{tag()}-0011aabb.tmp")
    assert not has_live_tag(f".x.{os.getpid()}-00000000-0011aabb.tmp")
    assert not has_live_tag("no tag")
