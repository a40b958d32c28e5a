"""A hub and a package index on this machine: what they send, and how they fail, is up to the test."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server has and does.

    Attributes:
        files: content by name of the model `owner/model`.
        large: names that are given through a redirect to storage, with their sha256.
        commit: of the model; '' where the list does not say it.
        error_code: the hub's name of the reason, beside a status of `statuses`.
        blobs: the list of files says sizes and hashes.
        sent: content that is really sent, where it differs.
        cuts: bytes after which the next answers of storage or files break off, in turn.
        statuses: by path, instead of the answer.
        busy: how many of the next downloads are answered by 503.
        ignore_ranges: always send the whole.
        token: that is asked for; '' for none.
        pages: other documents, by path.
        requests: method, path and headers of all requests.
    """

    files: dict[str, bytes]
    large: set[str] = field(default_factory=set)
    commit: str = COMMIT
    error_code: str = ""
    blobs: bool = True
    sent: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    busy: int = 0
    ignore_ranges: bool = False
    token: str = ""
    pages: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    storage: str = ""

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests
                if method == "GET" and ("/storage/" in path or ("/resolve/" in path and path.rpartition(
                    "/")[2] not in self.large))]


def git_sha1(content: bytes) -> str:
    """The name that git gives a content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        """Answer like GET, without content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, {name.title(): said for name, said in self.headers.items()}))
        if path in hub.statuses:
            self._answer(hub.statuses[path], X_Error_Code=hub.error_code)
        elif hub.token and "/storage/" not in path and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401)
        elif path == "/api/models/owner/model/revision/main":
            self._answer(200, json.dumps({"id": "owner/model", "sha": hub.commit, "siblings": [
                self._entry(name, content) for name, content in hub.files.items()]}).encode())
        elif path.startswith(f"/owner/model/resolve/{COMMIT}/"):
            self._resolve(path.removeprefix(f"/owner/model/resolve/{COMMIT}/"))
        elif path.startswith("/storage/"):
            self._send(path.removeprefix("/storage/"))
        elif path in hub.pages:
            self._cut_or_send(hub.pages[path])
        else:
            self._answer(404)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        if not self.hub.blobs:
            return {"rfilename": name}
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
        if name in self.hub.large:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _resolve(self, name: str) -> None:
        hub = self.hub
        if name not in hub.files:
            self._answer(404)
        elif name in hub.large:
            self._answer(302, Location=f"{hub.storage}/storage/{name}", X_Repo_Commit=COMMIT,
                         X_Linked_Size=str(len(hub.files[name])),
                         X_Linked_Etag=f'"{hashlib.sha256(hub.files[name]).hexdigest()}"')
        elif self.command == "HEAD":
            self._answer(200, ETag=f'"{git_sha1(hub.files[name])}"', X_Repo_Commit=COMMIT,
                         Content_Length=str(len(hub.files[name])))
        else:
            self._send(name)

    def _send(self, name: str) -> None:
        if self.hub.busy:
            self.hub.busy -= 1
            self._answer(503, Retry_After="0")
            return
        self._cut_or_send(self.hub.sent.get(name, self.hub.files[name]))

    def _cut_or_send(self, content: bytes) -> None:
        start, asked = 0, self.headers.get("Range", "")
        if asked and not self.hub.ignore_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self._answer(416, Content_Range=f"bytes */{len(content)}")
                return
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(0) if self.hub.cuts else len(rest)
        self.wfile.write(rest[:cut])
        if cut < len(rest):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_arguments: Any) -> None:
        """A client that goes away is what some tests do."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run a server for a hub, and a second one that stands for its storage."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
