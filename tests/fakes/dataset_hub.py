"""A hub with one dataset, on this machine: as much of the Hugging Face hub's protocol as loading a dataset takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MOVED = "fedcba9876543210fedcba9876543210fedcba98"  #: where the branch is once it was looked up; it has no files


def _name(content: bytes) -> str:
    """Return a name for a content, as long as the hub's."""
    return hashlib.sha256(content).hexdigest()[:40]


class _Hub(ThreadingHTTPServer):
    daemon_threads = True
    name: str
    files: Mapping[str, bytes]
    card: Mapping[str, Any]
    head: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Hub

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode())

    def _entries(self, folder: str = "") -> list[dict[str, Any]]:
        return [{"type": "file", "path": path, "size": len(content), "oid": _name(content)}
                for path, content in self.server.files.items() if path.startswith(folder)]

    def _missing(self) -> None:
        self._answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{self.server.name}", f"/datasets/{self.server.name}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            sha = self.server.head if path == api else path.rpartition("/")[2]
            if path == api:
                self.server.head = MOVED
            self._json({"id": self.server.name, "sha": sha, "private": False, "gated": False, "disabled": False,
                        "downloads": 0, "likes": 0, "tags": [], "cardData": dict(self.server.card),
                        "siblings": [{"rfilename": name} for name in self.server.files]})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self._json(self._entries(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        elif path.startswith(f"{files}{COMMIT}/") and (
                name := path.removeprefix(f"{files}{COMMIT}/")) in self.server.files:
            content = self.server.files[name]
            self._answer(200, content, "application/octet-stream", ETag=f'"{_name(content)}"',
                         X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        elif path.startswith(files):
            self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self._missing()

    do_HEAD = do_GET  # noqa: N815  the name that the library asks for


@contextmanager
def serving(name: str, files: Mapping[str, bytes], card: Mapping[str, Any]) -> Iterator[str]:
    """Serve a dataset until the block is left; yield the address of the hub.

    Args:
        name: of the dataset, OWNER/NAME.
        files: their contents by path.
        card: what the head of its README says, such as its license.
    """
    server = _Hub(("127.0.0.1", 0), _Handler)
    server.name, server.files, server.card, server.head = name, files, card, COMMIT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="hub", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
