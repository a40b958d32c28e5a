"""Where llama.cpp's converter comes from: the source archive of the engine's own release, fetched once and verified.

The archive is taken from the package index that pip uses, as a file: no code in it runs while it is fetched, as
`pip download` would have its build backend do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag, urljoin, urlsplit

from daemon.download import TIMEOUT_S, Download, DownloadInterrupted, ServerRefused, Show, Wait, broken, fetch, wait
from loops.events import Note
from loops.finetune.converter import PARTS, Converter, ConverterMissing, check_layout
from state.clock import utc_now
from state.files import explained, make_folder, rename, write_atomic
from state.lock import Lock

PACKAGE = "llama-cpp-python"
#: sha256 of the source archive of the release that Nightpress is pinned to; of others the index's word is taken
KNOWN = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
WITHIN = "vendor/llama.cpp"  #: of the archive
RECORD = "source.json"
MAX_BYTES = 256 << 20  #: of what is unpacked; the parts that are needed have 2 MB


def engine_version() -> str:
    """Return the version of the installed engine.

    Raises:
        ConverterMissing: there is none.
    """
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as problem:
        raise ConverterMissing(f"{PACKAGE} is not installed, so nobody knows which converter belongs to it: "
                               f"pip install {PACKAGE}") from problem


def find_converter(given: Path | None, state_dir: Path, show: Show | None = None, pause: Wait = wait) -> Converter:
    """Return the converter: the folder given, else the remembered one of the engine's version, else a fresh one.

    Args:
        given: a folder of llama.cpp, or an unpacked source archive of llama-cpp-python.
        state_dir: under which it is remembered.
        show: is told how far a download is.
        pause: waits between attempts.

    Raises:
        ConverterMissing: the folder is none, or it cannot be fetched; the message says why.
        DownloadDamaged, DownloadInterrupted, DiskFull: see `fetch`.
    """
    if given is not None:
        folder = given / WITHIN if (given / WITHIN).is_dir() else given
        check_layout(folder)
        return Converter(folder.absolute())
    version = engine_version()
    home = state_dir.absolute() / "llama.cpp"
    target = home / version
    if _is_sound(target, version):
        return Converter(target, version)
    with explained(home):
        make_folder(home, 0o700)
        lock = Lock.acquire(home / "lock", "nightpress convert", wait_s=600.0)
    with lock:
        if not _is_sound(target, version):  # another process may have fetched it meanwhile
            _fetch(version, target, show, pause)
    return Converter(target, version)


def _is_sound(folder: Path, version: str) -> bool:
    """Tell whether a remembered converter is whole and unchanged since it was unpacked."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        check_layout(folder)
        return bool(record["version"] == version and record["tree"] == tree_hash(folder))
    except (OSError, ValueError, KeyError, TypeError, ConverterMissing):
        return False


