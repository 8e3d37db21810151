"""The HTTP layer: bad requests get an error that names the fault, and harm no other request."""

from __future__ import annotations

import hmac
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from unittest import mock

import openai
import pytest
from conftest import until
from serving import Running, serving

from mlx_streamexperts import demo_model
from mlx_streamexperts.server import _command as server
from mlx_streamexperts.server import _http as web

KEY = "open sesame"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving("--cache", "10MB", "--max-body", "20kB") as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(running: Running) -> Iterator[None]:
    """Whatever a test sends, the next request is answered."""
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
        ({"prompt": 5}, 400, "a list of tokens"),
        ({"prompt": ["a", [1], 2]}, 400, "a list of tokens"),
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
        # Each of these would end mlx-lm's generation thread, and with it the server.
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
    [
        "/nothing", "/v1", "/v1/modelsx", "/../../etc/passwd", "/live.html", "/v1/models/%2Fetc",
        "/%2e%2e/%2e%2e/etc/passwd", "/live/../../etc/passwd", "//etc/passwd", "/..\\..\\etc",
        "/v1/models/..%2f..%2fetc%2fpasswd", "/live%00.html", "file:///etc/passwd",
        "http://127.0.0.1/etc/passwd", f"/v1/models/{demo_model()}/config.json",
    ],
)  # fmt: skip
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


def raw(running: Running, *sent: bytes) -> bytes:
    """Send some bytes; returns everything that comes back."""
    with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
        received = b""
        try:
            for part in sent:
                connection.sendall(part)
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionError:  # it was closed with bytes of ours unread
            pass
        return received


BODY = b'{"prompt": "NAME", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 35\r\nContent-Length: 2\r\n", b"400"),
        (b"Content-Length: 35\r\nContent-Length: 35\r\n", b"400"),
        (b"Content-Length: 35, 35\r\n", b"400"),
        (b"Content-Length: +35\r\n", b"400"),
        (b"Content-Length: 35\r\nTransfer-Encoding: chunked\r\n", b"411"),
        (b"Content-Length: 35\r\nTransfer-Encoding:\r\n", b"411"),
        (b"Content-Length: 35\r\n" + b"A: b\r\n" * 200, b"431"),
        (b"A: " + b"b" * 70_000 + b"\r\n", b"431"),
    ],
)
def test_headers_that_two_servers_may_read_differently(
    running: Running, headers: bytes, status: bytes
) -> None:
    assert len(BODY) == 35
    assert raw(running, POST + headers + b"\r\n" + BODY).split()[1] == status


def test_a_connection_is_for_one_request(running: Running) -> None:
    """Bytes after a body are never read as a request, so no request can be smuggled in."""
    head = b"Connection: keep-alive\r\nContent-Length: 35\r\n\r\n"
    answer = raw(running, POST + head + BODY + b"GET /live.json HTTP/1.1\r\n\r\n")
    assert answer.count(b"HTTP/1.0 ") == 1
    answer = raw(
        running, b"GET /health HTTP/1.1\r\nContent-Length: 24\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    )
    assert answer.count(b"HTTP/1.0 ") == 1


def test_no_header_of_a_request_comes_back(running: Running) -> None:
    for target in (b"/a%0d%0aX-Evil:%201", b"/a\rX-Evil: 1"):
        sent = b"GET " + target + b" HTTP/1.1\r\nOrigin: a\rX-Evil: 1\r\n\r\n"
        head, _, _ = raw(running, sent).partition(b"\r\n\r\n")
        assert b"evil" not in head.lower()


def test_an_address_that_is_none(running: Running) -> None:
    for method in (b"GET", b"POST"):
        answer = raw(running, method + b" http://[ HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        assert answer.split()[1] == b"400"
        assert b"not an address" in answer


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
    until(lambda: running.figures()["traffic"]["active"] == 0)
    monkeypatch.setattr(web, "MOST_REQUESTS", 1)
    stream = running.client().completions.create(
        model="demo", prompt="In the", max_tokens=2000, stream=True
    )
    next(iter(stream))
    with pytest.raises(openai.InternalServerError, match="under way"):
        running.client().completions.create(model="demo", prompt="a")
    stream.close()
    until(lambda: running.figures()["traffic"]["active"] == 0)


@contextmanager
def impatient(running: Running, send_buffer: int | None = None) -> Iterator[socket.socket]:
    """A client that the server waits 0.3 s for, and for no other one."""
    setup, taken = web.Handler.setup, threading.Event()

    def patched(self: web.Handler) -> None:
        self.timeout = 0.3
        setup(self)
        if send_buffer is not None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        taken.set()

    with socket.socket() as connection:
        connection.settimeout(60)
        if send_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, send_buffer)
        with mock.patch.object(web.Handler, "setup", patched):
            connection.connect(("127.0.0.1", running.port))
            assert taken.wait(60)
        yield connection


def test_a_slow_sender_holds_nobody_up(running: Running) -> None:
    threads = threading.active_count()
    with impatient(running) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert running.text("NAME", 1)
        assert connection.recv(1) == b""  # it was dropped
    until(lambda: threading.active_count() <= threads)


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        POST + b"Content-Length: 10000\r\n\r\n",
        POST + b"Content-Length: 100000\r\n\r\n",  # more than --max-body
    ],
)
def test_a_byte_now_and_then_keeps_no_thread(
    running: Running, begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.Handler, "timeout", 0.3)
    monkeypatch.setattr(web, "_SLOWEST", 1 << 30)
    with socket.create_connection(("127.0.0.1", running.port), 0.05) as connection:
        connection.sendall(begin)
        for _ in range(200):  # ten seconds: each byte long before any timeout of its own
            try:
                connection.sendall(b"a")
                if not connection.recv(1 << 16):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it was listened to all the time")


