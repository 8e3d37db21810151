"""A server's memory under load, and how it starts and stops."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import families
import mlx.core as mx
import openai
import pytest
from conftest import until
from mlx_lm.models import llama
from serving import serving

from mlx_streamexperts import StreamConfig, demo_model, plan
from mlx_streamexperts.server import _command as server
from mlx_streamexperts.server._generation import stock
from mlx_streamexperts.server._kv_admission import KVAdmission
from mlx_streamexperts.server._models import ModelProvider


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs most of its memory for the KV cache: 64 kB per token."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {"vocab_size": 12288, "num_hidden_layers": 4, "head_dim": 128}
    changes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    with mock.patch.dict(families.FAMILIES["qwen3_moe"], changes):
        families.build("qwen3_moe", folder, quantize=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(demo_model() / name)
    return folder


def smallest(folder: Path, context: int, chunk: int) -> tuple[int, list[str]]:
    """The smallest memory that works with this context, and a server's options for it."""
    config = StreamConfig(memory="2GB", context_tokens=context, prefill_tokens=chunk)
    memory = plan(str(folder), config=config).minimum
    options = ["--model", str(folder), "--memory", str(memory)]
    gc.collect()
    return memory, [*options, "--context-tokens", str(context), "--prefill-tokens", str(chunk)]


def twin_of(folder: Path, beside: Path) -> Path:
    """The same model under another name."""
    twin = beside / "twin"
    twin.mkdir()
    for file in folder.iterdir():
        (twin / file.name).symlink_to(file.resolve())
    return twin


def admit_everything(admission: KVAdmission, tokens: int) -> bool:
    admission.pending = tokens
    return True


def test_memory_holds_under_load(wide: Path) -> None:
    """At the smallest budget: 33 MB of KV cache, while eight requests at once would take 134 MB."""
    memory, options = smallest(wide, context=512, chunk=64)
    prompts = [f"{i} The system call " * 8 for i in range(8)]
    texts, peaks = [], []
    for bounded in (True, False):
        gc.collect()
        base = mx.get_active_memory()
        with (
            nullcontext() if bounded else mock.patch.object(KVAdmission, "admit", admit_everything),
            serving(*options) as running,
        ):
            mx.reset_peak_memory()
            bodies = [{"prompt": p, "max_tokens": 4, "temperature": 0} for p in prompts]
            with ThreadPoolExecutor(len(prompts)) as pool:
                replies = list(pool.map(running.post, bodies))
            texts.append([r["choices"][0]["text"] for status, r in replies if status == 200])
            peaks.append(mx.get_peak_memory() - base)
            if bounded:
                assert texts[0] == [running.text(p, 4) for p in prompts]
                budget = running.generator.admission.prompt_cache_budget()
                assert running.generator.prompt_cache.nbytes <= budget
    # Were all of them admitted at once, passes that do not fit would be refused, not run.
    assert len(texts[1]) < len(texts[0])
    assert max(peaks) <= memory


def test_memory_holds_for_a_prompt_as_long_as_the_context(wide: Path) -> None:
    """mlx-lm keeps its KV cache before the reply and takes it up again: it could be there twice."""
    memory, options = smallest(wide, context=1024, chunk=64)
    base = mx.get_active_memory()
    with serving(*options) as running:
        cache = running.generator.model_provider.expert_stream.plan.cache
        for _ in range(4):
            mx.reset_peak_memory()
            status, reply = running.post({"prompt": [5, 6, 7] * 338, "max_tokens": 4})
            assert status == 200, reply
            assert mx.get_peak_memory() - base <= memory
        assert running.generator.model_provider.expert_stream.plan.cache == cache


def test_memory_holds_where_prompts_join_and_leave_each_other(wide: Path) -> None:
    """Two that fill the context, new ones and kept ones: mlx-lm would have 1.3 times the memory."""
    memory, options = smallest(wide, context=1024, chunk=32)
    base = mx.get_active_memory()
    with (
        serving(*options) as running,
        ThreadPoolExecutor(2) as pool,
    ):
        bodies = [{"prompt": [5 + i, 6, 7] * (160 + i), "max_tokens": 4} for i in range(2)]
        said = []
        for _ in range(3):
            mx.reset_peak_memory()
            replies = list(pool.map(running.post, bodies))
            assert [status for status, _ in replies] == [200, 200]
            assert mx.get_peak_memory() - base <= memory
            said.append([r["choices"][0]["text"] for _, r in replies])
        cached = [r["usage"]["prompt_tokens_details"]["cached_tokens"] for _, r in replies]
        assert max(cached) > 400
    assert said == said[:1] * 3


