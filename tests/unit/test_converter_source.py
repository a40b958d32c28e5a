"""Fetching the converter: from the index that pip uses, verified, remembered, and none of its code run."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve

from daemon import converter_source
from daemon.converter_source import WITHIN, engine_version, find_converter, find_link, index_url
from daemon.download import DownloadDamaged
from loops.finetune.converter import ConverterMissing

VERSION = "9.9.9"
NAME = f"llama_cpp_python-{VERSION}.tar.gz"
SCRIPTS = {f"{WITHIN}/convert_hf_to_gguf.py": b"# converts", f"{WITHIN}/convert_lora_to_gguf.py": b"# adapters",
           f"{WITHIN}/conversion/__init__.py": b"TEXT_MODEL_MAP = {}", f"{WITHIN}/gguf-py/gguf/__init__.py": b""}


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/{name}")
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return packed.getvalue()


ARCHIVE = archive({**SCRIPTS, "setup.py": b"raise SystemExit('code of the archive ran')", "pyproject.toml": b"nonsense",
                   f"{WITHIN}/src/llama.cpp": b"much", f"{WITHIN}/AGENTS.md": b"to be left"})


def page(content: bytes, fragment: str | None = None) -> bytes:
    told = f"sha256={hashlib.sha256(content).hexdigest()}" if fragment is None else fragment
    return (f'<html><a href="../../files/{NAME}x">no</a><a href="../../files/{NAME}#{told}">{NAME}</a></html>').encode()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(converter_source, "engine_version", lambda: VERSION)
    with serve(Hub({}, pages={"/simple/llama-cpp-python/": page(ARCHIVE), f"/files/{NAME}": ARCHIVE})) as served:
        monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple")
        yield served


def fetched(index: Hub) -> int:
    return sum(path.startswith("/files/") for _, path, _ in index.requests)


def test_the_converter_is_fetched_once_and_only_what_it_needs(index: Hub, tmp_path: Path) -> None:
    found = find_converter(None, tmp_path)
    assert found.version == VERSION
    kept = {file.relative_to(found.folder).as_posix() for file in found.folder.rglob("*") if file.is_file()}
    assert kept == {name.removeprefix(f"{WITHIN}/") for name in SCRIPTS} | {"source.json"}
    assert find_converter(None, tmp_path) == found
    assert fetched(index) == 1
    assert not list((tmp_path / "llama.cpp").glob("*.tar.gz"))


def test_a_converter_that_was_changed_is_fetched_again(index: Hub, tmp_path: Path) -> None:
    script = find_converter(None, tmp_path).folder / "convert_hf_to_gguf.py"
    script.write_bytes(b"# something else")
    find_converter(None, tmp_path)
    assert script.read_bytes() == SCRIPTS[f"{WITHIN}/convert_hf_to_gguf.py"]
    assert fetched(index) == 2


def test_a_broken_download_goes_on(index: Hub, tmp_path: Path) -> None:
    index.cuts = [len(index.pages["/simple/llama-cpp-python/"]), 100]
    assert find_converter(None, tmp_path, pause=lambda _seconds: None).version == VERSION


@pytest.mark.parametrize("pinned", [True, False])
def test_another_content_than_announced_is_refused(index: Hub, tmp_path: Path, pinned: bool,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    if pinned:  # what the project knows goes before what the index says
        monkeypatch.setitem(converter_source.KNOWN, VERSION, "0" * 64)
    else:
        index.pages["/simple/llama-cpp-python/"] = page(ARCHIVE + b"x")
    with pytest.raises(DownloadDamaged):
        find_converter(None, tmp_path, pause=lambda _seconds: None)
    assert not (tmp_path / "llama.cpp" / VERSION).exists()


def test_without_a_hash_nothing_is_fetched(index: Hub, tmp_path: Path) -> None:
    index.pages["/simple/llama-cpp-python/"] = page(ARCHIVE, "md5=0")
    with pytest.raises(ConverterMissing, match="no sha256"):
        find_converter(None, tmp_path)
    assert fetched(index) == 0


@pytest.mark.parametrize("broken", [archive({"setup.py": b""}), b"no archive at all"])
def test_an_archive_without_the_converter_is_refused(index: Hub, tmp_path: Path, broken: bytes) -> None:
    index.pages |= {"/simple/llama-cpp-python/": page(broken), f"/files/{NAME}": broken}
    with pytest.raises(ConverterMissing):
        find_converter(None, tmp_path)
    assert sorted(path.name for path in (tmp_path / "llama.cpp").iterdir()) == ["lock"]


def test_an_index_that_lacks_it_or_does_not_answer_is_told(index: Hub, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    index.pages["/simple/llama-cpp-python/"] = b"<html></html>"
    with pytest.raises(ConverterMissing, match="does not list"):
        find_converter(None, tmp_path)
    index.statuses["/simple/llama-cpp-python/"] = 404
    with pytest.raises(ConverterMissing, match=r"404.*--llama-cpp"):
        find_converter(None, tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(ConverterMissing, match=r"cannot be fetched from http://127.0.0.1:9/simple") as caught:
        find_converter(None, tmp_path, pause=lambda _seconds: None)
    assert "secret" not in str(caught.value)


def test_a_folder_of_the_users_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, content in SCRIPTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert find_converter(tmp_path, tmp_path / "state").folder == tmp_path / WITHIN
    assert find_converter(tmp_path / WITHIN, tmp_path / "state").folder == tmp_path / WITHIN
    with pytest.raises(ConverterMissing, match=r"lacks convert_hf_to_gguf\.py"):
        find_converter(tmp_path / "vendor", tmp_path / "state")


def test_the_pinned_engine_has_a_known_archive() -> None:
    assert engine_version() in converter_source.KNOWN


def test_the_index_is_the_one_that_pip_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("UV_INDEX_URL", raising=False)
    pytest.importorskip("pip")
    assert index_url().startswith(("https://", "http://"))
    monkeypatch.setenv("PIP_INDEX_URL", "file:///somewhere")
    with pytest.raises(ConverterMissing, match="PIP_INDEX_URL"):
        index_url()


def test_links_are_resolved_against_the_page() -> None:
    assert find_link(page(ARCHIVE).decode(), "https://index.example/simple/llama-cpp-python/", NAME) == (
        f"https://index.example/files/{NAME}", hashlib.sha256(ARCHIVE).hexdigest())
