"""The command `server`: _options.py says what it does."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.utils import maybe_set_recommended_wired_limit

from .._cli.options import check_prefix_arguments, failed
from .._cli.settings import draft_model, stream_settings
from .._config import StreamConfig, from_arguments, parse_size
from .._errors import StreamError
from .._hooks import swapped
from .._io.files import room_for_clients
from .._loading.combinations import Options, check_options
from .._loading.drafts import Draft
from .._loading.load import patch, plan, resolve
from ._audience import Audience
from ._context import ContextChoice, choose_context, start_line
from ._generation import GenerationThread, logits_processors, top_logprobs
from ._http import Handler, is_loopback
from ._kv_admission import AdmittedBatch, BoundedPromptCache, KVAdmission
from ._log import configure
from ._models import ModelProvider
from ._options import setup_arg_parser
from ._request_counters import RequestCounters

MOST_CONNECTIONS = 1024
"""Connections open at once; fewer if this process may not open as many files beside the shards."""

_LAST_SECONDS = 1.0  # for the last answers of a server that is stopped

_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n\r\n"
    b'{"error": {"message": "too many connections; try again later", "type": "server_error", '
    b'"param": null, "code": "overloaded"}}'
)
_INSTEAD = (
    "mlx-vlm has a server of its own: python -m mlx_streamexperts.run mlx_vlm.server --model ..."
)


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        args.max_body = parse_size(args.max_body)
        check_prefix_arguments(args)
        if not 0 <= args.port < 1 << 16:  # mlx-lm's server would take another one
            raise StreamError(f"--port {args.port}: a port is a number from 0 to 65535")
        config, model = stream_settings(args, _INSTEAD)
        assert model is not None
        if config.pressure is None:
            config = replace(config, pressure="auto")
        served = _served(args.model, model, args.also_serve)
        aliases = dict(zip([args.model or model, *args.also_serve], served.values(), strict=True))
        for other in list(served.values())[1:]:
            check_options(other, config, Options.of(args), args.trust_remote_code)
        if len(served) > 1:
            config = _shared_budget(served, config, args.trust_remote_code)
        draft = draft_model(args)
        # A reserve that is stated stays as it is.
        longer = draft.leave_room if draft and from_arguments(args).reserve is None else None
        folders = list(served.values())
        choice = choose_context(folders, config, args.trust_remote_code, longer)
        if choice is not None:
            config = replace(config, context_tokens=choice.tokens)
            if longer is not None and draft is not None:
                config = longer(config)
                print(f"Keeping {draft.told(config)}", file=sys.stderr)
        args.model = model
        if not args.api_key and not is_loopback(args.host):
            print(
                f"warning: other machines can reach {args.host}, and there is no --api-key",
                file=sys.stderr,
            )
        _check_address(args.host, args.port)
        with patch(config=config), _interruptible():
            _serve(args, served, aliases, choice, draft)
    except StreamError as e:
        return failed(e)
    except OSError as e:  # for example the address is in use
        reason = f"cannot serve at {args.host}:{args.port}: {e.strerror or e}"
        if e.errno == errno.EADDRINUSE:
            reason += " (--port states another one)"
        print(f"error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # a second Ctrl-C while the first is being obeyed
        os._exit(130)
    return 0


def _check_address(host: str, port: int) -> None:
    """Try the address before the model is loaded, which takes minutes.

    Raises:
        OSError: it is in use, or is not this machine's.
    """
    if mx.distributed.init().rank() > 0:
        return
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)


def _serve(
    args: argparse.Namespace,
    served: dict[str, str],
    aliases: dict[str, str],
    choice: ContextChoice | None,
    draft: Draft | None,
) -> None:
    """What mlx-lm's `main` does once it has parsed, with our parts; returns when it is stopped."""
    maybe_set_recommended_wired_limit()
    configure(args.log_level, args.log_format)
    admission = KVAdmission()
    provider = ModelProvider(args, served, aliases, admission, draft)
    audience = Audience()
    prompt_cache = BoundedPromptCache(
        admission, args.prompt_cache_size, provider=provider, audience=audience
    )
    batch = partial(AdmittedBatch, admission=admission, audience=audience)
    processors = partial(logits_processors, make=stock._make_logits_processors)
    parts = {"BatchGenerator": batch, "_make_logits_processors": processors}
    with swapped(stock, _format_top_logprobs=top_logprobs, **parts):
        generator = GenerationThread(provider, prompt_cache, RequestCounters(), audience)
        if mx.distributed.init().rank() > 0:
            generator.join()
            return
        try:
            folders = [Path(f) for f in set(served.values())]
            own = {
                "_generator": generator,
                "_choice": choice,
                "connections": room_for_clients(MOST_CONNECTIONS, folders),
            }
            bound = type("Bound", (Server,), own)  # mlx-lm sets the address family on the class
            stock._run_http_server(args.host, args.port, generator, bound, Handler)
        finally:  # mlx-lm does so after Ctrl-C alone
            generator.stop_and_join()


