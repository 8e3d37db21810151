"""The HTTP layer: routes, limits and keys. The forms of requests and replies are in `_apis`.

Requests for text are checked here and then answered through mlx-lm's own handler. Nothing in a
request ever names a file that is opened.
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
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress
from copy import copy, deepcopy
from email.message import Message
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm import server as stock

from .._cache.lossy import Ways
from .._errors import StreamError
from .._progress import Progress
from .._structured.shape import tools_for_parser
from ._apis.anthropic import CountForm, MessagesForm
from ._apis.form import Form, Usage
from ._apis.ollama import VERSION, OllamaForm, show, tags
from ._apis.openai import ChatForm, TextForm
from ._apis.responses import ResponsesForm
from ._choices import interleaved
from ._field_checks import text_of
from ._generation import Client, GenerationThread
from ._log import Answered, log
from ._metrics import live, prometheus
from ._refusals import Asked, ClientGone, Refused, generation_failed
from ._replies import Piece, Reply
from ._request_checks import check_request, check_values, shape_of

MOST_REQUESTS = 256
"""Replies that may be running or waiting; more are refused with status 503."""

_SOCKET_SECONDS = 60.0  # for a request to arrive; also how long a client may take nothing
_SLOWEST = 64 << 10  # bytes/s that a body needs beyond those seconds
_DRAIN_BYTES = 256 << 20  # taken of a body that is not read, so that its client sees the answer
_DRAIN_SECONDS = 5.0
_MOST_DRAFTED = 64  # tokens; the pass that verifies them is as long, and no plan covers it
FORMS: dict[str, type[Form]] = {
    "/v1/chat/completions": ChatForm,
    "/chat/completions": ChatForm,
    "/v1/completions": TextForm,
    "/v1/responses": ResponsesForm,
    "/v1/messages": MessagesForm,
    "/v1/messages/count_tokens": CountForm,
    "/api/chat": OllamaForm,
}
"""The API at each path that generates text."""


@cache
def live_page() -> tuple[bytes, str]:
    """The live page, and the Content-Security-Policy under which a browser runs nothing else.

    The policy allows the page's own style and script, and requests to this server.
    """
    body = files("mlx_streamexperts").joinpath("data", "live.html").read_bytes()
    sources = {}
    for tag in ("style", "script"):
        match = re.search(f"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        digest = hashlib.sha256(match[1] if match else b"").digest()
        sources[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return body, (
        f"default-src 'none'; style-src {sources['style']}; script-src {sources['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


class _DeadlineReader(io.RawIOBase):
    """Reads from a client until a deadline, so that a byte now and then does not keep a thread.

    Attributes:
        until: the deadline on the clock of `time.monotonic`.
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
    """mlx-lm's handler, behind checks and with replies of our own."""

    # For errors before the request was parsed:
    path, command, requestline, request_version = "", "", "", "HTTP/1.0"
    _form: Form = ChatForm("")
    headers = Message()

    response_generator: Any
    rfile: Any
    server: Any
    timeout = _SOCKET_SECONDS
    server_version, sys_version = "mlx-streamexperts", ""

    def __init__(
        self, generator: GenerationThread, request: Any, *args: Any, **options: Any
    ) -> None:
        self.generator = generator
        self.options = generator.cli_args
        self.began = False  # whether the reply has begun
        self._unread = True  # whether the body is still to be read
        self._drains = False
        self._answered: Answered | None = None  # the request for text under way
        self.form_path = ""  # of the request, while mlx-lm's handler runs under a path of its own
        view: Any = Client(generator, request)
        super().__init__(view, request, *args, **options)

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = _DeadlineReader(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._reader)

    def finish(self) -> None:
        if self._drains:
            self._drain()
        super().finish()

    def _drain(self) -> None:
        """Take the rest of a refused request, until its client closes the connection.

        Closed before that, the connection is reset: to 8 in 10 wrong keys with a body of 8 MB,
        Node's `fetch` said "write EPIPE" instead of our answer.
        """
        self._reader.until = time.monotonic() + min(_DRAIN_SECONDS, self.timeout)
        left, buffer = _DRAIN_BYTES, bytearray(1 << 16)
        with suppress(OSError):  # TimeoutError among them
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (got := self._reader.readinto(buffer)):
                left -= got

    # Routes

    def do_GET(self) -> None:  # noqa: N802
        """Answer for the live page, the figures, the models and the health check."""
        try:
            self._check_host()
            self.path = _path_of(self.path)
            if self.path in ("/", "/live"):
                body, policy = live_page()
                headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
                self._send(body, "text/html; charset=utf-8", headers)
            elif self.path == "/health" and not self.generator.ready.is_set():
                self._send_json({"status": "loading"}, 503)
            elif self.path == "/health":
                if self.generator.is_healthy:
                    self._send_json({"status": "ok"})
                else:
                    self._send_json({"status": "unavailable"}, 503)
            elif self.path == "/live.json":
                self._authorize()
                self._send_json(live(self.generator))
            elif self.path == "/metrics":
                self._authorize()
                self._send(*prometheus(self.generator))
            elif self.path == "/api/tags":
                self._authorize()
                provider = self.generator.model_provider
                self._send_json(tags({name: provider.served[name] for name in provider.listed}))
            elif self.path == "/api/version":
                self._send_json({"version": VERSION})
            elif self.path == "/v1/models" or self.path.startswith("/v1/models/"):
                self._authorize()
                self._send_models(unquote(self.path.removeprefix("/v1/models").lstrip("/")))
            else:
                raise Refused(404, f"there is no resource at {self.path[:200]}", "not_found")
        except Refused as e:
            self._refuse(e)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815, `_send` leaves the body out

    def do_OPTIONS(self) -> None:  # noqa: N802
        """Answer a browser's CORS preflight."""
        try:
            self._check_host()
            super().do_OPTIONS()
        except Refused as e:
            self._refuse(e)

    def do_POST(self) -> None:  # noqa: N802
        """Check a request for text, let mlx-lm's handler run it, and log how it ended."""
        begin = time.monotonic()
        self.server.answering.add(threading.current_thread())
        self._answered = Answered(self.address_string(), "POST", self.path)
        self._answered.outcome = self._post()
        self._answered.seconds = time.monotonic() - begin
        log(self._answered)
        self._answered = None

    def _post(self) -> str:
        """Answer a request for text; returns its outcome, one of `OUTCOMES`."""
        counters = self.generator.counters
        try:
            self._check_host()
            self.path = self.form_path = _path_of(self.path)
            self._form = _form_of(self.path)(self.system_fingerprint)
            self._authorize()
            if self.path == "/api/show":
                self._show(self._body())
                return ""  # of no text
            if self.path not in FORMS:
                raise Refused(404, f"there is no resource at {self.path[:200]}", "not_found")
            asked = self._form.request(self._body())
            asked = check_request(asked, self.options.fetch_images, self._form.chat)
            self.response_generator.lossy = self._lossy(asked.pop("lossy", None))
            body = json.dumps(asked).encode()
            replies = asked.get("n", 1) * len(asked.get("prompt", [""]))
            if not counters.begin(MOST_REQUESTS, replies):
                raise Refused(
                    503, f"{MOST_REQUESTS} replies are under way; try again later", "overloaded"
                )
        except Refused as e:
            counters.refused()
            self._refuse(e)
            return "refused"
        except (ConnectionError, TimeoutError):
            counters.refused()
            self.close_connection = True
            return "refused"
        except Exception as e:
            logging.exception("a request could not be read")
            counters.refused()
            self._refuse(generation_failed(e))
            return "refused"
        outcome, rfile = "failed", self.rfile
        try:
            del self.headers["Content-Length"]
            self.headers["Content-Length"] = str(len(body))
            self.rfile = io.BytesIO(body)
            self.path = "/v1/chat/completions" if self._form.chat else "/v1/completions"
            super().do_POST()
            outcome = "completed"
        except Refused as e:
            if e.status == 499:
                outcome = "cancelled"
            elif e.status < 500:
                outcome = "refused"
            self._refuse(e)
        except (ConnectionError, TimeoutError):  # ClientGone among them
            outcome = "cancelled"
            self.close_connection = True
            if self.generator.stopping:
                self._refuse(Refused(503, "the server is being stopped", "stopping"))
        except Exception as e:
            if not isinstance(e, StreamError):
                logging.exception("a request failed")
            self._refuse(generation_failed(e))
        finally:
            self.rfile, self.path = rfile, self.form_path
            counters.end(outcome, replies)
        return outcome

    # Checks

    def _check_host(self) -> None:
        """Refuse requests for another host's name, against DNS rebinding.

        A web page elsewhere can let its own name resolve to 127.0.0.1. To a browser it then has
        this server's origin; only the Host header still has that name.
        """
        allowed = [name.lower() for name in self.options.allow_host]
        if not allowed and not is_loopback(str(self.server.server_address[0])):
            return
        for given in self.headers.get_all("Host", []):
            name = _host_name(given)
            if not is_loopback(name) and name not in allowed:
                raise Refused(
                    403,
                    f"this server does not answer requests for host {name[:200]!r} "
                    "(--allow-host adds names)",
                    "host_not_allowed",
                )

    def _lossy(self, level: int | None) -> int | None:
        """The level to answer at; None for the server's own."""
        stated = Ways.parse(self.options.lossy)
        if level is None or (stated is None and level == 0):
            return None
        if stated is None or not stated.allows(level):
            has = "exact" if stated is None else f"started with lossy {stated}"
            raise Refused(
                400, f"lossy={level} is not allowed: this server is {has}. Ask for 0", param="lossy"
            )
        return None if level == stated.level else level

    def _authorize(self) -> None:
        """Compare the request's API key with the server's, if that has one."""
        if not self.options.api_key:
            return
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else self.headers.get("X-API-Key", "")
        sent = given.encode("latin-1", "replace")  # http.server decoded the bytes as latin-1
        if not hmac.compare_digest(sent, self.options.api_key.encode()):
            raise Refused(401, "send this server's API key as a bearer token", "invalid_api_key")

    def _body(self) -> dict[str, Any]:
        """Read the request's JSON object, no longer than --max-body."""
        stated = self.headers.get_all("Content-Length", [])
        if not stated or "Transfer-Encoding" in self.headers:
            raise Refused(411, "send a Content-Length header and no Transfer-Encoding")
        if len(stated) > 1 or not re.fullmatch(r"[0-9]{1,15}", stated[0].strip()):
            raise Refused(400, "Content-Length must be a single number")
        length, limit = int(stated[0]), self.options.max_body
        if length > limit:
            raise Refused(
                413, f"the body has {length} bytes; {limit} are allowed (--max-body)", "too_large"
            )
        self._reader.until = time.monotonic() + self.timeout + length / _SLOWEST
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ClientGone
        self._unread = False
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}", "invalid_json") from e
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object", "invalid_json")
        check_values(body)
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
        return self._build(super().handle_chat_completions)

    def handle_text_completions(self) -> Any:
        return self._build(super().handle_text_completions)

    def _build(self, build: Any) -> Any:
        try:
            return build()
        except Exception as e:
            raise Refused(400, str(e) or type(e).__name__, "invalid_request") from e

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Generate what was asked for and send it. mlx-lm's own part ends with `Asked`."""
        self.path = self.form_path
        try:
            super().handle_completion(request, [])  # mlx-lm would match stop strings by token
        except Asked as asked:
            choices = self._choices(request, asked.arguments)
            if self._form.count(0) is not None:
                self._send_json(self._form.count(self.generator.count_prompt(*choices[0])))
            else:
                self._answer(choices, stop_words)

    # Replies

    def _choices(self, request: Any, arguments: Any) -> list[tuple[Any, Any]]:
        """The request and mlx-lm's arguments for each reply: `n` to each of the prompts."""
        arguments.shape = shape_of(self.body)
        arguments.effort = self.body.get("reasoning_effort")
        count = self.body.get("n", 1)
        prompts = [request.prompt] if request.request_type == "chat" else request.prompt
        found = []
        for prompt in prompts:
            for i in range(count):
                own, said = copy(arguments), copy(request)
                own.model, said.prompt = copy(arguments.model), prompt
                if len(prompts) * count > 1:
                    said.messages = deepcopy(request.messages)  # mlx-lm writes into them
                if own.seed is not None:
                    own.seed = (own.seed + i) % (1 << 63)
                found.append((said, own))
        return found

    def _answer(self, choices: list[tuple[Any, Any]], stops: list[str]) -> None:
        """Send the replies: streamed piece by piece, or whole."""
        form, lock = self._form, threading.RLock()
        clients = [Client(self.generator, self.connection) for _ in choices]
        for client in clients:
            client.lossy = self.response_generator.lossy

        def send(events: bytes) -> None:
            with lock:
                self.wfile.write(events)
                self.wfile.flush()

        def begin() -> None:
            with lock:  # else another choice's comment could come before the status line
                self._set_stream_headers(200)
                self.end_headers()
                send(form.begin(self._usage(replies)))

        def keep_alive(progress: Progress | None) -> None:
            with lock:
                if self.began:
                    send(_comment(progress))

        if self.stream and form.keeps_alive:
            for client in clients:
                client.keep_alive = keep_alive
        streams = [
            self._pieces(client, *choice, stops)
            for client, choice in zip(clients, choices, strict=True)
        ]
        replies: dict[int, Reply] = {}
        pieces: list[list[Piece]] = [[] for _ in choices]
        try:
            with closing(interleaved(streams)) as parts:
                for i, item in parts:
                    if isinstance(item, Reply):
                        replies[i] = item
                        if self.stream and not self.began:
                            begin()
                    elif not self.stream:
                        pieces[i].append(item)
                    elif item:
                        send(form.piece(i, item))
            if self.stream:
                send(form.end(self._usage(replies)))
            else:
                self._send_json(form.whole(pieces, self._usage(replies)))
        finally:
            for client in clients:
                client.ended = True
            if (answered := self._answered) is not None:
                used = self._usage(replies)
                answered.prompt_tokens, answered.cached_tokens = used.prompt, used.cached
                answered.tokens = used.completion
                seconds = [c.first_token for c in clients if c.first_token is not None]
                answered.first_token_seconds = min(seconds, default=None)

    def _pieces(
        self, client: Client, request: Any, arguments: Any, stops: list[str]
    ) -> Generator[Reply | Piece, None, None]:
        """One reply, once its prompt is taken, and then its pieces."""
        context = None
        try:
            context, responses = client.start(request, arguments)
            provider = self.generator.model_provider
            tokenizer, shape = provider.tokenizer, arguments.shape
            reply = Reply(
                context,
                stops,
                tokenizer if arguments.logprobs else None,
                tools_for_parser(request.tools, shape is not None),
                tokenizer.tool_call_end or "",
                single=not self.body.get("parallel_tool_calls", True),
                answer=shape is not None and shape.schema is not None,
                closing=() if shape is None else tokenizer.think_end_tokens or (),
                think_end=tokenizer.think_end or "",
                plain=not self._form.chat,
            )
            yield reply
            yield from reply.pieces(responses)
            if provider.is_distributed:  # the other ranks go on
                for _ in responses:
                    pass
            failed = getattr(getattr(arguments, "constraint", None), "error", None)
            if failed is not None:
                param = arguments.shape.param
                message = f"the reply could not be held to {param}: {failed}"
                raise Refused(400, message, "invalid_request", param)
        finally:
            if context is not None:
                context.stop()
            self.generator.unregister(request)

    def _usage(self, replies: dict[int, Reply]) -> Usage:
        """Tokens of all replies; a prompt counts once, however many replies it gets."""
        count = self.body.get("n", 1)
        prompts: dict[int, Reply] = {}
        for i in sorted(replies):
            prompts.setdefault(i // count, replies[i])
        return Usage(
            sum(r.prompt for r in prompts.values()),
            sum(r.cached for r in prompts.values()),
            sum(r.tokens for r in replies.values()),
            sum(r.reasoning_tokens for r in replies.values()),
        )

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self.send_response(status_code)
        self.send_header("Content-Type", self._form.content_type)
        self.send_header("Cache-Control", "no-cache")
        self._set_cors_headers()

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
            raise Refused(404, f"this server has no model {name[:200]!r}", "model_not_found")
        self._send_json(next(m for m in models if m["id"] == name))

    def _show(self, body: dict[str, Any]) -> None:
        """Answer Ollama's question about a model."""
        name, provider = body.get("model") or body.get("name"), self.generator.model_provider
        name = text_of(name, "model")
        name = name if name in provider.served else name.removesuffix(":latest")
        provider.check(name, None, "default_model")
        loaded = provider.is_loaded(name)
        self._send_json(show(provider.served[name], provider.tokenizer if loaded else None))

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
        healthy = self.path == "/health" and status == 200
        if healthy or self.path.startswith(("/v1/", "/chat/", "/api/")):
            self._set_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status=status)

    def _refuse(self, refused: Refused) -> None:
        """Send an error in the API's form; after a reply has begun, as its last event."""
        self.close_connection = True
        sends = any(name in self.headers for name in ("Content-Length", "Transfer-Encoding"))
        self._drains = self._unread and (sends or not self.headers)
        if not self.form_path:
            self._form = _form_of(self.path.partition("?")[0])(self.system_fingerprint)
        refused = self._form.named(refused)
        try:
            if self.began:
                self.wfile.write(self._form.error_event(refused))
            else:
                self._headers_buffer: list[bytes] = []  # headers of a reply that will not be sent
                self._send_json(self._form.error(refused), refused.status)
        except (OSError, ValueError):
            pass  # the client has left

    def end_headers(self) -> None:
        self.began = True
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the errors of http.server itself in the same form."""
        self._refuse(Refused(int(code), message or HTTPStatus(code).phrase))

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Log a line, but none for paths that are polled, nor before a request for text is over."""
        if self._answered is not None:
            self._answered.status = int(code)
        elif self.path not in ("/live.json", "/metrics", "/health"):
            log(Answered(self.address_string(), self.command or "", self.path, int(code)))

    def log_message(self, format: str, *args: Any) -> None:
        logging.info(format % args)


def _comment(progress: Progress | None) -> bytes:
    """What clients of event streams skip: how far the prompt is."""
    text = "" if progress is None else f" {progress.tokens}/{progress.total} ({progress})"
    return f": keepalive{text}\n\n".encode()


def _form_of(path: str) -> type[Form]:
    """The API that a path belongs to, whether or not there is such a path."""
    if path.startswith("/api/"):
        return OllamaForm
    return FORMS.get(path, MessagesForm if path.startswith("/v1/messages/") else ChatForm)


def _path_of(target: str) -> str:
    """The path of a request's target, without host and query."""
    try:
        return urlsplit(target).path
    except ValueError as e:  # for example "http://["
        raise Refused(400, f"the request's target is not an address: {e}") from e


def is_loopback(host: str) -> bool:
    """Whether only this machine itself can reach this name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(given: str) -> str:
    """The name in a Host header, in lower case, without port, brackets or final dot."""
    match = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*))(?::[0-9]*)?", given.strip())
    if match is None:
        return given
    return str(match[1] or match[2] or "").lower().removesuffix(".")
