"""Notice that another rank of a distributed run is gone, say which, and do not hang.

MLX's ring backend raises where a neighbour's process ends, but does not say which rank it was; a
machine that freezes or loses its network leaves the others waiting for ever, in C++, where no
Python exception reaches. So every rank keeps a connection to rank 0 on which both sides send a byte
a second. Who was silent for `SILENCE_SECONDS`, or whose connection ends, is named on every other
rank; a process that then still waits after `GRACE_SECONDS` is ended with exit status 1.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from .ranks import Ranks

SILENCE_SECONDS = 30.0
"""Longer than anything holds Python's lock for."""
GRACE_SECONDS = 5.0
_BEAT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


class Watch:
    """A rank's connection to the others; where there can be none, it stays ignorant.

    Attributes:
        lost: why the run cannot go on, naming the rank, or None while it can.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.lost: str | None = None
        self._left: set[int] = set()  # in good order
        self._known = threading.Event()  # `lost` is said, or somebody left
        self._closed = threading.Event()
        self._lock = threading.Lock()  # of sending
        self._peers: dict[int, socket.socket] = {}
        try:
            self._connect()
        finally:
            ranks.exchange("watched")  # nobody is asked for signs of life before all can give them
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self._peers:
            self._thread.start()

    def close(self, reason: str | None = None) -> None:
        """Leave in good order, or for a reason that is told to the others."""
        if self._closed.is_set():
            return
        self._closed.set()
        for peer in list(self._peers):
            self._send(peer, {"rank": self._ranks.rank, "left": reason})
        if self._thread.is_alive():
            self._thread.join(2 * _BEAT_SECONDS)
        for connection in self._peers.values():
            connection.close()

    def why(self, seconds: float = 3.0) -> str | None:
        """What is known of a lost rank, after waiting a moment for it to be known."""
        self._known.wait(seconds if self._peers else 0)
        if self.lost is None and self._left:
            return f"{', '.join(self._ranks.names[r] for r in sorted(self._left))} left the run"
        return self.lost

    def _connect(self) -> None:
        """Connections between rank 0 and all others, over the address that MLX uses itself."""
        ranks, token = self._ranks, secrets.token_hex(16)
        listener: socket.socket | None = None
        if ranks.rank == 0:
            try:
                listener = socket.create_server((address_of_rank_0(os.environ), 0))
            except OSError as e:
                print(f"Ranks are not watched: {e.strerror}", file=sys.stderr)
        address = listener.getsockname()[:2] if listener else None
        address, token = ranks.exchange([address, token])[0]
        if address is None:
            return
        if listener is None:
            try:
                connection = socket.create_connection(tuple(address), _CONNECT_SECONDS)
                connection.sendall(f"{token} {ranks.rank}\n".encode())
                self._peers[0] = connection
            except OSError as e:
                print(f"{ranks.names[ranks.rank]} is not watched: {e}", file=sys.stderr)
            return
        with listener:
            until = time.monotonic() + _CONNECT_SECONDS
            while len(self._peers) < ranks.size - 1 and (left := until - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    connection = listener.accept()[0]
                    connection.settimeout(max(0.1, until - time.monotonic()))
                    said, rank = connection.makefile().readline(100).split()
                    if not secrets.compare_digest(said, token):
                        raise ValueError("a stranger")
                    self._peers[int(rank)] = connection
                except (OSError, ValueError):
                    continue

    def _run(self) -> None:
        """Beat and listen until closed or somebody is lost."""
        heard = dict.fromkeys(self._peers, time.monotonic())
        unread = dict.fromkeys(self._peers, b"")
        present = dict(self._peers)
        beat = 0.0
        while present and not self._closed.is_set() and self.lost is None:
            now = time.monotonic()
            if now - beat >= _BEAT_SECONDS:
                beat = now
                for rank in list(present):
                    self._send(rank, None)
            readable, _, _ = select.select(list(present.values()), [], [], _BEAT_SECONDS / 4)
            for rank, connection in list(present.items()):
                if connection in readable:
                    heard[rank] = time.monotonic()
                    data = _receive(connection)
                    if not data:
                        self._lose(rank, "its process or its connection ended")
                        break
                    *lines, unread[rank] = (unread[rank] + data).split(b"\n")
                    for line in lines:
                        if line and self._told(json.loads(line)):
                            present.pop(rank, None)
                elif time.monotonic() - heard[rank] > SILENCE_SECONDS:
                    self._lose(rank, f"not a sign of life for {SILENCE_SECONDS:.0f} s")
        if self.lost is not None and not self._closed.wait(GRACE_SECONDS):
            # The main thread waits for what will never come, where no exception reaches it.
            print(f"error: {self.lost}; this process gives up", file=sys.stderr, flush=True)
            os._exit(1)

    def _told(self, message: Mapping[str, Any]) -> bool:
        """Take note of what a rank says; returns whether it left."""
        if "lost" in message:
            self._note(message["lost"])
            return False
        if message["left"] is None:
            self._left.add(message["rank"])
            self._known.set()
        else:
            self._lose(message["rank"], message["left"])
        return True

    def _lose(self, rank: int, why: str) -> None:
        self._note(f"{self._ranks.names[rank]} was lost: {why}")
        for other in list(self._peers):  # rank 0 tells the others; they have nobody to tell
            if other != rank and self._ranks.rank == 0:
                self._send(other, {"lost": self.lost})

    def _note(self, lost: str) -> None:
        self.lost = lost
        self._known.set()

    def _send(self, rank: int, message: Any) -> None:
        """A message, or with None only a sign of life."""
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._peers[rank].sendall(line)
        except OSError:
            pass  # the listening side finds out, and says so


def address_of_rank_0(environment: Mapping[str, str]) -> str:
    """The address at which MLX's backend reaches rank 0, by what its launcher has set."""
    if (hostfile := environment.get("MLX_HOSTFILE")) is not None:
        with open(hostfile) as f:
            first = json.load(f)[0]
        return str(first[0]).rpartition(":")[0]
    if (coordinator := environment.get("MLX_JACCL_COORDINATOR")) is not None:
        return coordinator.rpartition(":")[0]
    return environment.get("NCCL_HOST_IP", socket.gethostname())


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""
