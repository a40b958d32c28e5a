"""Models from a hub that speaks Hugging Face's protocol: chosen files, one commit, every hash checked.

The protocol is that of huggingface_hub: `/api/models/ID/revision/REVISION` lists the files, `/ID/resolve/COMMIT/FILE`
gives one, with its hash in `X-Linked-Etag` (sha256 of a large file) or `ETag` (git's name of a small one).
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from daemon.download import (
    Download,
    DownloadInterrupted,
    ServerRefused,
    Show,
    Wait,
    fetch,
    open_client,
    remove_parts,
    wait,
)
from daemon.errors import Interrupted
from loops.finetune.model_folder import NoModelFolder, PickledWeights
from state.clock import utc_now
from state.files import explained, make_folder, write_atomic
from state.lock import Lock

if TYPE_CHECKING:
    import httpx

HUB = "https://huggingface.co"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
#: what a conversion needs, at the top of the repository
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")
WEIGHTS, PICKLES = ("model*.safetensors", "adapter_model*.safetensors"), ("pytorch_model*.bin", "adapter_model*.bin")
RECORD = ".nightpress-pull.json"
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PullSpec:
    """What to download.

    Attributes:
        hub_id: `OWNER/NAME`.
        folder: takes the files.
        revision: branch, tag or commit.
        include: patterns of names; none for what a conversion needs.
        allow_pickle: weights that are there only as pickles are downloaded too.
        endpoint: of the hub.
        token: of the user; '' for none.
    """

    hub_id: str
    folder: Path
    revision: str = "main"
    include: tuple[str, ...] = ()
    allow_pickle: bool = False
    endpoint: str = HUB
    token: str = ""


@dataclass(frozen=True)
class Pulled:
    """What was downloaded: where it lies, of which commit, and how much of it was there before."""

    folder: Path
    commit: str
    files: tuple[str, ...]
    n_bytes: int
    reused: int


@dataclass(frozen=True)
class _File:
    name: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""


def endpoint() -> str:
    """Return `$HF_ENDPOINT`, as Hugging Face's own tools read it, else the public hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


def token() -> str:
    """Return the user's token from where Hugging Face's own tools keep it; '' for none."""
    given = os.environ.get("HF_TOKEN", "").strip()
    if given:
        return given
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def models_folder(state_dir: Path, hub_id: str) -> Path:
    """Return where a model of a hub lies unless the user says otherwise."""
    return state_dir.absolute() / "models" / hub_id


def pull(spec: PullSpec, show: Show | None = None, pause: Wait = wait) -> Pulled:
    """Download a model; files that are there already, of the same content, are not downloaded again.

    Args:
        spec: what.
        show: is told how far it is.
        pause: waits between attempts.

    Raises:
        ServerRefused: there is no such model, or it needs a token or another one.
        DownloadInterrupted, DownloadDamaged, DiskFull, Interrupted: see `fetch`; finished files are kept.
        NoModelFolder: the repository has no weights that can be converted.
        PickledWeights: it has only pickles, and they were not allowed.
        StateBusy: another process downloads into the folder.
    """
    if not HUB_ID.fullmatch(spec.hub_id) or ".." in spec.hub_id:
        raise ServerRefused(f"{spec.hub_id[:100]!r} is no id of a hub; write OWNER/NAME.")
    headers = {"Authorization": f"Bearer {spec.token}"} if spec.token else {}
    try:
        with open_client() as client:
            commit, listed = _list(client, spec, headers, pause)
            chosen = choose(tuple(file.name for file in listed), spec)
            with explained(spec.folder):
                make_folder(spec.folder, 0o755)
                lock = Lock.acquire(spec.folder / ".nightpress-pull.lock", "nightpress pull")
            with lock:
                return _download(client, spec, headers, commit, [one for one in listed if one.name in chosen],
                                 show, pause)
    except KeyboardInterrupt:
        raise Interrupted("Stopped; the same command goes on where it was.") from None


def _download(client: httpx.Client, spec: PullSpec, headers: dict[str, str], commit: str, files: Sequence[_File],
              show: Show | None, pause: Wait) -> Pulled:
    record, reused, parts = _record(spec.folder), 0, set()
    for listed in files:
        file = listed if listed.size is not None and (listed.sha256 or listed.git_sha1) else _ask(
            client, _url(spec, commit, listed.name), listed, headers)
        target = spec.folder / file.name
        wanted = Download(_url(spec, commit, file.name), target, file.size, file.sha256, file.git_sha1, headers)
        parts.add(wanted.part)
        if _is_known(record.get(file.name), target, wanted):
            reused += 1
            continue
        try:
            fetch(client, wanted, show, pause)
        except ServerRefused as problem:
            raise _refusal(spec, problem.status) from problem
        facts = target.stat()
        record[file.name] = {"hash": wanted.sha256 or wanted.git_sha1, "size": facts.st_size,
                             "mtime_ns": facts.st_mtime_ns}
        _write_record(spec, commit, record)  # after each file: what is finished is known as such
    _write_record(spec, commit, record)
    remove_parts(spec.folder, parts)
    return Pulled(spec.folder, commit, tuple(file.name for file in files),
                  sum((spec.folder / file.name).stat().st_size for file in files), reused)


def _is_known(recorded: Any, target: Path, wanted: Download) -> bool:
    """Tell whether a file is the one that was downloaded and checked before, untouched since."""
    expected = wanted.sha256 or wanted.git_sha1
    if not isinstance(recorded, dict) or not target.is_file() or not expected or recorded.get("hash") != expected:
        return False
    facts = target.stat()
    return (recorded.get("size"), recorded.get("mtime_ns")) == (facts.st_size, facts.st_mtime_ns)