def test_a_client_that_takes_nothing_has_left(running: Running) -> None:
    before = running.figures()["traffic"]["requests"]["cancelled"]
    body = json.dumps({"prompt": "In the", "max_tokens": 3000, "stream": True}).encode()
    with impatient(running, send_buffer=1) as connection:
        connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running.figures()["traffic"]["requests"]["cancelled"] == before + 1)
        assert running.figures()["traffic"]["tokens"] < 3000


def test_hundreds_of_connections_that_say_nothing(running: Running) -> None:
    idle = [socket.create_connection(("127.0.0.1", running.port), 20) for _ in range(200)]
    try:
        assert running.text("NAME", 1)
    finally:
        for connection in idle:
            connection.close()
    until(lambda: not [t for t in threading.enumerate() if "process_request" in t.name])


def test_more_connections_than_there_may_be_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.rfile.read(1)

    monkeypatch.setattr(server.Server, "connections", 3)
    with server.Server(("127.0.0.1", 0), Waiting) as httpd:
        for _ in range(2):  # and a place that was left is free again
            clients = [socket.create_connection(httpd.server_address, 20) for _ in range(4)]
            for _ in clients:
                httpd.handle_request()
            assert clients[3].recv(1 << 16).split()[1] == b"503"
            for client in clients:
                client.close()
            until(lambda: httpd._free._value == 3)


def test_a_storm_of_clients_that_leave(running: Running) -> None:
    text = running.text("In the beginning", 4)
    before = running.figures()["traffic"]["requests"]["cancelled"]
    body = json.dumps({"prompt": "In the beginning", "max_tokens": 3000, "stream": True}).encode()
    head = POST + f"Content-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
            connection.sendall(head + body)
    until(lambda: running.figures()["traffic"]["requests"]["cancelled"] == before + 40)
    assert running.figures()["traffic"]["active"] == 0
    assert running.text("In the beginning", 4) == text
    until(lambda: not running.generator._clients)  # replies are sent before


def test_a_client_that_sends_more_and_leaves_is_missed(running: Running) -> None:
    """Whole replies: nothing is written to the client that could fail."""
    before = running.figures()["traffic"]["requests"]["cancelled"]
    asked = {"prompt": "In the beginning", "max_tokens": 3000, "n": 2, "logit_bias": {"0": -100}}
    body = json.dumps(asked).encode()
    with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
        connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running.figures()["traffic"]["active"] == 1)
        connection.sendall(b"\r\n" * 40_000)
    until(lambda: running.figures()["traffic"]["active"] == 0)
    assert running.figures()["traffic"]["requests"]["cancelled"] == before + 1


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


