"""The server's log, its health while it loads, and how it stops."""

from __future__ import annotations

import json
import logging
import sys
import threading
from typing import Any

import pytest
from conftest import until
from serving import Running, serving

from mlx_streamexperts.server import _command as server
from mlx_streamexperts.server import _log as server_log
from mlx_streamexperts.server._models import ModelProvider


def test_one_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as running, caplog.at_level(logging.INFO):
        asked = {"prompt": "In the", "max_tokens": 2, "n": 2, "temperature": 1.0, "seed": 1}
        for i, body in enumerate(
            ({"prompt": "In the beginning", "max_tokens": 3}, asked, {"massages": []}), 1
        ):
            running.post(body)
            until(lambda i=i: len(lines(caplog)) == i)  # a line may follow its reply
        running.request("GET", "/v1/models")
        for polled in ("/health", "/live.json", "/metrics"):
            running.request("GET", polled)
        running.request("GET", "/nowhere")
        until(lambda: len(lines(caplog)) == 5)
    text, two, wrong, listed, nowhere = lines(caplog)
    assert (text.method, text.path, text.status) == ("POST", "/v1/completions", 200)
    assert (text.outcome, text.tokens) == ("completed", 3)
    assert text.prompt_tokens > 1
    assert text.first_token_seconds is not None
    assert 0 < text.first_token_seconds <= text.seconds
    assert (two.tokens, two.status) == (4, 200)
    assert (wrong.outcome, wrong.status, wrong.tokens) == ("refused", 400, 0)
    assert str(listed) == "127.0.0.1 GET '/v1/models' 200"
    assert nowhere.status == 404
    said = str(text)
    assert said.startswith("127.0.0.1 POST '/v1/completions' 200 completed in ")
    assert "tokens (0 cached), reply 3 tokens, the first after" in said
    ours = [r for r in caplog.records if server_log._is_ours(r) and r.levelno == logging.INFO]
    about_requests = [r for r in ours if hasattr(r, "answered")]
    assert len(about_requests) == 5
    assert not [r for r in ours if "progress" in r.getMessage()]


def lines(caplog: pytest.LogCaptureFixture) -> list[server_log.Answered]:
    return [r.answered for r in caplog.records if hasattr(r, "answered")]


def test_lines_of_json() -> None:
    form, answered = server_log._Json(), server_log.Answered("::1", "POST", "/v1/messages", 200)
    record = logging.LogRecord("root", logging.INFO, "x.py", 1, "hel%s", ("lo",), None)
    record.answered = answered
    found = json.loads(form.format(record))
    assert found["message"] == "hello"
    assert (found["path"], found["status"], found["tokens"]) == ("/v1/messages", 200, 0)
    assert found["first_token_seconds"] is None
    try:
        raise ValueError("what was wrong")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "what was wrong" in json.loads(form.format(record))["error"]


def test_health_waits_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, original = threading.Event(), ModelProvider.load_default

    def load_default(self: ModelProvider) -> Any:
        assert may_load.wait(60)
        return original(self)

    monkeypatch.setattr(ModelProvider, "load_default", load_default)
    with serving(at_once=True) as running:
        try:
            assert running.request("GET", "/health")[::2] == (503, b'{"status": "loading"}')
            assert running.figures()["model"] is None
        finally:
            may_load.set()
        assert len(running.text("In the", 2)) > 0  # it waits as long as it must
        assert running.request("GET", "/health")[::2] == (200, b'{"status": "ok"}')


def test_every_client_of_a_server_that_stops_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for room too; and each has its log line."""
    monkeypatch.setattr(server, "_LAST_SECONDS", 60.0)
    asked = {"prompt": "In the", "max_tokens": 100_000, "logit_bias": {"0": -100}}
    told: list[str] = []

    def ask(running: Running) -> None:
        told.append(str(running.post(asked)))

    with caplog.at_level(logging.INFO), serving("--context-tokens", "30000") as running:
        threads = [threading.Thread(target=ask, args=(running,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: running.figures()["traffic"]["tokens"] > 0)
        until(lambda: running.figures()["traffic"]["active"] == 3)
        until(lambda: running.generator._waiting is not None)
    ended = [(a.status, a.outcome) for a in lines(caplog) if a.outcome]
    assert ended == [(503, "cancelled")] * 3
    for thread in threads:
        thread.join()
    assert all(t.startswith("(503, ") and "the server is being stopped" in t for t in told)
    assert len(told) == 3
