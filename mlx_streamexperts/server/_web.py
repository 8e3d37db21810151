"""What may come in from the network, and what goes out: limits, keys, routes, error replies.

Requests for text are checked here and then answered by mlx-lm's own handler. Nothing in a request
ever names a file that is opened.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import re
import socket
import time
from contextlib import suppress
from email.message import Message
from functools import cached_property
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm import server as stock

from .._errors import StreamError
from ._generation import Begun, Client, ClientGone, Generator, Refused, failed
from ._metrics import live, prometheus
from ._replies import Piece, Reply, completion_logprobs
from ._request_checks import checked

MOST_REQUESTS = 256
"""Requests that may be under way or waiting; more are refused with status 503."""

_SOCKET_SECONDS = 60.0  # for a request to come, and a client that takes nothing for so long left
_SLOWEST = 64 << 10  # bytes/s of a body, beside those seconds
_DRAIN_BYTES = 256 << 20  # read of a body that is too long, so that the client sees the answer
_DRAIN_SECONDS = 5.0
_MOST_DRAFTED = 64  # the pass that checks them is as long, and no plan knows of it
_TEXT_PATHS = ("/v1/chat/completions", "/chat/completions", "/v1/completions")


class LivePage:
    """The page, and the policy under which a browser runs nothing but it."""

    @cached_property
    def body(self) -> bytes:
        return files("mlx_streamexperts").joinpath("data", "live.html").read_bytes()

    @cached_property
    def policy(self) -> str:
        """Content-Security-Policy: this style, this script, and requests to this server."""
        sources = {}
        for tag in (b"style", b"script"):
            match = re.search(b"<%b>(.*?)</%b>" % (tag, tag), self.body, re.DOTALL)
            digest = hashlib.sha256(match[1] if match else b"").digest()
            sources[tag.decode()] = f"'sha256-{base64.b64encode(digest).decode()}'"
        return (
            f"default-src 'none'; style-src {sources['style']}; script-src {sources['script']}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )


_page = LivePage()


class _Arriving(io.RawIOBase):
    """What a client sends, until a deadline: a byte now and then does not keep a thread.

    Attributes:
        until: the deadline, of `time.monotonic`.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self.until = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._seconds)  # sending has its own


