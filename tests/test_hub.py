"""`doctor` over HTTP, from a server that answers as the Hub does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import QUIET
from hub_server import REPO, Hub, serving

from mlx_streamexperts import plan


@pytest.fixture
def hub_server(checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Hub]:
    """A repository whose two shards say that they have 50 GB: what is not a header is a hole."""
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "remote"))
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 50_000_000_000)
    with serving(folder) as server:
        yield server


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
