"""Releases: `<deploy>/<model>/releases/<n>/{model.gguf, manifest.json}` and the symlink `current`.

The symlink is the truth about what is deployed. It is only ever replaced by rename, and only
after the release it will point to is complete and durable: a reader sees the old model or the
new one. Nothing here needs the ledger.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from state.faults import NightpressError, failpoint
from state.files import (
    explained,
    fsync_file,
    fsync_folder,
    make_folder,
    orphans,
    rename,
    sha256_file,
    temporary_beside,
    write_atomic,
)
from state.lock import Lock
from state.manifest import BadName, Manifest, NotPromotable, ReleaseDamaged, check_name, slug
from state.owner import has_live_tag, tag

__all__ = [
    "BadName", "Manifest", "NotPromotable", "NothingToRollBackTo", "Release", "ReleaseDamaged", "Staged",
    "check_name", "clean_staging", "current", "list_releases", "publish", "retain", "rollback", "slug",
    "stage",
]

_TARGET = re.compile(r"releases/([1-9][0-9]{0,8})")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_LOCK_WAIT_S = 10.0


class NothingToRollBackTo(NightpressError):
    """There is no earlier sound release to go back to; the deployed one stays."""

    exit_code: ClassVar[int] = 46


@dataclass(frozen=True)
class Staged:
    """A release built but not yet published; load `model_path` and ask the smoke prompt first."""

    deploy_dir: Path
    folder: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The model file as it will be deployed."""
        return self.folder / "model.gguf"

    def discard(self) -> None:
        """Remove what was staged; nothing deployed changes."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Release:
    """A published release; `path` is its folder."""

    model: str
    number: int
    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.path / "model.gguf"


def _home(deploy_dir: Path, model: str) -> Path:
    """Return the folder of a deployed model.

    Raises:
        BadName: the name would lead elsewhere.
        ReleaseDamaged: the folder, or its `releases`, is a symlink.
    """
    home = deploy_dir / check_name(model)
    for folder in (home, home / "releases"):
        if folder.is_symlink():
            raise ReleaseDamaged(f"{folder} is a symlink, so it is not used; put a real folder in its place.")
    return home


@contextlib.contextmanager
def _locked(deploy_dir: Path, doing: str) -> Iterator[None]:
    with explained(deploy_dir):
        lock = Lock.acquire(deploy_dir / ".lock", f"nightpress {doing}", wait_s=_LOCK_WAIT_S, mode=0o644)
        with lock:
            yield


def stage(deploy_dir: Path, model: str, source_blob: Path, manifest: Manifest) -> Staged:
    """Build a release beside the published ones and return it, for the smoke prompt.

    The model file is a hard link of the read-only blob, or a copy where linking cannot work.

    Raises:
        NotPromotable: the manifest is of another model.
        DiskFull, StateUnwritable: as the disk says; nothing is left behind.
    """
    home = _home(deploy_dir, model)
    if manifest.model != model:
        raise NotPromotable(f"The manifest is of {manifest.model}, not of {model}.")
    folder = home / "releases" / f".staging-{tag()}-{secrets.token_hex(4)}"
    with explained(deploy_dir):
        make_folder(folder.parent, 0o755)
        try:
            make_folder(folder, 0o755)
            _place(source_blob, folder / "model.gguf")
            _describe(folder, manifest)
            fsync_folder(folder)
            failpoint("promote.staged")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return Staged(deploy_dir, folder, manifest)


def _describe(folder: Path, manifest: Manifest) -> None:
    write_atomic(folder / "manifest.json", manifest.to_json().encode("utf-8", "replace"), mode=0o644)


def _place(source: Path, target: Path) -> None:
    # A writable file could still change under its other name, so only a read-only one is linked.
    if stat.S_IMODE(source.stat().st_mode) == 0o444:
        with contextlib.suppress(OSError):
            os.link(source, target, follow_symlinks=False)
            return
    shutil.copyfile(source, target)
    target.chmod(0o444)
    fsync_file(target)


def publish(staged: Staged, smoke: Mapping[str, Any]) -> Release:
    """Make a staged release the current one; `smoke` is what it was asked and what it replied.

    Killed at any moment, `current` is the old release or the new one, whole.

    Raises:
        ReleaseDamaged: the staged file is not what the manifest says; nothing changed.
        NotPromotable: the smoke prompt has no reply.
        StateBusy: another promotion or rollback holds the deploy directory.
        DiskFull, StateUnwritable: as the disk says; the old release stays current.
    """
    home = _home(staged.deploy_dir, staged.manifest.model)
    published: Path | None = None
    try:
        if not str(smoke.get("reply", "")).strip():
            raise NotPromotable(f"{staged.manifest.level} did not answer the smoke prompt; not promoted.")
        with explained(staged.deploy_dir):
            _verify(staged)
            failpoint("promote.verified")
        with _locked(staged.deploy_dir, "promote"):
            before = _pointed(home)
            number = max([0, *_numbers(home)]) + 1
            manifest = replace(staged.manifest, number=number, previous=before, smoke=dict(smoke))
            _describe(staged.folder, manifest)
            failpoint("promote.described")
            target = home / "releases" / str(number)
            rename(staged.folder, target)
            published = target
            failpoint("promote.renamed")
            with _link(home, number) as link:
                failpoint("promote.linked")
                rename(link, home / "current")
            failpoint("promote.swapped")
    except BaseException:
        staged.discard()
        if published is not None and _pointed(home) != int(published.name):
            shutil.rmtree(published, ignore_errors=True)
        raise
    return Release(manifest.model, number, target, manifest)


def _verify(staged: Staged) -> None:
    path = staged.model_path
    if not stat.S_ISREG(path.lstat().st_mode) or sha256_file(path) != staged.manifest.sha256:
        raise ReleaseDamaged(
            f"{staged.manifest.level} changed on disk since it was measured; not promoted. Run it again."
        )


@contextlib.contextmanager
def _link(home: Path, number: int) -> Iterator[Path]:
    """Yield a symlink to a release, beside `current` and ready to be renamed over it."""
    link = temporary_beside(home / "current")
    try:
        link.symlink_to(f"releases/{number}")
        yield link
    except BaseException:
        link.unlink(missing_ok=True)
        raise


def _pointed(home: Path) -> int | None:
    """Return the number `current` points to; None without a link or with one that leads elsewhere."""
    try:
        found = _TARGET.fullmatch(os.readlink(home / "current"))  # noqa: PTH115  the text, not a Path
    except OSError:
        return None
    return int(found[1]) if found else None


def _numbers(home: Path) -> list[int]:
    folder = home / "releases"
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _NUMBER.fullmatch(path.name))


def numbers(deploy_dir: Path, model: str) -> list[int]:
    """Return the numbers of a model's releases, sound or not, oldest first."""
    return _numbers(_home(deploy_dir, model))