def _record(folder: Path) -> dict[str, Any]:
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(files) if isinstance(files, dict) else {}


def _write_record(spec: PullSpec, commit: str, record: dict[str, Any]) -> None:
    with explained(spec.folder):
        write_atomic(spec.folder / RECORD, json.dumps(
            {"id": spec.hub_id, "revision": spec.revision, "commit": commit, "at": utc_now(), "files": record},
            indent=2).encode())


def _url(spec: PullSpec, commit: str, name: str) -> str:
    return f"{spec.endpoint}/{spec.hub_id}/resolve/{quote(commit, safe='')}/{quote(name)}"


def _list(client: httpx.Client, spec: PullSpec, headers: dict[str, str], pause: Wait) -> tuple[str, list[_File]]:
    """Ask what a revision consists of; return its commit and its files."""
    import httpx

    url = f"{spec.endpoint}/api/models/{spec.hub_id}/revision/{quote(spec.revision, safe='')}"
    answer = None
    for attempt in range(3):
        try:
            answer = client.get(url, params={"blobs": "true"}, headers=headers)
        except (httpx.TransportError, httpx.InvalidURL) as problem:
            if attempt == 2 or isinstance(problem, httpx.InvalidURL):
                raise DownloadInterrupted(f"{spec.endpoint} does not answer ({str(problem)[:200]}); check the network, "
                                          "then run the same command again.") from problem
        else:
            if answer.status_code < 500 and answer.status_code != 429:
                break
        pause(float(2 ** attempt))
    if answer is None or answer.status_code != 200:
        raise _refusal(spec, answer.status_code if answer is not None else 0)
    try:
        document = answer.json()
        files = [_listed(entry) for entry in document["siblings"]]
        commit = str(document.get("sha") or spec.revision)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ServerRefused(f"{spec.endpoint} answers something else than a list of files: it is no hub.") from problem
    return commit, files


def _listed(entry: dict[str, Any]) -> _File:
    name = str(entry["rfilename"])
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ServerRefused(f"The hub lists a file {name[:80]!r}, which would lie outside of the folder; nothing was "
                            "downloaded.")
    large = entry.get("lfs") or {}
    size = large.get("size", entry.get("size"))
    sha256, sha1 = str(large.get("sha256") or ""), "" if large else str(entry.get("blobId") or "")
    return _File(name, int(size) if size is not None else None, sha256 if _SHA256.fullmatch(sha256) else "",
                 sha1 if _SHA1.fullmatch(sha1) else "")


def _ask(client: httpx.Client, url: str, file: _File, headers: dict[str, str]) -> _File:
    """Complete what the list does not say with what the file's own headers say."""
    import httpx

    try:
        answer = client.head(url, headers=headers, follow_redirects=False)
        # the hub's own redirect, of a model that was renamed, says nothing of the file; that to its storage does
        while answer.next_request is not None and "X-Linked-Etag" not in answer.headers:
            answer = client.send(answer.next_request)
    except httpx.TransportError:
        return file  # the download itself will say
    tag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag", "")
    tag = tag.removeprefix("W/").strip('"')
    size = answer.headers.get("X-Linked-Size") or (
        answer.headers.get("Content-Length", "") if answer.status_code == 200 else "")
    return replace(file, size=int(size) if size.isdecimal() else file.size,
                   sha256=tag if _SHA256.fullmatch(tag) else "", git_sha1=tag if _SHA1.fullmatch(tag) else "")


def choose(names: Sequence[str], spec: PullSpec) -> frozenset[str]:
    """Return which files of a repository to download.

    Without patterns that is what a conversion needs: texts and safetensors at the top, never code, and pickles only
    where there is nothing else and they were allowed.

    Raises:
        NoModelFolder: nothing matches, or there are no weights.
        PickledWeights: there are only pickles.
    """
    def matching(patterns: Sequence[str], among: Sequence[str]) -> list[str]:
        return [name for name in among if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    if spec.include:
        chosen = matching(spec.include, names)
        if not chosen:
            raise NoModelFolder(f"No file of {spec.hub_id} matches {', '.join(spec.include)}; it has "
                                f"{', '.join(names[:10])}{' and more' if len(names) > 10 else ''}.")
        return frozenset(chosen)
    top = [name for name in names if "/" not in name]
    weights = matching(WEIGHTS, top)
    if not weights:
        pickles = matching(PICKLES, top)
        if pickles and not spec.allow_pickle:
            raise PickledWeights(f"{spec.hub_id} has only pickled weights ({pickles[0]}), and a pickle can run code "
                                 "when it is read. --allow-pickle downloads them; their tensors alone are read.")
        if not pickles:
            ggufs = [name for name in names if name.lower().endswith(".gguf")]
            raise NoModelFolder(f"{spec.hub_id} has no weights to convert" + (
                f", but GGUFs such as {ggufs[0]}; name one with --include." if ggufs else "."))
        weights = pickles
    return frozenset(weights + matching(TEXTS, top))


def _refusal(spec: PullSpec, status: int) -> ServerRefused:
    revision = "" if spec.revision == "main" else f" in revision {spec.revision}"
    said = {
        401: f"The hub has no {spec.hub_id}, or shows it only to those who may see it; check the spelling, or set "
             "HF_TOKEN to a token of yours.",
        403: f"The hub does not let {'this token' if spec.token else 'you'} have {spec.hub_id}: accept its terms on "
             f"its page{'' if spec.token else ', and set HF_TOKEN'}.",
        404: f"The hub has no {spec.hub_id}{revision}; check the spelling.",
    }.get(status, f"The hub answered {status} for {spec.hub_id}; try again later.")
    return ServerRefused(said, status)
