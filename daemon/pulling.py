"""Models from a hub, by huggingface_hub: chosen files, one commit, every hash checked.

The library knows where the hub is, who asks and what a model consists of. The files are fetched here, over its
connection: its own download starts a file anew when the command is run again, and fetches large ones from other
servers in pieces that it does not keep.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from daemon.download import (
    STOPPED,
    Download,
    DownloadInterrupted,
    ServerRefused,
    Show,
    Wait,
    broken,
    fetch,
    wait,
)
from daemon.errors import Interrupted
from loops.finetune.extra import require
from loops.finetune.model_folder import NoModelFolder, PickledWeights
from state.clock import utc_now
from state.files import DiskFull, explained, make_folder, write_atomic
from state.lock import Lock

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
#: what a conversion needs, at the top of the repository
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")
WEIGHTS, PICKLES = ("model*.safetensors", "adapter_model*.safetensors"), ("pytorch_model*.bin", "adapter_model*.bin")
RECORD = ".nightpress-pull.json"
ATTEMPTS, TIMEOUT_S = 3, 30.0  #: of asking for the list
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
        endpoint: of the hub; None for the library's, which reads HF_ENDPOINT.
        token: of the user; None for the library's, which reads HF_TOKEN and its own file.
    """

    hub_id: str
    folder: Path
    revision: str = "main"
    include: tuple[str, ...] = ()
    allow_pickle: bool = False
    endpoint: str | None = None
    token: str | None = None


@dataclass(frozen=True)
class Pulled:
    """What was downloaded: where it lies, of which commit, and how much of it was there before."""

    folder: Path
    commit: str
    files: tuple[str, ...]
    n_bytes: int
    reused: int


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
        TrainExtraMissing: the library is not installed.
    """
    if not HUB_ID.fullmatch(spec.hub_id) or ".." in spec.hub_id:
        raise ServerRefused(f"{spec.hub_id[:100]!r} is no id of a hub; write OWNER/NAME.")
    require(f"Downloading {spec.hub_id}", "huggingface_hub")
    try:
        commit, listed = _list(spec, pause)
        chosen = choose([one.rfilename for one in listed], spec)
        wanted = {one.rfilename: _wanted(spec, commit, one) for one in listed if one.rfilename in chosen}
        with explained(spec.folder):
            make_folder(spec.folder, 0o755)
            lock = Lock.acquire(spec.folder / ".nightpress-pull.lock", "nightpress pull")
        with lock:
            return _download(spec, commit, wanted, show, pause)
    except KeyboardInterrupt:
        raise Interrupted(STOPPED) from None


def _list(spec: PullSpec, pause: Wait) -> tuple[str, list[Any]]:
    """Ask what a revision consists of; return its commit and its files."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=spec.endpoint, token=spec.token)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            info = api.model_info(spec.hub_id, revision=spec.revision, files_metadata=True, timeout=TIMEOUT_S)
            break
        except HfHubHTTPError as problem:
            status = problem.response.status_code
            if attempt == ATTEMPTS or (status < 500 and status != 429):
                raise _refusal(spec, status, problem.response.headers.get("X-Error-Code", "")) from problem
        except broken(get_session()) as problem:
            if attempt == ATTEMPTS:
                raise DownloadInterrupted(f"The hub {api.endpoint} does not answer ({str(problem)[:200]}); check the "
                                          "network, then run the same command again.") from problem
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ServerRefused(f"{api.endpoint} answers something else than a list of files: it is no hub."
                                ) from problem
        pause(float(2 ** attempt))
    if not info.sha or not _SHA1.fullmatch(info.sha) or not info.siblings:
        raise ServerRefused(f"{api.endpoint} names no commit and no files of {spec.hub_id}.")
    for file in info.siblings:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or re.search(r"[\\\0-\x1f]", file.rfilename) or not path.parts:
            raise ServerRefused(f"The hub lists a file {file.rfilename[:80]!r}, which would lie outside of the folder; "
                                "nothing was downloaded.")
    return info.sha, list(info.siblings)