def load(home: Path, number: int) -> Release:
    """Return release `number` of the model folder `home` after a quick look: manifest, file, size.

    Raises:
        ReleaseDamaged: any of them is wrong.
    """
    path = home / "releases" / str(number)
    manifest = Manifest.read(path / "manifest.json")
    try:
        facts = (path / "model.gguf").lstat()
    except OSError as error:
        raise ReleaseDamaged(f"{path}/model.gguf is missing; go back with `nightpress rollback`.") from error
    sound = stat.S_ISREG(facts.st_mode) and facts.st_size == manifest.bytes
    if not sound or manifest.model != home.name or manifest.number != number:
        raise ReleaseDamaged(f"Release {number} of {home.name} is damaged; try `nightpress rollback`.")
    return Release(home.name, number, path, manifest)


def current(deploy_dir: Path, model: str) -> Release | None:
    """Return the deployed release, None when nothing is deployed.

    Raises:
        ReleaseDamaged: `current` leads nowhere, elsewhere, or to a damaged release.
    """
    home = _home(deploy_dir, model)
    if not (home / "current").is_symlink():
        if (home / "current").exists():
            raise ReleaseDamaged(f"{home / 'current'} is not a symlink; move it away, then promote again.")
        return None
    number = _pointed(home)
    if number is None:
        raise ReleaseDamaged(f"{home / 'current'} leads elsewhere; go back with `nightpress rollback`.")
    return load(home, number)


def current_number(deploy_dir: Path, model: str) -> int | None:
    """Return the number that `current` names, sound or not; None without a pointer."""
    return _pointed(_home(deploy_dir, model))