class Server(ThreadingHTTPServer):
    """Accepts connections at once, and answers them when the model is loaded.

    Attributes:
        answering: threads that answer a request for text.
    """

    _generator: GenerationThread  # of a subclass, as is `_choice`
    _choice: ContextChoice | None = None
    connections = MOST_CONNECTIONS
    request_queue_size = 128  # clients that may be asking for a connection at one moment

    def __init__(self, *args: Any, **options: Any) -> None:
        self._free = threading.Semaphore(self.connections)
        self.answering: set[threading.Thread] = set()
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread, or refuse if there are too many."""
        if not self._free.acquire(blocking=False):
            with suppress(OSError):
                request.setblocking(False)
                request.send(_FULL)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.answering.discard(threading.current_thread())
            self._free.release()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        try:
            threading.Thread(target=self._when_ready, name="ready", daemon=True).start()
            super().serve_forever(poll_interval)
            if self._generator.failure is not None:
                raise self._generator.failure
        finally:
            self._generator.stopping = True
            self.server_close()
            self._generator.stop_and_join()
            end = time.monotonic() + _LAST_SECONDS
            for thread in list(self.answering):  # each tells its client, and writes its log line
                thread.join(max(0.0, end - time.monotonic()))

    def _when_ready(self) -> None:
        """Tell that the model is loaded; if it could not be, end serving."""
        self._generator.ready.wait()
        if self._generator.failure is not None:
            super().shutdown()
            return
        host, port = str(self.server_address[0]), self.server_address[1]
        host = f"[{host}]" if ":" in host else host
        plan = self._generator.admission.plan
        print(start_line(f"http://{host}:{port}", plan, self._choice), file=sys.stderr, flush=True)

    def shutdown(self) -> None:
        """Do nothing: mlx-lm calls this after serving has ended, and the original would wait."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about connections that broke."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM stop the server as Ctrl-C does. Only a main thread can receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _served(given: str | None, model: str, others: list[str]) -> dict[str, str]:
    """Folder of each model by the name in /v1/models: the repository's or the folder's own."""

    def name(model: str) -> str:
        return Path(model).resolve().name if Path(model).exists() else model

    served = {name(given or model): model}
    for other in others:
        if name(other) in served:
            raise StreamError(
                f"--also-serve {other}: a model named {name(other)} is already served; rename or "
                "link one of the folders"
            )
        served[name(other)] = str(resolve(other))
    return served


def _shared_budget(
    served: dict[str, str], config: StreamConfig, trust_remote_code: bool
) -> StreamConfig:
    """Check that each model fits into the same budget, before any is loaded.

    If no budget is stated, the first model's is it: once that is loaded, less is available.
    """
    for path in served.values():
        planned = plan(path, config=config, trust_remote_code=trust_remote_code)
        if config.memory is None and planned.memory is not None:
            config = replace(config, memory=planned.memory)
    return config
