"""Promotion, rollback and names: `current` leads to a sound release or stays where it was."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state import releases
from state.check import violations
from state.lock import Lock, StateBusy
from state.manifest import BadName, Manifest, NotPromotable, ReleaseDamaged, check_name, slug
from state.releases import NothingToRollBackTo

SCRIPT = Path(__file__).parents[1] / "fakes" / "state_operations.py"
_spec = importlib.util.spec_from_file_location("state_operations", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
ops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ops)

SMOKE = {"prompt": "How are you?", "reply": "Well."}


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    """Three releases of m, the third current."""
    for content in (b"one", b"two!", b"three"):
        ops.release(tmp_path, content)
    return tmp_path / "deploy"


def number(deploy: Path) -> int | None:
    found = releases.current(deploy, "m")
    return found.number if found else None


def test_a_promotion_is_a_readable_release_under_current(tmp_path: Path) -> None:
    release = ops.release(tmp_path, b"one")
    current = tmp_path / "deploy" / "m" / "current"
    assert current.readlink() == Path("releases/1")
    assert (current / "model.gguf").read_bytes() == b"one"
    assert (current / "model.gguf").stat().st_mode & 0o777 == 0o444
    assert (current / "model.gguf").stat().st_nlink == 2, "a hard link of the blob costs no space"
    for folder in (tmp_path / "deploy", current, current.parent):
        assert folder.stat().st_mode & 0o777 == 0o755
    document = json.loads((current / "manifest.json").read_text())
    assert (document["number"], document["previous"], document["smoke"]) == (1, None, SMOKE)
    assert releases.current(tmp_path / "deploy", "m") == release


def test_rollback_goes_to_what_was_current_before(tmp_path: Path, deploy: Path) -> None:
    assert releases.rollback(deploy, "m").number == 2
    ops.release(tmp_path, b"four")
    assert number(deploy) == 4
    assert releases.rollback(deploy, "m").number == 2, "3 was already rolled back"
    assert releases.rollback(deploy, "m").number == 1
    with pytest.raises(NothingToRollBackTo):
        releases.rollback(deploy, "m")
    assert number(deploy) == 1
    with pytest.raises(NothingToRollBackTo):
        releases.rollback(deploy, "unknown")


@pytest.mark.parametrize("harm", ["gone", "short", "no manifest", "simulated", "link"])
def test_rollback_passes_over_a_damaged_release(harm: str, deploy: Path) -> None:
    folder = deploy / "m" / "releases" / "2"
    if harm == "gone":
        shutil.rmtree(folder)
    elif harm in ("short", "link"):
        (folder / "model.gguf").unlink()
        if harm == "link":
            (folder / "model.gguf").symlink_to("/etc/passwd")
        else:
            (folder / "model.gguf").write_bytes(b"x")
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"simulated": false', '"simulated": true'))
    assert releases.rollback(deploy, "m").number == 1
    assert [release.number for release in releases.list_releases(deploy)] == [1, 3]


@pytest.mark.parametrize("target", ["releases/9", "../../elsewhere", "/etc", "releases/../releases/3"])
def test_a_pointer_that_leads_elsewhere_is_named_and_rolled_back(target: str, deploy: Path) -> None:
    (deploy / "m" / "current").unlink()
    (deploy / "m" / "current").symlink_to(target)
    with pytest.raises(ReleaseDamaged):
        releases.current(deploy, "m")
    assert len(violations(deploy.parent / "state", deploy)) == 1
    assert releases.rollback(deploy, "m").number == 3


def test_rollback_is_quick_and_needs_no_ledger(tmp_path: Path, deploy: Path) -> None:
    shutil.rmtree(tmp_path / "state")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(SCRIPT), "rollback", str(tmp_path)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time: others may be using the machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert number(deploy) == 2
    assert not (tmp_path / "state").exists()


def test_a_release_that_changed_since_it_was_measured_is_not_published(tmp_path: Path, deploy: Path) -> None:
    file = tmp_path / "writable.gguf"
    file.write_bytes(b"measured")
    staged = releases.stage(deploy, "m", file, ops.manifest(b"measured"))
    assert staged.model_path.stat().st_nlink == 1, "a writable file is copied, not linked"
    staged.model_path.chmod(0o644)
    staged.model_path.write_bytes(b"tampered")
    with pytest.raises(ReleaseDamaged, match="not promoted"):
        releases.publish(staged, SMOKE)
    assert number(deploy) == 3
    assert list((deploy / "m" / "releases").glob(".*")) == []


def test_a_model_that_says_nothing_is_not_published(tmp_path: Path, deploy: Path) -> None:
    staged = releases.stage(deploy, "m", ops.blob(tmp_path, b"mute"), ops.manifest(b"mute"))
    with pytest.raises(NotPromotable, match="smoke prompt"):
        releases.publish(staged, {"prompt": "How are you?", "reply": "  "})
    assert number(deploy) == 3


@pytest.mark.parametrize("facts", [
    {"simulated": True}, {"verdict": {}}, {"verdict": {"state": "inconclusive"}}, {"sha256": ""},
    {"bytes": 0},
])
def test_nothing_simulated_or_not_passed_has_a_manifest(facts: dict[str, object]) -> None:
    with pytest.raises(NotPromotable):
        ops.manifest(b"x", **facts)


def test_a_manifest_of_a_later_version_is_read(deploy: Path) -> None:
    path = deploy / "m" / "current" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "blue"}))
    assert Manifest.read(path).number == 3


def test_retention_keeps_current_previous_and_the_highest(tmp_path: Path, deploy: Path) -> None:
    ops.release(tmp_path, b"four")
    ops.release(tmp_path, b"five!")
    for _ in range(3):
        releases.rollback(deploy, "m")
    assert number(deploy) == 2
    assert releases.retain(deploy, "m", 0) == [3, 4]
    assert [release.number for release in releases.list_releases(deploy, "m")] == [1, 2, 5]
    assert ops.release(tmp_path, b"six").number == 6, "no number is given twice"
    assert releases.rollback(deploy, "m").number == 2
    assert violations(tmp_path / "state", deploy, deep=True) == []


def test_two_promotions_cannot_interleave(deploy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "_LOCK_WAIT_S", 0.05)
    with Lock.acquire(deploy / ".lock", "nightpress promote"), pytest.raises(StateBusy, match="promote"):
        releases.rollback(deploy, "m")
    assert number(deploy) == 3


BAD = ["", ".", "..", "../x", "/abs", "a/b", "a\n", "a\0b", "x" * 300, "-x", ".hidden", "a b", "ä", "a\\b",
       "\x1b[0m"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_cannot_escape(name: str, tmp_path: Path, deploy: Path) -> None:
    with pytest.raises(BadName):
        check_name(name)
    with pytest.raises(BadName):
        ops.manifest(b"x", name)
    for action in (releases.current, releases.rollback, releases.list_releases):
        with pytest.raises(BadName):
            action(deploy, name)
    assert sorted(path.name for path in deploy.iterdir()) == [".lock", "m"]


@given(st.text(max_size=120) | st.sampled_from(BAD))
def test_a_slug_of_any_text_is_a_legal_name(text: str) -> None:
    assert check_name(slug(text)) == slug(slug(text))


def test_a_slug_is_readable() -> None:
    assert slug("Llama 3 8B / Instruct") == "Llama-3-8B-Instruct"
    assert slug("../../etc") == "etc"
    assert slug("模型") == "model"


def test_a_symlink_in_place_of_the_model_folder_is_refused(tmp_path: Path, deploy: Path) -> None:
    (tmp_path / "outside").mkdir()
    (deploy / "x").symlink_to(tmp_path / "outside")
    with pytest.raises(ReleaseDamaged, match="symlink"):
        releases.stage(deploy, "x", ops.blob(tmp_path, b"x"), ops.manifest(b"x", "x"))
    assert list((tmp_path / "outside").iterdir()) == []


def test_check_finds_what_is_broken(tmp_path: Path, deploy: Path) -> None:
    assert violations(tmp_path / "state", deploy, deep=True) == []
    file = deploy / "m" / "releases" / "3" / "model.gguf"
    file.chmod(0o644)
    file.write_bytes(b"thr33")
    assert violations(tmp_path / "state", deploy) == [], "the size is the same"
    found = violations(tmp_path / "state", deploy, deep=True)
    assert len(found) == 2, "the release and its blob share the bytes"
    (deploy / "m" / "releases" / ".staging-1-00000000-x").mkdir()
    assert any("left behind" in line for line in violations(tmp_path / "state", deploy))