def models(deploy_dir: Path) -> list[str]:
    """Return the names of the models in the deploy directory."""
    if not deploy_dir.is_dir():
        return []
    found = []
    for path in sorted(deploy_dir.iterdir()):
        with contextlib.suppress(BadName):
            if path.is_dir() and not path.is_symlink():
                found.append(check_name(path.name))
    return found


def list_releases(deploy_dir: Path, model: str | None = None) -> list[Release]:
    """Return the sound releases of one model or of all, oldest first; damaged ones `check` names."""
    found = []
    for name in models(deploy_dir) if model is None else [check_name(model)]:
        home = _home(deploy_dir, name)
        for number in _numbers(home):
            with contextlib.suppress(ReleaseDamaged):
                found.append(load(home, number))
    return found


def rollback(deploy_dir: Path, model: str) -> Release:
    """Point `current` back to the release that was current before it, and return that one.

    When that one is damaged or gone, the newest sound one older than it. Works without ledger
    or daemon; sizes are checked, not hashes, so it is quick.

    Raises:
        NothingToRollBackTo: nothing deployed, or nothing sound before it.
        StateBusy: another promotion or rollback holds the deploy directory.
    """
    home = _home(deploy_dir, model)
    if not (home / "current").is_symlink():
        raise NothingToRollBackTo(f"Nothing is deployed for {model} in {deploy_dir}; promote it first.")
    with _locked(deploy_dir, "rollback"):
        for number in _before(home):
            with contextlib.suppress(ReleaseDamaged):
                release = load(home, number)
                failpoint("rollback.chosen")
                with _link(home, number) as link:
                    failpoint("rollback.linked")
                    rename(link, home / "current")
                failpoint("rollback.swapped")
                return release
    raise NothingToRollBackTo(f"{model} has no earlier sound release to go back to; the deployed one stays.")


def _before(home: Path) -> list[int]:
    """Return the releases to try, best first: the recorded previous one, then older ones."""
    now = _pointed(home)
    found = _numbers(home)
    if now is None:  # the link leads elsewhere: the newest release is the best guess
        return found[::-1]
    previous = None
    with contextlib.suppress(ReleaseDamaged):
        manifest = Manifest.read(home / "releases" / str(now) / "manifest.json")
        previous = manifest.previous
        if previous is None:  # the first release ever: what lies below was never current
            return []
    older = [number for number in reversed(found) if number < (previous or now)]
    return older if previous is None else [previous, *older]


def kept(deploy_dir: Path, model: str) -> set[int]:
    """Return the numbers that stay whatever happens: current, its previous, and the highest."""
    home = _home(deploy_dir, model)
    numbers = _numbers(home)
    keep = set(numbers[-1:])  # so that a number is never given twice
    now = _pointed(home)
    if now is None:
        return set(numbers)
    return keep | {now, *_before(home)[:1]}


def retain(deploy_dir: Path, model: str, keep: int) -> list[int]:
    """Remove all but the newest `keep` releases and the ones that must stay; return the numbers removed."""
    home = _home(deploy_dir, model)
    removed: list[int] = []
    if not home.is_dir():
        return removed
    with _locked(deploy_dir, "retain"):
        numbers = _numbers(home)
        stay = kept(deploy_dir, model) | set(numbers[len(numbers) - max(keep, 0):])
        for number in numbers:
            if number not in stay:
                trash = home / "releases" / f".staging-{tag()}-{secrets.token_hex(4)}"
                rename(home / "releases" / str(number), trash)
                failpoint("retain.renamed")
                shutil.rmtree(trash)
                removed.append(number)
    return removed


def stale(deploy_dir: Path) -> list[Path]:
    """Return staging folders and temporary links whose process is gone."""
    found: list[Path] = []
    for model in models(deploy_dir):
        home = deploy_dir / model
        found += [path for path in home.glob("releases/.staging-*") if not has_live_tag(path.name)]
        found += orphans(home)
        for number in _numbers(home):
            found += orphans(home / "releases" / str(number))
    return sorted(found)


def clean_staging(deploy_dir: Path) -> list[Path]:
    """Remove what killed promotions left behind and return the paths; nothing published is touched."""
    gone = stale(deploy_dir)
    if gone:
        with _locked(deploy_dir, "clean"):
            for path in gone:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
    return gone
