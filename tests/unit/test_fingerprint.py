"""The same inputs give the same name, and nothing else does."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops.fingerprint import fingerprint, sha256_of_files

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                     lambda inner: (st.lists(inner, max_size=3)
                                    | st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=6)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    code = "from loops.fingerprint import fingerprint; print(fingerprint('step', b={'y': 1, 'x': [1.5, None]}, a='ä'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint("step", a="ä", b={"x": [1.5, None], "y": 1})


def test_the_name_of_a_known_step_never_changes() -> None:
    """A change here makes every finished step of every user be done again."""
    assert fingerprint("step", a=1) == hashlib.sha256(b'["step",{"a":1}]').hexdigest()[:32]


@given(st.dictionaries(st.from_regex(r"[a-j]{1,3}", fullmatch=True), plain, min_size=2, max_size=4))
def test_the_order_of_the_parts_does_not_matter(parts: dict[str, object]) -> None:
    assert fingerprint("k", **parts) == fingerprint("k", **dict(reversed(parts.items())))


@given(plain, plain)
def test_different_parts_have_different_names(one: object, other: object) -> None:
    import json

    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint("k", part=one) == fingerprint("k", part=other)) == same


def test_the_kind_is_part_of_the_name() -> None:
    assert fingerprint("a", x=1) != fingerprint("b", x=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_has_no_name(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        fingerprint("k", part=value)


def test_the_hash_of_files_is_that_of_their_content_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"ab" * 3_000_000)
    two.write_bytes(b"c")
    assert sha256_of_files((one, two)) == hashlib.sha256(one.read_bytes() + b"c").hexdigest()
    assert sha256_of_files((two, one)) != sha256_of_files((one, two))


def test_hashing_tells_its_progress_to_the_end(tmp_path: Path) -> None:
    file = tmp_path / "1"
    file.write_bytes(bytes(9 << 20))
    told: list[tuple[int, int]] = []
    sha256_of_files((file, file), lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (18 << 20, 18 << 20)
