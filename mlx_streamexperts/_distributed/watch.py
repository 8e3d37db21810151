"""Notices that another rank of a distributed run is gone, and says which one.

MLX's ring backend raises if a neighbour's process ends, without naming the rank. It waits forever
for a machine that froze or lost its network, in C++, where no Python exception reaches it. So every
rank keeps a TCP connection to rank 0, and both sides send a byte a second. All ranks name a peer
whose connection ends or that is silent for `SILENCE_SECONDS`. A process that still waits
`GRACE_SECONDS` later exits with status 1.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from .ranks import Ranks

SILENCE_SECONDS = 30.0
"""Longer than anything holds Python's lock for."""
GRACE_SECONDS = 5.0
_BEAT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


class Watch:
    """A rank's connection to rank 0, or rank 0's connections to all others.

    A rank that cannot connect says so on stderr and runs unwatched.

    Attributes:
        lost: Why the run cannot go on, naming the rank; None while it can.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.lost: str | None = None
        self._left: set[int] = set()  # ranks that closed without an error
        self._news = threading.Event()  # set once a rank is lost or has left
        self._closed = threading.Event()
        self._peers: dict[int, tuple[socket.socket, TextIO]] = {}
        self._connect()
        threads = [threading.Thread(target=self._beat, name="beat", daemon=True)]
        for rank in self._peers:
            threads.append(threading.Thread(target=self._listen, args=[rank], daemon=True))
        self._threads = threads if self._peers else []
        for thread in self._threads:
            thread.start()

    def close(self, reason: str | None = None) -> None:
        """Leave the run; a `reason` tells the other ranks that it cannot go on without this one."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._tell({"rank": self._ranks.rank, "left": reason})
        for connection, _ in self._peers.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # ends its listener
        for thread in self._threads:
            thread.join(_BEAT_SECONDS)
        for connection, _ in self._peers.values():
            connection.close()

    def why(self, seconds: float = 3.0) -> str | None:
        """Why the run cannot go on; waits up to `seconds` for the news to arrive."""
        self._news.wait(seconds if self._peers else 0)
        if self.lost is None and self._left:
            return f"{', '.join(self._ranks.names[r] for r in sorted(self._left))} left the run"
        return self.lost

    def _connect(self) -> None:
        """Connect rank 0 with all others, over the address that MLX uses itself."""
        ranks, token = self._ranks, secrets.token_hex(16)
        listener = _listener() if ranks.rank == 0 else None
        own = listener.getsockname()[:2] if listener else None
        address, token = ranks.exchange([own, token])[0]
        if address is not None and listener is None:
            try:
                connection = socket.create_connection(tuple(address), _CONNECT_SECONDS)
                connection.sendall(f"{token} {ranks.rank}\n".encode())
                self._peers[0] = connection, connection.makefile()
            except OSError as e:
                print(f"{ranks.names[ranks.rank]} is not watched: {e}", file=sys.stderr)
        expected = sum(ranks.exchange(bool(self._peers)))  # their connections wait in the backlog
        if listener is None:
            return
        with listener, suppress(TimeoutError):
            listener.settimeout(_CONNECT_SECONDS)
            while len(self._peers) < expected:
                connection = listener.accept()[0]
                connection.settimeout(1.0)
                lines = connection.makefile()
                with suppress(OSError, ValueError):
                    said, rank = lines.readline(100).split()
                    if secrets.compare_digest(said, token):  # else a stranger
                        self._peers[int(rank)] = connection, lines

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            self._tell(None)

    def _listen(self, rank: int) -> None:
        """Follow one peer until it leaves; if it is lost, say so and end a process that hangs."""
        why = self._follow(rank)
        if why is None or self._closed.is_set():
            return
        self.lost = self.lost or why
        self._news.set()
        if self._ranks.rank == 0:
            self._tell({"lost": self.lost})
        if not self._closed.wait(GRACE_SECONDS):
            # The main thread waits in C++ for data that will never come.
            print(f"error: {self.lost}; this process gives up", file=sys.stderr, flush=True)
            os._exit(1)

    def _follow(self, rank: int) -> str | None:
        """Read a peer's lines to their end; returns why the run cannot go on, if it cannot."""
        connection, lines = self._peers[rank]
        connection.settimeout(SILENCE_SECONDS)
        why = "its process or its connection ended"
        try:
            with lines:
                for line in lines:
                    message = json.loads(line) if line.strip() else {}  # an empty line is a beat
                    if "lost" in message:
                        return str(message["lost"])
                    if "left" in message:
                        if message["left"] is None:
                            self._left.add(rank)
                            self._news.set()
                            return None
                        why = message["left"]
                        break
        except TimeoutError:
            why = f"not a sign of life for {SILENCE_SECONDS:.0f} s"
        except OSError:
            pass
        return f"{self._ranks.names[rank]} was lost: {why}"

    def _tell(self, message: Mapping[str, Any] | None) -> None:
        """Send a line to every peer; an empty one for None."""
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        for connection, _ in self._peers.values():
            with suppress(OSError):  # the peer's listener notices
                connection.sendall(line)


def _listener() -> socket.socket | None:
    try:
        return socket.create_server((address_of_rank_0(os.environ), 0), backlog=128)
    except OSError as e:
        print(f"Ranks are not watched: {e.strerror}", file=sys.stderr)
        return None


def address_of_rank_0(environment: Mapping[str, str]) -> str:
    """The address at which MLX's backend reaches rank 0, by what its launcher has set."""
    if (hostfile := environment.get("MLX_HOSTFILE")) is not None:
        with open(hostfile) as f:
            first = json.load(f)[0]
        return str(first[0]).rpartition(":")[0]
    if (coordinator := environment.get("MLX_JACCL_COORDINATOR")) is not None:
        return coordinator.rpartition(":")[0]
    return environment.get("NCCL_HOST_IP", socket.gethostname())
