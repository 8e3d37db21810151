"""Prompts show how far they are, and stop at once: in the library, the commands and the server."""

from __future__ import annotations

import fcntl
import http.client
import io
import json
import os
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.chat as mlx_lm_chat
import numpy as np
import pytest
from conftest import all_experts, load_streamed, until
from mlx_lm.models.cache import make_prompt_cache
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, serving

from mlx_streamexperts import (
    ExpertStream,
    PassStoppedError,
    Progress,
    bench,
    chat,
    generate,
    stream,
)
from mlx_streamexperts._cli.options import ended
from mlx_streamexperts._cli.prompt_line import PromptLine
from mlx_streamexperts._experts import follower
from mlx_streamexperts._experts.layer import ExpertLayer
from mlx_streamexperts._memory.rewind import Rewind
from mlx_streamexperts._progress import StatusLine

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Model = tuple[nn.Module, ExpertStream]
TOKENS = families.token_stream(families.VOCAB, 60, seed=3).tolist()
SMALL = ["--cache", "10MB", "--no-progress"]


def test_a_prompt_tells_how_far_it_is(streamed: Model) -> None:
    model, expert_stream = streamed
    seen: list[Progress] = []
    with expert_stream.follow(seen.append, prompt_tokens=60) as followed:
        mx.eval(model(mx.array([TOKENS[:40]]), cache=make_prompt_cache(model)))
        assert followed.now().tokens == 40
    assert seen[-1].tokens == 40
    assert seen[-1].read_bytes == expert_stream.stats().read.bytes > 0
    assert 0 < seen[-1].seconds_left == pytest.approx(seen[-1].seconds / 2)
    count = len(seen)
    model(mx.array([TOKENS]))
    assert len(seen) == count  # closed