def test_memory_holds_where_another_model_takes_over(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first one kept goes, and the second one's first prompt counts like all others.

    It counted as nothing, so that three short ones joined it, each padded to its length.
    """
    memory, options = smallest(wide, context=512, chunk=64)
    twin = twin_of(wide, tmp_path)
    started: list[int] = []
    original = KVAdmission.start

    def start(admission: KVAdmission, sequences: list[int]) -> None:
        started.append(admission.pending)
        original(admission, sequences)

    monkeypatch.setattr(KVAdmission, "start", start)
    base = mx.get_active_memory()
    with serving(*options, "--also-serve", str(twin)) as running, ThreadPoolExecutor(4) as pool:
        generator = running.generator
        before = generator.model_provider.expert_stream.plan.others
        assert running.post({"prompt": [5, 6, 7] * 150, "max_tokens": 1})[0] == 200
        mx.reset_peak_memory()
        bodies = [{"model": "twin", "prompt": [5, 6, 7] * 160, "max_tokens": 8}]
        bodies += [{"model": "twin", "prompt": [i, 6, 7], "max_tokens": 1} for i in range(3)]
        first = pool.submit(running.post, bodies[0])
        until(lambda: len(started) > 1)
        for reply in [first, *(pool.submit(running.post, b) for b in bodies[1:])]:
            assert reply.result()[0] == 200
        assert mx.get_peak_memory() - base <= memory
        assert generator.model_provider.expert_stream.plan.others <= before + 1_000_000
    assert started == [451, 488, 4, 4, 4]


def test_memory_holds_with_a_draft_model(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], not_compiled: None
) -> None:
    """Its KV cache is as large as the other model's, and both are kept together."""
    config = {
        "model_type": "llama", "vocab_size": 12288, "hidden_size": 16, "num_hidden_layers": 4,
        "intermediate_size": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "head_dim": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    families.write(tmp_path, config, llama.Model(llama.ModelArgs.from_dict(config)), shards=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(demo_model() / name)
    memory, options = smallest(wide, context=256, chunk=64)
    options += ["--draft-model", str(tmp_path)]
    assert server.main(["--port", "0", "--no-progress", *options]) == 1
    refused = capsys.readouterr().err.splitlines()[-1]
    assert f"for the draft model {tmp_path}: weights " in refused
    needed = int(re.findall("need ([0-9,]+) bytes", refused)[0].replace(",", ""))
    assert memory + (30 << 20) < needed < memory + (80 << 20)
    options[options.index(str(memory))] = str(needed)
    gc.collect()
    base = mx.get_active_memory()
    with serving(*options) as running:
        generator = running.generator
        cache = generator.model_provider.expert_stream.plan.cache
        mx.reset_peak_memory()
        for i in range(2):
            status, reply = running.post({"prompt": [5 + i, 6, 7] * 80, "max_tokens": 8})
            assert status == 200, reply
            assert mx.get_peak_memory() - base <= needed
            until(lambda: generator.prompt_cache.nbytes > 28 << 20)  # of two models
            assert generator.prompt_cache.nbytes <= generator.admission.prompt_cache_budget()
        assert generator.model_provider.expert_stream.plan.cache == cache


def test_a_reply_is_no_longer_than_the_room_and_what_was_said_is_reused(wide: Path) -> None:
    stocks = importlib.import_module("mlx_lm.generate").BatchGenerator
    limits = ["--context-tokens", "48", "--prefill-tokens", "16"]
    with serving("--model", str(wide), "--memory", "200MB", *limits) as running:
        assert stock.BatchGenerator is not stocks
        prompt = "The system call " * 4
        _, first = running.post({"prompt": prompt, "max_tokens": 4000})
        assert first["usage"]["total_tokens"] == 48
        assert first["choices"][0]["finish_reason"] == "length"
        status, refused = running.post({"prompt": "word " * 100})
        assert status == 400
        assert "--context-tokens" in refused["error"]["message"]
        _, again = running.post({"prompt": prompt + "is", "max_tokens": 1})
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 12
    assert stock.BatchGenerator is stocks


def test_a_second_model_takes_the_place_of_the_first(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []
    original = ModelProvider._load

    def measured(*args: object) -> None:
        mx.reset_peak_memory()
        original(*args)  # type: ignore[arg-type]
        peaks.append(mx.get_peak_memory() - base)

    monkeypatch.setattr(ModelProvider, "_load", measured)
    twin_of(wide, tmp_path)
    limits = ["--memory", "60MB", "--context-tokens", "64", "--prefill-tokens", "16"]
    gc.collect()
    base = mx.get_active_memory()
    with serving("--model", str(wide), "--also-serve", f"{tmp_path}/./twin", *limits) as running:
        assert [m.id for m in running.client().models.list()] == [wide.name, "twin"]
        first = running.text("The system call", 3)
        opened = running.generator.model_provider.expert_stream
        assert opened is not None
        assert running.text("The system call", 3, model="twin") == first
        assert opened is not running.generator.model_provider.expert_stream
        assert opened._closed
        with ThreadPoolExecutor(4) as pool:
            names = ["twin", wide.name, "default_model", f"{tmp_path}/./twin"]
            texts = pool.map(lambda n: running.text("The system call", 3, model=n), names)
            assert list(texts) == [first] * 4
        assert running.figures()["model"] in (wide.name, "twin")
    # Never two: the trunk is three quarters of what one takes.
    assert len(peaks) >= 2
    assert max(peaks) < 2 * opened.plan.trunk


def test_sigterm_ends_a_server_in_the_middle_of_a_reply() -> None:
    command = [sys.executable, "-m", "mlx_streamexperts.server", "--port", "0", "--no-progress"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stderr is not None
        line = next(x for x in process.stderr if x.startswith("Serving at "))
        url = line.split()[2].rstrip(":")
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
        (["--model", "/no/such/folder"], "/no/such/folder: there is no such folder"),
    ):
        assert server.main(["--port", "0", *quiet, *arguments]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
