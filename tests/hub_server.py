"""A server that answers as the Hub does, counts what it sends, and can be made to lie."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "some/repo"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Answer:
    """What the server is about to send: bytes `begin` to `end` of a file of `size` bytes."""

    status: int  # 0: the connection is closed instead
    data: bytes
    headers: dict[str, str]
    begin: int
    end: int
    size: int
    sent: int | None = None  # bytes after which the connection breaks


class Hub(ThreadingHTTPServer):
    """As much of the Hub's API as reading headers takes, over a local folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: dict[str, int] = {}  # bytes by file
        self.whole: list[str] = []  # files asked for without a range
        self.asked = 0  # ranges of shards
        self.redirects = False  # send shards from elsewhere, as the Hub does
        self.lie: Callable[[Answer], None] = lambda answer: None
        """Changes the answer to a request for a part of a shard;
        by default it is right."""
        self.sha256: dict[str, str] = {}  # of content; the Hub knows that of shards

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entries(self) -> list[dict[str, Any]]:
        files = sorted(self.folder.iterdir())
        return [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": SHA} for f in files
        ]


def etag(name: str) -> str:
    """A file's: the Hub's cache keeps files of one and the same ETag once."""
    return f'"{hashlib.sha1(name.encode()).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(rf"/api/models/{REPO}(/revision/[^/]+)?", path):
            siblings = [
                {"rfilename": e["path"], "size": e["size"], "blobId": SHA, **self.lfs(e)}
                for e in self.server.entries()
            ]
            self.answer_json({"id": REPO, "sha": SHA, "siblings": siblings})
        elif re.fullmatch(rf"/api/models/{REPO}/tree/[^/]+/?", path):
            self.answer_json(self.server.entries())
        elif match := re.fullmatch(rf"/{REPO}/resolve/[^/]+/([^/]+)", path):
            if self.server.redirects and match[1].endswith(".safetensors"):
                to = {"Location": f"{self.server.url}/elsewhere/{match[1]}", "ETag": '"this"'}
                self.answer(302, b"", {**to, "X-Linked-Etag": etag(match[1])})
            else:
                self.answer_file(self.server.folder / match[1])
        elif match := re.fullmatch(r"/elsewhere/([^/]+)", path):
            self.answer_file(self.server.folder / match[1])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer_json(self.server.entries())  # paths-info: more than was asked for does no harm

    def do_HEAD(self) -> None:
        self.do_GET()

    def lfs(self, entry: dict[str, Any]) -> dict[str, Any]:
        sha256 = self.server.sha256.get(entry["path"])
        if sha256 is None:
            return {}
        return {"lfs": {"sha256": sha256, "size": entry["size"], "pointerSize": 134}}

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, file: Path) -> None:
        size = file.stat().st_size
        headers = {"ETag": etag(file.name), "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(match[1]), min(int(match[2]), size - 1)) if match else (0, size - 1)
        with file.open("rb") as f:
            f.seek(first)
            data = f.read(last + 1 - first)
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(data)
            if match is None:
                self.server.whole.append(file.name)
        if match is not None:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        answer = Answer(206 if match else 200, data, headers, first, last + 1, size)
        if self.command == "GET" and file.suffix == ".safetensors":
            self.server.asked += 1
            self.server.lie(answer)
        if answer.status == 0:
            self.close_connection = True
            return
        self.answer(answer.status, answer.data, answer.headers, answer.sent)

    def answer(
        self, status: int, data: bytes, headers: dict[str, str], sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        self.close_connection = sent is not None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A repository with the files of a folder."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the shards in a folder, by name."""
    files = folder.glob("*.safetensors")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
