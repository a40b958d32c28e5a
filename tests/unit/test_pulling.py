"""Downloading from a hub: resumed, checked, refused; against a server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import COMMIT, Hub, git_sha1, serve

from daemon.download import DownloadDamaged, DownloadInterrupted, ServerRefused
from daemon.errors import Interrupted
from daemon.pulling import Pulled, PullSpec, choose, pull
from loops.events import Progress
from loops.finetune.extra import TrainExtraMissing
from loops.finetune.model_folder import NoModelFolder, PickledWeights
from state.files import DiskFull
from state.lock import Lock, StateBusy

pytest.importorskip("huggingface_hub")

WEIGHTS = bytes(range(256)) * 2000
FILES = {"config.json": b'{"architectures": ["X"]}', "tokenizer.json": b"{}", "model.safetensors": WEIGHTS,
         "modeling_x.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"# X",
         "onnx/model.onnx": b"o"}
CHOSEN = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(dict(FILES), {"model.safetensors", "pytorch_model.bin"})) as served:
        yield served


def get(hub: Hub, folder: Path, **options: Any) -> Pulled:
    return pull(PullSpec("owner/model", folder, endpoint=hub.url, **options), pause=lambda _seconds: None)


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*")
            if file.is_file() and not file.name.startswith(".")}


def test_what_a_conversion_needs_is_downloaded_and_neither_code_nor_pickles(hub: Hub, tmp_path: Path) -> None:
    found = get(hub, tmp_path)
    assert content(tmp_path) == {name: FILES[name] for name in CHOSEN}
    assert sorted(found.files) == CHOSEN
    assert found.commit == COMMIT
    assert json.loads((tmp_path / ".nightpress-pull.json").read_text())["commit"] == COMMIT


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: FILES[name] for name in ("config.json", "model.safetensors")}
    hub.cuts = [len(FILES["config.json"]), 1000, 200_000]
    get(hub, tmp_path)
    ranges = [headers.get("Range") for method, path, headers in hub.requests
              if method == "GET" and path == "/storage/model.safetensors"]
    assert ranges == [None, "bytes=1000-", "bytes=201000-"]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_later_command_goes_on_where_an_earlier_one_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: FILES[name] for name in ("config.json", "model.safetensors")}
    hub.cuts = [len(FILES["config.json"]), 5000, *[0] * 8]
    with pytest.raises(DownloadInterrupted, match=r"model\.safetensors broke off"):
        get(hub, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]
    assert not (tmp_path / "model.safetensors").exists()
    hub.cuts.clear()
    hub.requests.clear()
    assert get(hub, tmp_path).reused == 1
    assert hub.downloads() == ["model.safetensors"]
    assert hub.requests[-1][2]["Range"] == "bytes=5000-"
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert not list(tmp_path.glob(".*.part"))


def test_what_is_there_is_not_downloaded_again_unless_it_changed(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path)
    hub.requests.clear()
    assert get(hub, tmp_path).reused == len(CHOSEN)
    assert hub.downloads() == []
    (tmp_path / "tokenizer.json").write_bytes(b"[]")
    get(hub, tmp_path)
    assert hub.downloads() == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_wrong_hash_is_refused_and_the_rest_kept(hub: Hub, tmp_path: Path, name: str) -> None:
    wrong = bytearray(FILES[name])
    wrong[-1] ^= 1
    hub.sent = {name: bytes(wrong)}
    with pytest.raises(DownloadDamaged, match="not what its hash says"):
        get(hub, tmp_path)
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.glob(f".{name}*.part"))
    hub.sent = {}
    get(hub, tmp_path)
    assert (tmp_path / name).read_bytes() == FILES[name]


@pytest.mark.parametrize("told", [{"blobs": False}, {"commit": ""}])
def test_without_a_hash_or_a_commit_nothing_is_downloaded(hub: Hub, tmp_path: Path, told: dict[str, Any]) -> None:
    vars(hub).update(told)
    with pytest.raises(ServerRefused, match=r"no (size or no hash|commit)"):
        get(hub, tmp_path / "new")
    assert hub.downloads() == []
    assert not (tmp_path / "new").exists()


def test_a_part_of_another_content_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: FILES[name] for name in ("config.json", "model.safetensors")}
    hub.cuts = [len(FILES["config.json"]), 5000, *[0] * 8]
    with pytest.raises(DownloadInterrupted):
        get(hub, tmp_path)
    hub.cuts.clear()
    hub.files["model.safetensors"] = changed = WEIGHTS[::-1]
    get(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == changed
    assert not list(tmp_path.glob(".*.part"))


def test_a_server_that_knows_no_ranges_sends_all_again(hub: Hub, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    hub.files = {"model.safetensors": WEIGHTS}
    hub.cuts = [1000]
    get(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_server_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.busy = 3
    get(hub, tmp_path)
    assert content(tmp_path).keys() == set(CHOSEN)


def test_a_list_is_asked_for_again_while_the_hub_is_busy_but_not_for_ever(hub: Hub, tmp_path: Path) -> None:
    for status in (429, 503):
        hub.requests.clear()
        hub.statuses["/api/models/owner/model/revision/main"] = status
        with pytest.raises(ServerRefused, match=f"answered {status}"):
            get(hub, tmp_path)
        assert len(hub.requests) == 3


def test_a_longer_answer_than_announced_is_damaged(hub: Hub, tmp_path: Path) -> None:
    hub.sent = {"model.safetensors": WEIGHTS + b"more"}
    with pytest.raises(DownloadDamaged):
        get(hub, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_answer_that_is_no_list_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.statuses["/api/models/owner/model/revision/main"] = 200
    with pytest.raises(ServerRefused, match="it is no hub"):
        get(hub, tmp_path)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_mine"  # noqa: S105 - of the fake
    get(hub, tmp_path, token="hf_mine")  # noqa: S106
    asked = {("/storage/" in path): headers.get("Authorization") for _, path, headers in hub.requests}
    assert asked == {False: "Bearer hf_mine", True: None}


@pytest.mark.parametrize(("status", "said"), [(401, "HF_TOKEN"), (403, "accept its terms"), (404, "check the spelling"),
                                              (418, "418"), ("GatedRepo", "accept its terms")])
def test_a_refusal_says_what_to_do(hub: Hub, tmp_path: Path, status: int | str, said: str) -> None:
    hub.error_code, status = (status, 401) if isinstance(status, str) else ("", status)
    hub.statuses["/api/models/owner/model/revision/main"] = status
    with pytest.raises(ServerRefused, match=said) as caught:
        get(hub, tmp_path / "new")
    assert caught.value.exit_code == 102
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_refused_leaves_the_others(hub: Hub, tmp_path: Path) -> None:
    hub.statuses[f"/owner/model/resolve/{COMMIT}/model.safetensors"] = 403
    with pytest.raises(ServerRefused, match="accept its terms"):
        get(hub, tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\evil.json", "evil\n.json"])
def test_no_file_leaves_the_folder(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files[name] = b"{}"
    with pytest.raises(ServerRefused, match="outside of the folder"):
        get(hub, tmp_path / "folder")
    assert list(tmp_path.rglob("evil*")) == []


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense", "http://[1"])
def test_no_answer_is_told_as_such(tmp_path: Path, endpoint: str) -> None:
    spec = PullSpec("owner/model", tmp_path, endpoint=endpoint)
    with pytest.raises(DownloadInterrupted, match="does not answer"):
        pull(spec, pause=lambda _seconds: None)


def test_an_id_that_is_none_is_refused_without_asking(hub: Hub, tmp_path: Path) -> None:
    for wrong in ("", "a/b/c", "../x", "a/..", "https://x/y", "a b"):
        with pytest.raises(ServerRefused, match="no id"):
            pull(PullSpec(wrong, tmp_path, endpoint=hub.url))
    assert hub.requests == []


def test_interrupting_keeps_what_came(hub: Hub, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.level == "model.safetensors":
            raise KeyboardInterrupt

    hub.files = {"model.safetensors": WEIGHTS * 8}
    with pytest.raises(Interrupted):
        pull(PullSpec("owner/model", tmp_path, endpoint=hub.url), stop)
    part, = tmp_path.glob(".*.part")
    assert (WEIGHTS * 8).startswith(part.read_bytes())
    assert part.stat().st_size


def test_a_full_disk_keeps_what_came(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"model.safetensors": WEIGHTS}
    monkeypatch.setenv("NIGHTPRESS_TESTING", "1")
    monkeypatch.setenv("NIGHTPRESS_FAILPOINT", "download.checked:raise:ENOSPC")
    with pytest.raises(DiskFull):
        get(hub, tmp_path)
    monkeypatch.delenv("NIGHTPRESS_FAILPOINT")
    hub.requests.clear()
    get(hub, tmp_path)
    assert hub.downloads() == []
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match="MB more than are free"):
        get(hub, tmp_path / "other")


def test_the_library_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loops.finetune.extra.find_spec", lambda _name: None)
    with pytest.raises(TrainExtraMissing, match=r"Downloading owner/model needs huggingface_hub.*nightpress\[train\]"):
        pull(PullSpec("owner/model", tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_two_downloads_into_one_folder_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    with Lock.acquire(tmp_path / ".nightpress-pull.lock", "another"), pytest.raises(StateBusy):
        get(hub, tmp_path)


def test_pickles_are_chosen_only_when_allowed_and_there_is_nothing_else() -> None:
    spec = PullSpec("owner/model", Path())
    with pytest.raises(PickledWeights, match="--allow-pickle"):
        choose(["config.json", "pytorch_model.bin"], spec)
    assert choose(["config.json", "pytorch_model.bin", "training_args.bin"],
                  PullSpec("owner/model", Path(), allow_pickle=True)) == {"config.json", "pytorch_model.bin"}
    assert "pytorch_model.bin" not in choose(list(FILES), PullSpec("owner/model", Path(), allow_pickle=True))


def test_a_repository_without_weights_names_its_ggufs() -> None:
    with pytest.raises(NoModelFolder, match=r"x-Q4\.gguf.*--include"):
        choose(["config.json", "x-Q4.gguf"], PullSpec("owner/model", Path()))
    assert choose(["x-Q4.gguf", "b"], PullSpec("owner/model", Path(), include=("*Q4*",))) == {"x-Q4.gguf"}
    with pytest.raises(NoModelFolder, match="matches"):
        choose(["a"], PullSpec("owner/model", Path(), include=("*Q4*",)))


def test_the_fake_names_content_as_git_does() -> None:
    assert git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert hashlib.sha256(WEIGHTS).hexdigest() != git_sha1(WEIGHTS)


def test_the_command_says_where_it_lies(hub: Hub, nightpress: Any) -> None:
    done = nightpress("pull", "owner/model", HF_ENDPOINT=hub.url)
    folder = nightpress.state / "models" / "owner" / "model"
    assert str(folder) in done.stdout
    assert content(folder).keys() == set(CHOSEN)
    assert json.loads(nightpress("pull", "owner/model", "--json", HF_ENDPOINT=hub.url).stdout)["reused"] == len(CHOSEN)
    refused = nightpress("pull", "owner/other", HF_ENDPOINT=hub.url, status=102)
    assert refused.stderr.count("\n") == 1
