"""benchmarks/relay.py: all bytes, both ways, not before their time."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from relay import Relay, address


def test_bytes_come_whole_and_not_too_early() -> None:
    assert address("10.0.0.2:5001") == ("10.0.0.2", 5001)
    sent = bytes(range(256)) * 4000
    with socket.socket() as later:  # listens only after a connection has come
        later.bind(("127.0.0.1", 0))
        relay = Relay(("127.0.0.1", 0), later.getsockname(), delay=0.05, rate=20e6)
        with socket.create_connection(("127.0.0.1", relay.port)) as near:
            later.listen()
            far = later.accept()[0]
            start = time.perf_counter()
            sender = threading.Thread(target=lambda: (near.sendall(sent), near.shutdown(1)))
            sender.start()
            with far, far.makefile("rb") as there:
                assert there.read() == sent  # until the end, which goes on, too
                assert time.perf_counter() - start >= 0.05 + len(sent) / 20e6
                relay.delay = 0.0
                far.sendall(b"back")
            with near.makefile("rb") as here:
                assert here.read() == b"back"
            sender.join()