def tree_hash(folder: Path) -> str:
    """Return the sha256 over the names and contents of all files of a converter."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != RECORD and "__pycache__" not in name:
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _fetch(version: str, target: Path, show: Show | None, pause: Wait) -> None:
    index = index_url()
    name = f"{PACKAGE.replace('-', '_')}-{version}.tar.gz"
    archive = target.parent / name
    if show is not None:
        show(Note(f"Fetching the source of {PACKAGE} {version} once, for its converter."))
    import certifi
    import httpx

    trust = ssl.create_default_context()  # what this machine trusts, as an index of one's own may need
    trust.load_verify_locations(certifi.where())
    with httpx.Client(verify=trust, follow_redirects=True, timeout=TIMEOUT_S) as client:
        unreachable: tuple[type[Exception], ...] = (*broken(client), DownloadInterrupted)
        page = f"{index}/{PACKAGE}/"
        try:
            answer = client.get(page, headers={"Accept": "text/html"})
            if answer.status_code != 200:
                raise ConverterMissing(f"{_shown(page)} answered {answer.status_code}. {_advice(version)}")
            url, sha256 = find_link(answer.text, str(answer.url), name)
            expected = KNOWN.get(version) or sha256
            if not expected:
                raise ConverterMissing(f"The package index has no sha256 of {name}, so it could not be verified. "
                                       f"{_advice(version)}")
            fetch(client, Download(url, archive, sha256=expected), show, pause)
        except unreachable as problem:
            raise ConverterMissing(f"The converter cannot be fetched from {_shown(index)} "
                                   f"({str(problem)[:200]}). {_advice(version)}") from problem
        except ServerRefused as problem:
            raise ConverterMissing(f"{problem} {_advice(version)}") from problem
    try:
        _unpack(archive, version, expected, target)
    finally:
        with contextlib.suppress(OSError):
            archive.unlink()


def _advice(version: str) -> str:
    return (f"Unpack the source archive of {PACKAGE} {version} yourself and name its folder with --llama-cpp.")


def _shown(url: str) -> str:
    """Return a URL without the user and password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def index_url() -> str:
    """Return the address of the package index that pip is set to.

    Raises:
        ConverterMissing: there is no pip to ask, or its index is no web address.
    """
    given = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_INDEX_URL") or _configured() or _default()
    if not given.startswith(("http://", "https://")):
        raise ConverterMissing("The package index is not known; set PIP_INDEX_URL, or name a folder of llama.cpp with "
                               "--llama-cpp.")
    return given.rstrip("/")


def _pip(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True,  # noqa: S603
                          check=False, stdin=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "1000"})
    return done.stdout if done.returncode == 0 else ""


def _configured() -> str:
    return _pip("config", "get", "global.index-url").strip()


def _default() -> str:
    """Return the index that pip's own help names."""
    found = re.search(r"--index-url <url>.*?\(default:? (https?://[^\s)]+)\)", _pip("download", "--help"), re.DOTALL)
    return found[1] if found else ""


class _Links(HTMLParser):
    """The links of a page of a simple index (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def find_link(page: str, base: str, name: str) -> tuple[str, str]:
    """Return the address of a file on a page of an index, and the sha256 that the page gives it, or ''.

    Raises:
        ConverterMissing: the page does not list the file.
    """
    parser = _Links()
    parser.feed(page)
    for link in parser.found:
        url, fragment = urldefrag(urljoin(base, link))
        if PurePosixPath(urlsplit(url).path).name == name:
            kind, _, value = fragment.partition("=")
            return url, value if kind == "sha256" and re.fullmatch(r"[0-9a-f]{64}", value) else ""
    raise ConverterMissing(f"The package index does not list {name}; name a folder of llama.cpp with --llama-cpp.")


def _unpack(archive: Path, version: str, sha256: str, target: Path) -> None:
    """Take the converter out of an archive; its folder appears whole."""
    folder = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    try:
        with explained(target.parent):
            try:
                with tarfile.open(archive, "r:gz") as opened:
                    opened.extractall(folder, members=_wanted(opened), filter="data")
            except (tarfile.TarError, EOFError) as problem:
                raise ConverterMissing(f"{archive.name} cannot be unpacked: {problem}.") from problem
            check_layout(folder)
            write_atomic(folder / RECORD, json.dumps(
                {"version": version, "archive_sha256": sha256, "tree": tree_hash(folder), "at": utc_now()},
                indent=2).encode())
            if target.exists():
                shutil.rmtree(target)
            rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wanted(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members that the converter consists of, each renamed to where it belongs."""
    total = 0
    for member in opened:
        _, _, within = member.name.partition(f"/{WITHIN}/")
        if within.partition("/")[0] in PARTS and member.isfile():
            total += member.size
            if total > MAX_BYTES:
                raise ConverterMissing(f"The converter in the archive is larger than {MAX_BYTES >> 20} MB: it is not "
                                       "what it should be.")
            yield member.replace(name=within)