def test_how_a_key_is_compared(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(sent: bytes, key: bytes) -> bool:
        compared.append(sent)
        return hmac.compare_digest(sent, key)

    with monkeypatch.context() as keyed:
        keyed.setattr(running.generator.cli_args, "api_key", "clé")
        keyed.setattr(web, "hmac", SimpleNamespace(compare_digest=compare))  # constant time
        for sent, status in (
            ("X-API-Key: clé", b"200"), ("Authorization: bearer clé", b"200"),
            ("Authorization: Basic clé", b"401"), ("Authorization: Bearer", b"401"),
            ("Authorization: Bearer clé2", b"401"), ("X-API-Key:", b"401"),
        ):  # fmt: skip
            answer = raw(running, f"GET /v1/models HTTP/1.1\r\n{sent}\r\n\r\n".encode())
            assert answer.split()[1] == status, sent
    assert len(compared) == 6


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8080", 200), ("LocalHost.", 200), ("127.0.0.1:1", 200),
        ("127.1.2.3", 200), ("[::1]:8080", 200), ("[::1]", 200), ("here.example:8080", 200),
        ("evil.example", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("0.0.0.0", 403), ("192.168.0.2:8080", 403),
        ("[2001:db8::1]:80", 403), ("", 403), ("localhost@evil.example", 403),
        ("evil.example, localhost", 403), ("[evil.example", 403),
    ],
)  # fmt: skip
def test_on_a_loopback_address_only_loopback_names_are_answered(
    running: Running, host: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web page elsewhere whose name resolves to this machine (DNS rebinding) sees nothing."""
    monkeypatch.setattr(running.generator.cli_args, "allow_host", ["Here.example"])
    for method, path, body in (
        ("GET", "/live.json", None), ("GET", "/", None), ("GET", "/health", None),
        ("POST", "/v1/completions", BODY), ("OPTIONS", "/v1/completions", None),
    ):  # fmt: skip
        got, headers, answer = running.request(method, path, body, Host=host)
        assert got == status or (method == "OPTIONS" and got == 204 and status == 200)
        if status == 403:
            assert json.loads(answer)["error"]["code"] == "host_not_allowed"
            assert "access-control-allow-origin" not in headers or method != "GET"


def test_hosts_are_compared_where_a_server_can_be_reached_by_its_name(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = b"GET /live.json HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert raw(running, two).split()[1] == b"403"
    assert raw(running, b"GET /health HTTP/1.0\r\n\r\n").split()[1] == b"200"  # no browser
    monkeypatch.setattr(web, "is_loopback", lambda host: False)  # at 192.168.0.2, say
    assert running.request("GET", "/health", Host="any.example")[0] == 200
    monkeypatch.setattr(running.generator.cli_args, "allow_host", ["here.example"])
    assert running.request("GET", "/health", Host="any.example")[0] == 403
    assert running.request("GET", "/health", Host="here.example")[0] == 200


@pytest.mark.parametrize("length", [8_000_000, None])
def test_a_refused_client_that_is_still_sending_gets_its_answer(
    running: Running, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed with bytes unread, a connection is reset, and writing to it fails."""
    monkeypatch.setattr(web, "_DRAIN_SECONDS", 60.0)
    stated = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = f"POST /nothing HTTP/1.1\r\n{stated}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port), 60) as connection:
        connection.sendall(head)
        answer = connection.recv(1 << 16)  # its beginning: the server has answered
        for _ in range(80):
            connection.sendall(b"a" * 100_000)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            answer += part
    assert answer.split()[1] == b"404"
    assert b'"code": "not_found"' in answer


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/api/tags", "ollama"), ("POST", "/api/show", "ollama"),
        ("POST", "/api/generate?a", "ollama"), ("DELETE", "/api/delete", "ollama"),
        ("POST", "/v1/messages?beta=true", "anthropic"), ("GET", "/v1/messages", "anthropic"),
        ("POST", "/v1/messages/batches", "anthropic"), ("PUT", "/v1/messages", "anthropic"),
        ("POST", "/v1/responses", "openai"), ("GET", "/v1/models", "openai"),
    ],
)  # fmt: skip
def test_every_error_has_the_form_of_its_paths_api(
    running: Running, method: str, path: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a wrong key, of another host's name, and of what there is not."""
    monkeypatch.setattr(running.generator.cli_args, "api_key", KEY)
    key = {"Authorization": f"Bearer {KEY}"}
    for headers in ({}, {**key, "Host": "evil.example"}, key):
        status, _, raw = running.request(
            method, path, b"{}" if method == "POST" else None, **headers
        )
        if status < 400:
            continue
        answer = json.loads(raw)
        if kind == "ollama":
            assert isinstance(answer["error"], str)
        else:
            assert answer.get("type") == ("error" if kind == "anthropic" else None)
            assert answer["error"]["message"]
    monkeypatch.undo()


def test_head_is_get_without_its_body(running: Running) -> None:
    """Health checks of containers ask so (`wget --spider`)."""
    for path in ("/health", "/", "/live.json", "/v1/models", "/nowhere"):
        got, head = (running.request(method, path) for method in ("GET", "HEAD"))
        assert (head[0], head[2]) == (got[0], b"")
        assert head[1].keys() == got[1].keys()


def test_an_image_is_refused_by_a_model_that_takes_text_alone(running: Running) -> None:
    """Without a chat template, it would become text: all its bytes."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    body = {"messages": [{"role": "user", "content": [image]}], "max_tokens": 1}
    status, answer = running.post(body, "/v1/chat/completions")
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "text alone" in answer["error"]["message"]
