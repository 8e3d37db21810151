"""What the server refuses, and that nothing that a request says harms it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
from serving import Running, serving, until

from mlx_streamexperts import demo_model, web

KEY = "open sesame"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving("--cache", "10MB", "--max-body", "20kB") as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(running: Running) -> Iterator[None]:
    """Whatever a test sends: the next request is answered."""
    yield
    assert running.text("NAME", 1)
    assert running.request("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 10_000, 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "finite"),
        (b'{"prompt": "a", "max_tokens": NaN}', 400, "finite"),
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": 5}, 400, "one string"),
        ({"prompt": ["a", "b"]}, 400, "one string"),
        ({"prompt": "\ud800"}, 400, "tokens"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "only: demo"),
        ({"prompt": "a", "model": "../../etc"}, 404, "only: demo"),
        ({"prompt": "a", "model": 5}, 400, "model"),
        ({"prompt": "a", "adapters": "/etc"}, 400, "--adapter-path"),
        ({"prompt": "a", "draft_model": "/etc"}, 400, "--draft-model"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "top_p": 2}, 400, "top_p"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream"),
        ({"prompt": "a", "stream_options": 5}, 400, "stream_options"),
        # Each of these ends mlx-lm's generation thread, and with it its server, when let through.
        ({"prompt": "a", "stop": 5}, 400, "stop"),
        ({"prompt": "a", "stop": [5]}, 400, "stop"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "top_k": 10**9, "temperature": 1}, 400, "top_k"),
        ({"prompt": "a", "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1": []}}, 400, "float"),
        ({"prompt": "a", "seed": -1}, 400, "seed"),
        ({"prompt": "a", "seed": 2**64}, 400, "seed"),
    ],
)
def test_bad_completions(running: Running, body: object, status: int, message: str) -> None:
    got, answer = running.post(body)
    assert got == status
    assert message in answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": 5}]}, "text"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "all"}, "tools"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
def test_bad_chats(running: Running, body: dict, message: str) -> None:
    got, answer = running.post(
        {"messages": [{"role": "user", "content": "a"}], **body} if body else body,
        "/v1/chat/completions",
    )
    assert got == 400
    assert message in answer["error"]["message"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "file:///etc/passwd", "/etc/passwd"])
def test_no_address_and_no_file_of_a_request_is_opened(
    running: Running, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.stock, "urlopen", lambda *_, **__: pytest.fail("it was fetched"))
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part]}]
    status, answer = running.post({"messages": messages}, "/v1/chat/completions")
    assert status == 400
    assert "data:" in answer["error"]["message"]


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1", "/v1/modelsx", "/../../etc/passwd", "/live.html", "/v1/models/%2Fetc"],
)
def test_unknown_paths(running: Running, path: str) -> None:
    status, headers, body = running.request("GET", path)
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["message"]
    assert running.request("POST", path, b"{}")[0] == 404


def test_a_body_that_is_too_long(running: Running) -> None:
    with pytest.raises(openai.APIStatusError) as e:
        running.client().completions.create(model="demo", prompt="a " * 2_000_000)
    assert e.value.status_code == 413
    assert "--max-body" in str(e.value)


@pytest.mark.parametrize("length", ["-1", "many", "1e3", "9" * 30, None])
def test_lengths_that_are_none(running: Running, length: str | None) -> None:
    head = "" if length is None else f"Content-Length: {length}\r\n"
    with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
        status = connection.recv(1 << 16).split()[1]
    assert status in (b"400", b"411", b"413")


def test_what_is_no_http_gets_an_answer_in_json(running: Running) -> None:
    for line in (b"nonsense\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
            connection.sendall(line)
            received = b""
            while part := connection.recv(1 << 16):
                received += part
        assert b'{"error": ' in received


def test_the_clients_own_errors(running: Running) -> None:
    client = running.client()
    with pytest.raises(openai.NotFoundError, match="only: demo"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="a", temperature=-1)


def test_nulls_mean_the_default(running: Running) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "seed", "tools", "logit_bias", "draft_model"))
    status, answer = running.post({"prompt": ["NAME"], "max_tokens": 1, **nulls})
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 1


def test_too_many_requests_are_turned_away(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MOST_REQUESTS", 1)
    stream = running.client().completions.create(
        model="demo", prompt="In the", max_tokens=2000, stream=True
    )
    next(iter(stream))
    with pytest.raises(openai.InternalServerError, match="under way"):
        running.client().completions.create(model="demo", prompt="a")
    stream.close()
    until(lambda: running.figures()["traffic"]["active"] == 0)


def test_a_slow_sender_holds_nobody_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.Handler, "timeout", 0.3)
    threads = threading.active_count()
    with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert running.text("NAME", 1)
        assert connection.recv(1) == b""  # it was dropped
    until(lambda: threading.active_count() <= threads)


def test_a_key_is_asked_for_wherever_something_is_shown(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as keyed:
        keyed.setattr(running.generator.cli_args, "api_key", KEY)
        for path in ("/live.json", "/metrics", "/v1/models"):
            assert running.request("GET", path)[0] == 401
            assert running.request("GET", path, Authorization=f"Bearer {KEY}")[0] == 200
            assert running.request("GET", path, Authorization="Bearer open")[0] == 401
        assert running.request("GET", "/health")[0] == 200
        assert running.request("GET", "/")[0] == 200  # the page has no figures, and asks
        assert running.post({"prompt": "NAME", "max_tokens": 1})[0] == 401
        with pytest.raises(openai.AuthenticationError):
            running.client(api_key="shut").completions.create(model="demo", prompt="NAME")
        answer = running.client(api_key=KEY).completions.create(
            model="demo", prompt="NAME", max_tokens=1
        )
        assert answer.choices[0].text
        assert str(demo_model()) not in running.request("GET", "/")[2].decode()
