"""`doctor` over HTTP: a server that answers as the Hub does, and counts what it sends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET

from mlx_streamexperts import plan

REPO = "some/repo"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the Hub's API as reading headers takes, over a local folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: dict[str, int] = {}  # bytes by file
        self.whole: list[str] = []  # files asked for without a range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entries(self) -> list[dict[str, Any]]:
        files = sorted(self.folder.iterdir())
        return [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": SHA} for f in files
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(rf"/api/models/{REPO}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": e["path"]} for e in self.server.entries()]
            self.answer_json({"id": REPO, "sha": SHA, "siblings": siblings})
        elif re.fullmatch(rf"/api/models/{REPO}/tree/[^/]+/?", path):
            self.answer_json(self.server.entries())
        elif match := re.fullmatch(rf"/{REPO}/resolve/[^/]+/([^/]+)", path):
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

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, file: Path) -> None:
        size = file.stat().st_size
        headers = {"ETag": f'"{SHA}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
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
        self.answer(206 if match else 200, data, headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub_server(checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Hub]:
    """A repository whose two shards say that they have 50 GB: what is not a header is a hole."""
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "remote"))
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 50_000_000_000)
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_doctor(server: Hub, tmp_path: Path, repo: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: where the Hub is is read once, when its library is imported."""
    local = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    dropped = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    command = [sys.executable, "-m", "mlx_streamexperts.doctor", "--model", repo, "--json"]
    command += ["--memory", "400MB", "--machine", "M4 Max 128 GB"]
    return subprocess.run(command, env={**kept, **local}, capture_output=True, text=True)


def test_doctor_fetches_headers_by_ranged_requests(hub_server: Hub, tmp_path: Path) -> None:
    done = run_doctor(hub_server, tmp_path, REPO)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["machines"]
    local = plan(hub_server.folder, memory="400MB", config=QUIET)
    for key in ("trunk", "experts", "cache", "minimum", "disk"):
        assert result["plan"][key] == getattr(local, key), key
    shards = {f.name for f in hub_server.folder.glob("*.safetensors")}
    assert not shards & set(hub_server.whole)
    assert all(0 < hub_server.sent[name] <= 2 << 20 for name in shards)  # blocks of 1 MiB


def test_a_repository_that_the_hub_does_not_know(hub_server: Hub, tmp_path: Path) -> None:
    done = run_doctor(hub_server, tmp_path, "other/repo")
    assert done.returncode == 1
    assert "error: other/repo is neither a model folder nor a repository" in done.stderr
    assert "Traceback" not in done.stderr