class Handler(stock.APIHandler):
    """mlx-lm's handler behind checks; see the module."""

    path: str
    response_generator: Any
    rfile: Any
    server: Any
    timeout = _SOCKET_SECONDS
    server_version, sys_version = "mlx-streamexperts", ""

    def __init__(self, generator: Generator, request: Any, *args: Any, **options: Any) -> None:
        self.generator = generator
        self.options = generator.cli_args
        self.began = False  # the reply has
        view: Any = Client(generator, request)
        super().__init__(view, request, *args, **options)

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._arriving = _Arriving(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._arriving)

    # Routes

    def do_GET(self) -> None:  # noqa: N802
        """Figures, the live page, the models; the rest is mlx-lm's."""
        try:
            self._check_host()
            self.path = _path_of(self.path)
            if self.path in ("/", "/live"):
                self._send(
                    _page.body, "text/html; charset=utf-8",
                    {"Content-Security-Policy": _page.policy, "Cache-Control": "no-cache"},
                )  # fmt: skip
            elif self.path == "/health":
                super().do_GET()
            elif self.path == "/live.json":
                self._authorize()
                self._send_json(live(self.generator))
            elif self.path == "/metrics":
                self._authorize()
                self._send(*prometheus(self.generator))
            elif self.path == "/v1/models" or self.path.startswith("/v1/models/"):
                self._authorize()
                self._send_models(unquote(self.path.removeprefix("/v1/models").lstrip("/")))
            else:
                raise Refused(404, f"there is nothing at {self.path[:200]}", "not_found")
        except Refused as e:
            self._refuse(e)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_OPTIONS(self) -> None:  # noqa: N802
        """What a browser asks before it lets a page send a request."""
        try:
            self._check_host()
            super().do_OPTIONS()
        except Refused as e:
            self._refuse(e)

    def do_POST(self) -> None:  # noqa: N802
        """Check a request for text, then let mlx-lm answer it."""
        traffic = self.generator.traffic
        try:
            self._check_host()
            self.path = _path_of(self.path)
            self._authorize()
            if self.path not in _TEXT_PATHS:
                raise Refused(404, f"there is nothing at {self.path[:200]}", "not_found")
            chat = self.path != "/v1/completions"
            asked = self._body()
            body = json.dumps(checked(asked, self.options.fetch_images, chat)).encode()
            if not traffic.begin(MOST_REQUESTS):
                raise Refused(503, f"{MOST_REQUESTS} requests are under way", "overloaded")
        except Refused as e:
            traffic.refused()
            self._refuse(e)
            return
        except (ConnectionError, TimeoutError):
            traffic.refused()
            self.close_connection = True
            return
        outcome, rfile = "failed", self.rfile
        try:
            del self.headers["Content-Length"]
            self.headers["Content-Length"] = str(len(body))
            self.rfile = io.BytesIO(body)
            super().do_POST()
            outcome = "completed"
        except Refused as e:
            outcome = {4: "refused"}.get(e.status // 100, "failed")
            outcome = "cancelled" if e.status == 499 else outcome
            self._refuse(e)
        except (ConnectionError, TimeoutError):  # ClientGone among them
            outcome = "cancelled"
            self.close_connection = True
            if self.generator.stopping:
                self._refuse(Refused(503, "the server is stopping", "stopping"))
        except Exception as e:
            if not isinstance(e, StreamError):
                logging.exception("a request failed")
            self._refuse(failed(e))
        finally:
            self.rfile = rfile
            self.response_generator.ended = True
            traffic.end(outcome)

    # Checks

    def _check_host(self) -> None:
        """Answer only those who know where they are.

        A web page elsewhere can let its own name stand for 127.0.0.1 (DNS rebinding): to a browser
        it is then of this server's origin. The name stays in the Host header.
        """
        allowed = [name.lower() for name in self.options.allow_host]
        if not allowed and not is_loopback(str(self.server.server_address[0])):
            return
        for given in self.headers.get_all("Host", []):
            name = _host_name(given)
            if not is_loopback(name) and name not in allowed:
                raise Refused(
                    403,
                    f"this server does not answer to the name {name[:200]!r} (--allow-host)",
                    "host_not_allowed",
                )

    def _authorize(self) -> None:
        """Compare the key, where the server has one."""
        if not self.options.api_key:
            return
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else self.headers.get("X-API-Key", "")
        sent = given.encode("latin-1", "replace")  # the bytes that came: http.server decodes so
        if not hmac.compare_digest(sent, self.options.api_key.encode()):
            raise Refused(401, "this server wants its API key as a bearer token", "invalid_api_key")

    def _body(self) -> dict[str, Any]:
        """The request's JSON object, no longer than the limit."""
        stated = self.headers.get_all("Content-Length", [])
        if not stated or "Transfer-Encoding" in self.headers:
            raise Refused(411, "a Content-Length is needed, and no Transfer-Encoding")
        if len(stated) > 1 or not re.fullmatch(r"[0-9]{1,15}", stated[0].strip()):
            raise Refused(400, "Content-Length is not one number")
        length, limit = int(stated[0]), self.options.max_body
        if length > limit:
            left = min(length, _DRAIN_BYTES)
            self._arriving.until = time.monotonic() + min(_DRAIN_SECONDS, self.timeout)
            with suppress(TimeoutError):
                while left > 0 and (got := len(self.rfile.read1(min(left, 1 << 16)))):
                    left -= got
            raise Refused(
                413, f"the body has {length} bytes, more than {limit} (--max-body)", "too_large"
            )
        self._arriving.until = time.monotonic() + self.timeout + length / _SLOWEST
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ClientGone
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}", "invalid_json") from e
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object", "invalid_json")
        return body

    def validate_model_parameters(self) -> None:
        try:
            super().validate_model_parameters()
        except (TypeError, ValueError, OverflowError) as e:
            raise Refused(400, str(e), "invalid_request") from e
        drafted = max(_MOST_DRAFTED, self.options.num_draft_tokens)
        if self.num_draft_tokens > drafted:
            message = f"num_draft_tokens must be at most {drafted}"
            raise Refused(400, message, "invalid_request", "num_draft_tokens")
        self.generator.model_provider.check(
            self.requested_model, self.adapter, self.requested_draft_model
        )

    def handle_chat_completions(self) -> Any:
        return self._made(super().handle_chat_completions)

    def handle_text_completions(self) -> Any:
        return self._made(super().handle_text_completions)

    def _made(self, make: Any) -> Any:
        try:
            return make()
        except Exception as e:
            raise Refused(400, str(e) or type(e).__name__, "invalid_request") from e

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Generate a reply and send it; mlx-lm's own part ends where the generator has begun."""
        try:
            super().handle_completion(request, [])  # mlx-lm looks for them among tokens
        except Begun as begun:
            try:
                self._answer(request, begun, stop_words)
                if self.generator.model_provider.is_distributed:  # the other ranks go on
                    for _ in begun.responses:
                        pass
            finally:
                begun.context.stop()
        finally:
            self.generator.forget(request)

    # Replies

    def _answer(self, request: Any, begun: Begun, stops: list[str]) -> None:
        """Send the reply, in pieces as they come or as a whole."""
        context = begun.context
        provider = self.generator.model_provider
        tokenizer = provider.tokenizer if begun.asked.logprobs else None
        reply = Reply(context, stops, tokenizer)
        calls = stock.ToolCallFormatter(context.tool_parser, request.tools, self.stream)
        if self.stream:
            self._set_stream_headers(200)
            self.end_headers()
        whole = Piece()
        for piece in reply.pieces(begun.responses):
            whole += piece
            if self.stream and whole:
                self._event(self._choice(whole, calls(whole.tools)))
                whole = Piece()
        usage = {
            "prompt_tokens": len(context.prompt),
            "completion_tokens": reply.tokens,
            "total_tokens": len(context.prompt) + reply.tokens,
            "prompt_tokens_details": {"cached_tokens": max(0, context.prompt_cache_count)},
        }
        if not self.stream:
            choice = self._choice(whole, calls(whole.tools))
            self._send_json({**self._head(), "choices": [choice], "usage": usage})
            return
        if (self.stream_options or {}).get("include_usage"):
            self._event(None, usage)
        self.wfile.write(b"data: [DONE]\n\n")
        self.wfile.flush()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "system_fingerprint": self.system_fingerprint,
            "object": self.object_type,
            "model": self.requested_model,
            "created": self.created,
        }

    def _event(self, choice: dict[str, Any] | None, usage: dict[str, Any] | None = None) -> None:
        event = {**self._head(), "choices": [] if choice is None else [choice]}
        if usage is not None:
            event["usage"] = usage
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _choice(self, piece: Piece, calls: list[Any]) -> dict[str, Any]:
        """A reply, or what is new of it, as OpenAI's API has it."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": piece.finish_reason}
        if self.object_type == "text_completion":
            choice["text"] = piece.text
            if piece.logprobs is not None:
                choice["logprobs"] = completion_logprobs(piece.logprobs)
            return choice
        message: dict[str, Any] = {"role": "assistant"}
        if piece.text or not self.stream:  # the schema wants the field in a whole reply
            message["content"] = piece.text or None
        if piece.reasoning:
            message["reasoning"] = piece.reasoning
        if calls:
            message["tool_calls"] = calls
        choice["delta" if self.stream else "message"] = message
        if piece.logprobs is not None:
            choice["logprobs"] = {"content": piece.logprobs}
        return choice

    def _send_models(self, name: str) -> None:
        provider = self.generator.model_provider
        models = [
            {"id": n, "object": "model", "created": self.created, "owned_by": "local"}
            for n in provider.listed
        ]
        if not name:
            self._send_json({"object": "list", "data": models})
            return
        if name not in provider.listed:
            raise Refused(404, f"this server does not serve {name[:200]!r}", "model_not_found")
        self._send_json(next(m for m in models if m["id"] == name))

    def _send(
        self, body: bytes, kind: str, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        if self.path.startswith("/v1/") or self.path.startswith("/chat/"):
            self._set_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status=status)

    def _refuse(self, refused: Refused) -> None:
        """An error reply, as OpenAI's API has them; in a reply that has begun, its last event."""
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
        error = {
            "message": refused.message, "type": kind, "param": refused.param, "code": refused.code
        }  # fmt: skip
        self.close_connection = True
        try:
            if self.began:
                self.wfile.write(f"data: {json.dumps({'error': error})}\n\n".encode())
            else:
                self._headers_buffer: list[bytes] = []  # of a reply that will not be sent
                self._send_json({"error": error}, refused.status)
        except (OSError, ValueError):
            pass  # nobody is there

    def end_headers(self) -> None:
        self.began = True
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the same form."""
        self.path, self.command = getattr(self, "path", ""), getattr(self, "command", None) or ""
        if not hasattr(self, "requestline"):
            self.requestline = ""
        if not hasattr(self, "request_version"):
            self.request_version = "HTTP/1.0"
        if not hasattr(self, "headers"):  # too many of them, or too long
            self.headers = Message()
        self._refuse(Refused(int(code), message or HTTPStatus(code).phrase))

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """One line a request, but none for those that ask every second."""
        if self.path not in ("/live.json", "/metrics", "/health"):
            logging.info(f"{self.address_string()} {self.command} {self.path!r} {int(code)}")

    def log_message(self, format: str, *args: Any) -> None:
        logging.info(format % args)


def _path_of(target: str) -> str:
    """The path that a request names; whatever else is in its first line does not matter."""
    try:
        return urlsplit(target).path
    except ValueError as e:  # "http://[", say
        raise Refused(400, f"not an address: {e}") from e


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, reached from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(given: str) -> str:
    """The name in a Host header: in lower case, without port, brackets or a dot at its end."""
    match = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*))(?::[0-9]*)?", given.strip())
    if match is None:
        return given
    return str(match[1] or match[2] or "").lower().removesuffix(".")