def _wanted(spec: PullSpec, commit: str, file: Any) -> Download:
    """Return how to fetch a file of the list: a large one has a sha256, a small one git's name."""
    from huggingface_hub import hf_hub_url

    build_hf_headers: Any = import_module("huggingface_hub.utils").build_hf_headers  # no stub exports it

    sha256, sha1 = (str(file.lfs.sha256), "") if file.lfs else ("", str(file.blob_id))
    size = file.lfs.size if file.lfs else file.size
    if size is None or not (_SHA256.fullmatch(sha256) or _SHA1.fullmatch(sha1)):
        raise ServerRefused(f"The hub names no size or no hash of {file.rfilename}, so it could not be checked; "
                            "nothing was downloaded.")
    return Download(hf_hub_url(spec.hub_id, file.rfilename, revision=commit, endpoint=spec.endpoint),
                    spec.folder / file.rfilename, int(size), sha256, sha1, build_hf_headers(token=spec.token))


def _download(spec: PullSpec, commit: str, files: dict[str, Download], show: Show | None, pause: Wait) -> Pulled:
    from huggingface_hub import get_session

    record = _record(spec.folder)
    missing = {name: wanted for name, wanted in files.items() if not _is_known(record.get(name), wanted)}
    need = sum((wanted.size or 0) - wanted.done for wanted in missing.values())
    short = need - shutil.disk_usage(spec.folder).free
    if short > 0:
        raise DiskFull(f"{spec.hub_id} needs {need / 1e6:,.0f} MB, {short / 1e6:,.0f} MB more than are free in "
                       f"{spec.folder}; free some space, then run the same command again.")
    for name, wanted in missing.items():
        try:
            fetch(get_session(), wanted, show, pause)
        except ServerRefused as problem:
            raise _refusal(spec, problem.status, problem.code) from problem
        facts = wanted.target.stat()
        record[name] = {"hash": wanted.hash, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
        _write_record(spec, commit, record)  # after each file: what is finished is known as such
    _write_record(spec, commit, record)
    for part in spec.folder.rglob(".*.part"):  # of contents that the model no longer has
        with contextlib.suppress(OSError):
            part.unlink()
    return Pulled(spec.folder, commit, tuple(files), sum(wanted.size or 0 for wanted in files.values()),
                  len(files) - len(missing))


def _is_known(recorded: Any, wanted: Download) -> bool:
    """Tell whether a file is the one that was downloaded and checked before, untouched since."""
    if not isinstance(recorded, dict) or not wanted.target.is_file() or recorded.get("hash") != wanted.hash:
        return False
    facts = wanted.target.stat()
    return (recorded.get("size"), recorded.get("mtime_ns")) == (facts.st_size, facts.st_mtime_ns)


def _record(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_record(spec: PullSpec, commit: str, record: dict[str, Any]) -> None:
    with explained(spec.folder):
        write_atomic(spec.folder / RECORD, json.dumps(
            {"id": spec.hub_id, "revision": spec.revision, "commit": commit, "at": utc_now(), "files": record},
            indent=2).encode())


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


def _refusal(spec: PullSpec, status: int, code: str = "") -> ServerRefused:
    """Return what the hub's answer means; `code` is its own name for the reason."""
    if status == 403 or code == "GatedRepo":
        said = (f"The hub does not let you have {spec.hub_id}: accept its terms on its page, and set HF_TOKEN to a "
                "token of yours that may read it.")
    elif status == 404 and code != "RepoNotFound" and spec.revision != "main":
        said = f"The hub has no {spec.hub_id} in revision {spec.revision}; check the spelling."
    elif status == 404:
        said = f"The hub has no {spec.hub_id}; check the spelling."
    elif status == 401:
        said = (f"The hub has no {spec.hub_id}, or shows it only to those who may see it; check the spelling, or set "
                "HF_TOKEN to a token of yours.")
    else:
        said = f"The hub answered {status} for {spec.hub_id}; try again later."
    return ServerRefused(said, status, code)
