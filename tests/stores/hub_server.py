"""A server that behaves as the hub does: commits, redirects to signed URLs on another host, ranges, 403, 404, 429."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "0123456789" * 4


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that hang up early."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


Content = Callable[[int, int], bytes]


class HubFile:
    """Bytes of a file, which may be made up; ``lfs``: whether it is redirected to a signed URL."""

    def __init__(self, size: int, content: Content, lfs: bool, sha256: str) -> None:
        self.size, self.content, self.lfs, self.sha256 = size, content, lfs, sha256

    @classmethod
    def of(cls, data: bytes, lfs: bool) -> HubFile:
        return cls(len(data), lambda offset, size: data[offset : offset + size], lfs, hashlib.sha256(data).hexdigest())


class FakeHub:
    """One repository and its two hosts. What tests change while it runs are its public attributes."""

    def __init__(self, repository: str, files: dict[str, HubFile]) -> None:
        self.repository, self.files = repository, files
        self.commit, self.token = COMMIT, None
        self.lifetime: int | None = None  # requests that a signed URL lives for
        self.busy = 0  # so many answers are 429
        self.broken = 0  # so many answers are cut in the middle
        self.removed: set[str] = set()
        self.ranges = True
        self.etags: dict[str, str] = {}
        self.bytes, self.counts = 0, Counter()
        self._used: Counter[str] = Counter()
        self._signatures = 0
        self._lock = threading.Lock()
        self.hub, self.cdn = (_Server(("127.0.0.1", 0), self._handler(role)) for role in ("hub", "cdn"))
        for server in (self.hub, self.cdn):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_address[1]}"

    def close(self) -> None:
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def _handler(self, role: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, role, unquote(self.path))

            do_HEAD = do_GET  # noqa: N815  http.server calls it so

        return Handler

    def answer(self, request: BaseHTTPRequestHandler, role: str, path: str) -> None:
        with self._lock:
            self.counts[role] += 1
            busy = self.busy > 0
            self.busy -= busy
        if busy:
            return self._send(request, 429, b"slow down", {"Retry-After": "0.01"})
        if role == "cdn":
            return self._signed(request, path)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._send(request, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no access"})
        if path.startswith(f"/api/models/{self.repository}"):
            return self._tree(request) if "/tree/" in path else self._info(request, path)
        prefix = f"/{self.repository}/resolve/{self.commit}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.files or name in self.removed:
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._resolve(request, name)

    def _info(self, request: BaseHTTPRequestHandler, path: str) -> None:
        revision = path.partition("/revision/")[2].partition("?")[0]
        if revision not in ("", "main", self.commit):
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, file in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.sha256[:40]}
            if file.lfs:
                entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
            siblings.append(entry)
        info = {"id": self.repository, "modelId": self.repository, "sha": self.commit, "siblings": siblings}
        self._send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, request: BaseHTTPRequestHandler) -> None:
        """The listing that huggingface_hub downloads by."""
        entries = []
        for name, file in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.sha256[:40]}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        self._send(request, 200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, request: BaseHTTPRequestHandler, name: str) -> None:
        file = self.files[name]
        etag = self.etags.get(name, file.sha256 if file.lfs else file.sha256[:40])
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"'}
        if not file.lfs:
            return self._range(request, file, headers)
        with self._lock:
            self._signatures += 1
            number = self._signatures
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"http://127.0.0.1:{self.cdn.server_address[1]}/xet/{number}/{name}"
        self._send(request, 302, b"", headers)

    def _signed(self, request: BaseHTTPRequestHandler, path: str) -> None:
        _, _, number, name = path.split("/", 3)
        with self._lock:
            self._used[number] += 1
            expired = self.lifetime is not None and self._used[number] > self.lifetime
        if expired or "Authorization" in request.headers:
            return self._send(request, 403, b"expired", {})
        self._range(request, self.files[name], {})

    def _range(self, request: BaseHTTPRequestHandler, file: HubFile, headers: dict[str, str]) -> None:
        wanted = request.headers.get("Range", "").removeprefix("bytes=")
        if not wanted or not self.ranges:
            return self._send(request, 200, file.content(0, file.size), headers)
        first, last = (int(part) for part in wanted.split("-"))
        if first >= file.size:
            return self._send(request, 416, b"", headers)
        last = min(last, file.size - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{file.size}"}
        self._send(request, 206, file.content(first, last - first + 1), headers)

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        with self._lock:
            self.counts[status] += 1
            cut = status == 206 and self.broken > 0
            self.broken -= cut
            self.bytes += len(body)
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if cut:
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
        else:
            request.wfile.write(body)


def of_folder(repository: str, folder: Path) -> FakeHub:
    """A hub that has the files of a folder; safetensors files and those beyond 1 MB lie in large file storage."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        files[path.relative_to(folder).as_posix()] = HubFile.of(
            data, path.suffix == ".safetensors" or len(data) > 10**6
        )
    return FakeHub(repository, files)


@contextmanager
def served(hub: FakeHub, patch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Let huggingface_hub speak to this server, with an empty cache and short pauses."""
    from huggingface_hub import constants

    from halfbyte.stores import retry

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(retry, "FIRST_WAIT", 0.01)
    try:
        yield hub
    finally:
        hub.close()
