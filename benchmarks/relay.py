"""Forwards TCP connections with a stated delay and rate, where the kernel has no netem.

    python benchmarks/relay.py 127.0.0.1:5001 10.0.0.2:5001 --delay 5 --rate 100MB

What arrives at the first address goes on to the second: after the time that a link of this rate
takes for it, and the delay. Replies come back over a link of their own with the same delay and
rate. A rank of MLX's ring backend listens at its own address in its hostfile and connects to that
of the next rank, so a hostfile of its own that names a relay there puts the relay between them.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

from mlx_streamexperts._config import parse_size

_CHUNK_BYTES = 1 << 16
_RETRY_SECONDS = 0.02


class Relay:
    """Listens until the process ends.

    Args:
        listen: host and port. Port 0: any that is free.
        to: host and port that connections go on to; may begin to listen later.
        delay: seconds added to each direction; may be changed meanwhile.
        rate: bytes/s of each direction of a connection.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self, listen: tuple[str, int], to: tuple[str, int], delay: float, rate: float
    ) -> None:
        self._to, self.delay, self._rate = to, delay, rate
        self._listener = socket.create_server(listen)
        self.port = int(self._listener.getsockname()[1])
        _start(self._accept)

    def _accept(self) -> None:
        while True:
            near = self._listener.accept()[0]
            _start(self._join, near)

    def _join(self, near: socket.socket) -> None:
        while True:
            try:
                far = socket.create_connection(self._to)
                break
            except OSError:
                time.sleep(_RETRY_SECONDS)
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            queue: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
            _start(self._receive, source, queue)
            _start(self._send, sink, queue)

    def _receive(self, source: socket.socket, queue: SimpleQueue[tuple[float, bytes]]) -> None:
        free, data = 0.0, b" "
        while data:
            data = b""
            with suppress(OSError):
                data = source.recv(_CHUNK_BYTES)
            free = max(free, time.perf_counter()) + len(data) / self._rate
            queue.put((free + self.delay, data))

    def _send(self, sink: socket.socket, queue: SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while (item := queue.get())[1]:
                due, data = item
                time.sleep(max(0.0, due - time.perf_counter()))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def _start(run: object, *args: object) -> None:
    threading.Thread(target=run, args=args, daemon=True).start()  # type: ignore[arg-type]


def address(text: str) -> tuple[str, int]:
    """Host and port of "host:port"."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("listen", type=address, help="host:port to listen at")
    parser.add_argument("to", type=address, help="host:port that connections go on to")
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds, each way")
    parser.add_argument("--rate", default="1GB", help="bytes/s, each way")
    args = parser.parse_args()
    Relay(args.listen, args.to, args.delay / 1e3, parse_size(args.rate))
    threading.Event().wait()


if __name__ == "__main__":
    main()
