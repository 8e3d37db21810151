"""What a server holds in memory, and how it begins and ends."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from serving import serving

from mlx_streamexperts import demo_model, server
from mlx_streamexperts.serving import stock


def test_a_second_model_takes_the_place_of_the_first(tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in demo_model().iterdir():
        (twin / file.name).symlink_to(file)
    memory = 60_000_000  # one of them takes 44 MB beside its work space
    limits = ["--context-tokens", "256", "--prefill-tokens", "64"]
    base = mx.get_active_memory()
    with serving("--memory", str(memory), *limits, "--also-serve", str(twin)) as running:
        assert [m.id for m in running.client().models.list()] == ["demo", "twin"]
        first = running.text("The system call", 4)
        opened = running.generator.model_provider.expert_stream
        mx.reset_peak_memory()
        assert running.text("The system call", 4, model="twin") == first
        assert mx.get_peak_memory() - base <= memory
        assert opened is not running.generator.model_provider.expert_stream
        assert opened is not None
        assert opened._closed
        with ThreadPoolExecutor(4) as pool:
            names = ["twin", "demo", "twin", "demo"]
            texts = pool.map(lambda n: running.text("The system call", 4, model=n), names)
            assert list(texts) == [first] * 4
        assert mx.get_peak_memory() - base <= memory
        assert running.figures()["model"] in ("demo", "twin")


def test_memory_holds_under_load() -> None:
    memory = 50_000_000
    limits = ["--context-tokens", "512", "--prefill-tokens", "128"]
    stocks = importlib.import_module("mlx_lm.generate").BatchGenerator
    base = mx.get_active_memory()
    with serving("--memory", str(memory), *limits) as running:
        assert stock.BatchGenerator is not stocks
        mx.reset_peak_memory()
        prompts = [f"{i} The system call " * 8 for i in range(5)]
        with ThreadPoolExecutor(5) as pool:
            together = list(pool.map(lambda p: running.text(p, 3), prompts))
        assert mx.get_peak_memory() - base <= memory
        assert together == [running.text(p, 3) for p in prompts]
        kept = running.generator.prompt_cache.nbytes
        assert kept <= running.generator.room.kept_bytes()
        # No reply is longer than the room that was promised; no prompt is cut to fit.
        status, answer = running.post({"prompt": "the " * 500, "max_tokens": 4000})
        assert status == 200
        assert answer["usage"]["total_tokens"] == 512
        status, answer = running.post({"prompt": "word " * 3000})
        assert status == 400
        assert "--context-tokens" in answer["error"]["message"]
    assert stock.BatchGenerator is stocks


def test_sigterm_ends_a_server_in_the_middle_of_a_reply() -> None:
    command = [sys.executable, "-m", "mlx_streamexperts.server", "--port", "0", "--no-progress"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stderr is not None
        line = next(x for x in process.stderr if x.startswith("Serving at "))
        url = line.split()[-1]
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="demo", prompt="In the", max_tokens=3000, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_what_cannot_start_says_why_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["--no-progress", "--log-level", "ERROR"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert server.main(["--port", port, *quiet]) == 1
    assert f"127.0.0.1:{port}" in capsys.readouterr().err.splitlines()[-1]
    for arguments, message in (
        (["--memory", "1MB"], "too small"),
        (["--also-serve", str(demo_model())], "already"),
        (["--max-body", "much"], "not a size"),
        (["--model", "/no/such/folder"], "neither a model folder"),
    ):
        assert server.main(["--port", "0", *quiet, *arguments]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
