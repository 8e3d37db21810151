"""Serve streamed models over HTTP: `mlx_lm.server` with every one of its options, and ours.

python -m mlx_streamexperts.server
python -m mlx_streamexperts.server --model mlx-community/Kimi-K2.5 --memory 96GB --port 8080

OpenAI's chat and completions at /v1, figures at /metrics (Prometheus), a live page at /.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from .._cli.options import failed, make_parser, stream_settings
from .._config import StreamConfig, parse_size
from .._errors import StreamError
from .._io.files import room_for_clients
from .._loading.combinations import Options, check_options
from .._loading.load import patch, plan, resolve
from ._generation import Generator, Provider, stock, top_logprobs
from ._kv_admission import Batch, PromptCache, Room
from ._traffic import Traffic
from ._web import Handler, is_loopback

MOST_CONNECTIONS = 1024
"""Open at once, or as many files as this process may open beside the shards, if that is less."""

_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n\r\n"
    b'{"error": {"message": "too many connections", "type": "server_error", "param": null, '
    b'"code": "overloaded"}}'
)
_KEY_VARIABLE = "STREAMEXPERTS_API_KEY"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    parser = make_parser(_stock_parser(), "python -m mlx_streamexperts.server", __doc__)
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--also-serve",
        action="append",
        default=[],
        metavar="MODEL",
        help="a further model folder or repository that requests may name; it is loaded in "
        "place of the one before, within the same budget. Can be given again",
    )
    group.add_argument(
        "--api-key",
        default=os.environ.get(_KEY_VARIABLE),
        help=f"answer only requests with this bearer token. Default: ${_KEY_VARIABLE}, which other "
        "users of this machine cannot see in the list of processes",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer requests whose Host header says this name, too. On a loopback address only "
        "loopback names are answered, elsewhere any, unless this is given. Can be given again",
    )
    group.add_argument(
        "--max-body", default="16MiB", help="longest request body (default: %(default)s)"
    )
    group.add_argument(
        "--fetch-images",
        action="store_true",
        help="let requests make this server fetch http(s) URLs of images, as mlx_lm.server does",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line until Ctrl-C or SIGTERM; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        args.max_body = parse_size(args.max_body)
        config, model = stream_settings(args)
        assert model is not None
        served = _served(args.model, model, args.also_serve)
        args.given = [args.model or model, *args.also_serve]  # as typed: requests may say so too
        for other in list(served.values())[1:]:
            check_options(other, config, Options.of(args), args.trust_remote_code)
        if len(served) > 1:
            config = _one_budget(served, config, args.trust_remote_code)
        args.model = model
        args.stated_step = args.prefill_step_size  # None: what each model's plan has room for
        if not args.api_key and not is_loopback(args.host):
            print(
                f"warning: {args.host} can be reached from elsewhere, and no --api-key is set",
                file=sys.stderr,
            )
        with patch(config=config), _assembled(args, served), _interruptible():
            stock.main()
    except StreamError as e:
        return failed(e)
    except OSError as e:  # the address is in use, say
        print(f"error: {args.host}:{args.port}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # a second one, while the first is being obeyed
        os._exit(130)
    return 0


class Server(ThreadingHTTPServer):
    """Takes connections at once, and answers them when the model is loaded."""

    _generator: Generator  # of a subclass: mlx-lm sets the address family on the class
    request_queue_size = 128  # that many may ask to be connected at one moment

    def __init__(self, *args: Any, **options: Any) -> None:
        generator = getattr(self, "_generator", None)
        served = set(generator.model_provider.served.values()) if generator else set()
        folders = [Path(f) for f in served]
        self._free = threading.Semaphore(room_for_clients(MOST_CONNECTIONS, folders))
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or say that there are too many."""
        if not self._free.acquire(blocking=False):
            with suppress(OSError):
                request.setblocking(False)
                request.send(_FULL)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be had
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        try:
            self._generator.ready.wait()
            if self._generator.failure is not None:
                raise self._generator.failure
            host, port = str(self.server_address[0]), self.server_address[1]
            host = f"[{host}]" if ":" in host else host
            print(f"Serving at http://{host}:{port}", file=sys.stderr, flush=True)
            super().serve_forever(poll_interval)
        finally:
            self._generator.stopping = True
            self.server_close()

    def shutdown(self) -> None:
        """Nothing: mlx-lm calls it once serving has ended, where the original waits for that."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Parsed:
    """Stands in for mlx-lm's parser: what ours has parsed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def add_argument(self, *args: Any, **options: Any) -> None: ...

    def parse_args(self) -> argparse.Namespace:
        return self._args


class _Built(BaseException):
    """Ends mlx-lm's main where it would parse."""


def _stock_parser() -> argparse.ArgumentParser:
    """mlx-lm's parser, which it builds within its main."""
    built: list[argparse.ArgumentParser] = []

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *args: Any, **options: Any) -> Any:
            if not built:
                built.append(self)
                raise _Built
            return super().parse_args(*args, **options)

    ours = SimpleNamespace(ArgumentParser=Parser)
    with mock.patch.object(stock, "argparse", ours), suppress(_Built):
        stock.main()
    return built[0]


@contextmanager
def _assembled(args: argparse.Namespace, served: dict[str, str]) -> Iterator[None]:
    """mlx-lm's server module with our parts in it."""
    room, traffic = Room(), Traffic()

    def run_http_server(host: str, port: int, generator: Generator, **_: Any) -> None:
        try:
            bound = type("Bound", (Server,), {"_generator": generator})
            original(host, port, generator, bound, Handler)
        finally:  # mlx-lm does so after Ctrl-C alone
            generator.stop_and_join()

    original = stock._run_http_server
    with mock.patch.multiple(
        stock,
        argparse=SimpleNamespace(ArgumentParser=lambda **_: _Parsed(args)),
        ModelProvider=lambda parsed: Provider(parsed, served, room),
        LRUPromptCache=partial(PromptCache, room),
        BatchGenerator=partial(Batch, room=room),
        _format_top_logprobs=top_logprobs,
        ResponseGenerator=lambda provider, cache: Generator(provider, cache, traffic),
        _run_http_server=run_http_server,
    ):
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM stops the server as Ctrl-C does; a host program's threads see no signals."""
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
    """Folder by the name that /v1/models shows: a repository's, or the folder's own."""

    def name(model: str) -> str:
        return Path(model).resolve().name if Path(model).exists() else model

    served = {name(given or model): model}
    for other in others:
        if name(other) in served:
            raise StreamError(f"--also-serve {other}: there is a model named {name(other)} already")
        served[name(other)] = str(resolve(other))
    return served


def _one_budget(
    served: dict[str, str], config: StreamConfig, trust_remote_code: bool
) -> StreamConfig:
    """Make sure that each model fits into the same budget, before any is loaded.

    Where none is stated it is what the first one gets: once that is loaded, less is available.
    """
    for path in served.values():
        planned = plan(path, config=config, trust_remote_code=trust_remote_code)
        if config.memory is None and planned.memory is not None:
            config = replace(config, memory=planned.memory)
    return config