def test_progress_within_a_pass_counts_layers(streamed: Model) -> None:
    model, expert_stream = streamed
    with expert_stream.follow(prompt_tokens=30) as followed:
        seen = []
        for layer in expert_stream.layers:
            layer.on_call.add(lambda begins: seen.append(followed.now()) if begins else None)
        mx.eval(model(mx.array([TOKENS[:30]]), cache=make_prompt_cache(model)))
    count = len(expert_stream.layers)
    assert [p.layer for p in seen] == list(range(1, count + 1))
    assert [p.tokens for p in seen] == [30 * i // count for i in range(count)]
    assert f"layer 1 of {count}, " in str(seen[0])
    assert "of 30 tokens" in str(seen[0])


def logits(model: nn.Module, tokens: list[int], caches: list[Any]) -> np.ndarray:
    return np.array(model(mx.array([tokens]), cache=caches).astype(mx.float32))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v32"])
def test_a_pass_that_is_stopped_leaves_the_caches_as_they_were(
    family: str, checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    """Plain, recurrent, sliding, and nested caches; fresh ones and used ones."""
    model = load_streamed(checkpoint(family), 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(all_experts(expert_stream) // 2)
        whole = make_prompt_cache(model)
        expected = [logits(model, TOKENS[:20], whole), logits(model, TOKENS[20:], whole)]
        caches, calls = make_prompt_cache(model), 0

        def at_the_last_layer() -> bool:
            nonlocal calls
            calls += 1
            return expert_stream.layers[-1].on_call.now != ()

        got = []
        for part in (TOKENS[:20], TOKENS[20:]):
            with expert_stream.follow(stop=at_the_last_layer) as followed:
                followed._next_ask = float("inf")  # not before the last layer begins
                asked = expert_stream.layers[-1].on_call
                ask = lambda begins: setattr(followed, "_next_ask", 0.0)  # noqa: E731
                asked.now = (ask, *asked.now)
                with pytest.raises(PassStoppedError):
                    model(mx.array([part]), cache=caches)
                asked.remove(ask)
            got.append(logits(model, part, caches))
        assert calls == 2
        for a, b in zip(expected, got, strict=True):
            assert np.array_equal(a, b)


def test_a_pass_that_cannot_be_taken_back_runs_to_its_end(streamed: Model) -> None:
    model, expert_stream = streamed
    rewind = Rewind(make_prompt_cache(model), 5)
    with expert_stream.follow(stop=lambda: True) as followed:
        with pytest.raises(PassStoppedError):
            followed.begin_pass(5, rewind)
        rewind.drop()
        followed._next_ask = 0.0
        followed.begin_pass(5, rewind)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_terminal_has_one_line_and_a_pipe_some(kind: type[io.StringIO], streamed: Model) -> None:
    model, expert_stream = streamed
    file = kind()
    followed = expert_stream.follow(prompt_tokens=60)
    with followed, PromptLine(followed, file, seconds=0.01) as line:
        until(lambda: "Prompt: 0 of 60 tokens, 0.00 GB read" in file.getvalue())
        mx.eval(model(mx.array([TOKENS]), cache=make_prompt_cache(model)))
        line.generated(7)
        until(lambda: "Generating: 7 tokens" in file.getvalue())
    text = file.getvalue()
    if kind is Terminal:
        assert "\n" not in text
        assert text.endswith("\r\x1b[2K")  # nothing is left of it
    else:
        assert "\r" not in text
        assert text.endswith("s\n")


def test_a_line_is_no_wider_than_the_terminal() -> None:
    """One that wraps would leave its first row on the screen, each second."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    now = Progress(2048, 4000, 12, 48, 12_340_000_000, 58.0)
    with os.fdopen(theirs, "w") as file:
        line = StatusLine(lambda: f"Prompt: {now}", file, seconds=60)
        line.show()
        text = os.read(ours, 1000).decode().removeprefix("\r\x1b[2K")
        line.close()
    os.close(ours)
    assert text.startswith("Prompt: 2,048 of 4,000 tokens, layer 12 of 48, 12.34 GB read, ")
    assert len(f"Prompt: {now}") > 80 > len(text)


@pytest.fixture(autouse=True)
def ctrl_c_works() -> Iterator[None]:
    """A shell starts its background jobs with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("main", [generate.main, bench.main])
def test_ctrl_c_ends_a_command_with_one_line(
    main: Callable[[list[str]], int], capsys: Capture, monkeypatch: Patch
) -> None:
    prompt = ["-p", "In the beginning"] if main is generate.main else ["-p", "9", "-g", "9"]
    original, calls = ExpertLayer.account, 0

    def account(self: ExpertLayer, experts: np.ndarray) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 5:
            ctrl_c()
        return original(self, experts)

    monkeypatch.setattr(ExpertLayer, "account", account)
    assert main([*prompt, *SMALL]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by Ctrl-C"


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    """While it closed what was left, at its exit, it had shown a traceback."""
    assert ended(lambda: 0) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ended(ctrl_c) == 130  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def chatted(
    turns: list[str],
    capsys: Capture,
    monkeypatch: Patch,
    turn: int = 0,
    number: int = 0,
    act: Callable[[], None] = ctrl_c,
) -> tuple[list[str], str]:
    """What a chat says to each turn, and what it prints as errors.

    Args:
        turns: what the user types.
        turn, number: act in the layers' call of this number, after this turn was typed.
        act: by default, Ctrl-C.
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(t + "\n" for t in turns)))
    said: list[str] = []
    begin, add = mlx_lm_chat.ChatUI.prompt, mlx_lm_chat.ChatUI.stream_token
    original, calls = ExpertLayer.account, 0

    def prompt(self: Any) -> str:
        nonlocal calls
        calls = 0
        typed = str(begin(self))
        said.append("")
        return typed

    def stream_token(self: Any, text: str) -> None:
        said[-1] += text
        add(self, text)

    def account(self: ExpertLayer, experts: np.ndarray) -> list[int]:
        nonlocal calls
        calls += 1
        if (len(said), calls) == (turn, number):
            act()
        return original(self, experts)

    with monkeypatch.context() as m:
        m.setattr(mlx_lm_chat.ChatUI, "prompt", prompt)
        m.setattr(mlx_lm_chat.ChatUI, "stream_token", stream_token)
        m.setattr(ExpertLayer, "account", account)
        assert chat.main(["-m", "6", *SMALL]) == 0
    return said, capsys.readouterr().err


def test_ctrl_c_ends_a_reply_and_keeps_the_conversation(
    capsys: Capture, monkeypatch: Patch
) -> None:
    """In a prompt it is as if that turn had not been; a second one ends the chat."""
    monkeypatch.setattr(follower, "_ASK_SECONDS", 0.0)  # these prompts take less than a tenth
    typed = ["In the beginning", " and the"]
    expected, _ = chatted(typed, capsys, monkeypatch)
    three = [typed[0], "def main(", typed[1]]
    said, err = chatted(three, capsys, monkeypatch, turn=2, number=3)
    assert said == [expected[0], "", expected[1]]
    assert "(stopped; Ctrl-C again ends the chat)" in err

    said, _ = chatted(typed, capsys, monkeypatch, turn=1, number=8 * 4 + 3)  # 8 layers
    assert 0 < len(said[0]) < len(expected[0])
    assert expected[0].startswith(said[0])
    assert len(said[1]) > 0

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    said, _ = chatted(typed, capsys, monkeypatch, turn=1, number=3, act=twice)
    assert said == [""]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving("--cache", "10MB") as running:
        yield running


@contextmanager
def slow_layers(
    running: Running, seconds: float, until_seen: int
) -> Iterator[tuple[list[int], threading.Event]]:
    """Each layer's call of a prompt takes this long, as on a slow drive.

    Yields the calls, and an event. Call number `until_seen` waits for it, so that a slow machine
    can still see the prompt.
    """
    layers = running.generator.model_provider.expert_stream.layers
    follower = running.generator.model_provider.follower
    calls: list[int] = []
    seen = threading.Event()

    def wait(begins: bool) -> None:
        if begins and follower._pass_tokens > 8:
            calls.append(follower._pass_tokens)
            if len(calls) == until_seen:
                assert seen.wait(60)
            time.sleep(seconds)

    for layer in layers:
        layer.on_call.add(wait)
    yield calls, seen
    for layer in layers:
        layer.on_call.remove(wait)


def asked(running: Running, prompt: str, **options: Any) -> http.client.HTTPConnection:
    """A connection on which a streamed completion was asked for."""
    body = json.dumps({"prompt": prompt, "stream": True, "max_tokens": 2, **options})
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("POST", "/v1/completions", body)
    return connection


def test_the_server_tells_how_far_a_prompt_is(running: Running) -> None:
    """In comments of the reply, on the live page, and for Prometheus; at other times nothing."""
    with slow_layers(running, 0.3, 6) as (_, seen):
        connection = asked(running, "In the beginning God created the heaven and the earth")
        answer = connection.getresponse()
        comment = answer.readline().decode()
        prompt = running.figures()["prompt"]
        metrics = running.request("GET", "/metrics")[2].decode()
        seen.set()
        rest = answer.read().decode()
        connection.close()
    assert comment.startswith(": keepalive ")
    assert f"/{prompt['total']} (" in comment
    assert "of 8, " in comment
    assert "GB read" in comment
    assert 0 < prompt["layer"] <= prompt["layers"] == 8
    assert prompt["seconds"] > 1
    assert prompt["seconds_left"] > 0
    found = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(metrics)
        for s in family.samples
    }
    tokens = "streamexperts_prompt_under_way_tokens"
    assert found[tokens, "all"] == prompt["total"]
    assert 0 < found[tokens, "done"] < prompt["total"]
    assert rest.endswith("data: [DONE]\n\n")
    assert running.figures()["prompt"] is None


def test_a_prompt_whose_client_leaves_ends_within_the_chunk(running: Running) -> None:
    """Another request of the batch goes on, and nothing of the prompt is kept."""
    expected = running.text("Then said Jesus", 24)
    counted = running.generator.counters.stats().requests["cancelled"]
    kept = len(running.generator.prompt_cache)
    result: list[str] = []
    with slow_layers(running, 0.5, 3) as (calls, seen):
        other = threading.Thread(
            target=lambda: result.append(running.text("Then said Jesus", 24, seed=None))
        )
        connection = asked(running, "def main(): return the system call, in the beginning")
        until(lambda: (p := running.figures()["prompt"]) is not None and p["layer"] > 1)
        other.start()
        connection.close()
        seen.set()
        until(
            lambda: (
                running.generator.counters.stats().requests["cancelled"] > counted
                and running.figures()["prompt"] is None
            )
        )
        assert len(calls) < 8  # layers
        other.join()
    assert result == [expected]
    assert len(running.generator.prompt_cache) == kept


def test_sigterm_ends_a_prompt_within_the_chunk() -> None:
    with serving("--cache", "10MB") as running, slow_layers(running, 0.4, 3) as (calls, seen):
        connection = asked(running, "In the beginning God created the heaven and the earth")
        until(lambda: running.figures()["prompt"] is not None)
        running.generator.stopping = True  # as at SIGTERM; a signal needs the main thread
        running.generator._stop = True
        seen.set()
        running.generator.join()
        assert len(calls) < 8  # layers
        assert b"stopped" in connection.getresponse().read()
        connection.close()
