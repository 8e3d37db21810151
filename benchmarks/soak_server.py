"""The server of a soak, which also tells what its heap holds: `soak.py` starts it.

    python benchmarks/soak_server.py SAMPLES [options of mlx_streamexperts.server]

Resident memory is what is in use and what malloc keeps for later, which goes up and down by more
than a leak would be. So every five seconds a line of SAMPLES says how many bytes of malloc's are in
use beside those that MLX counts (glibc's mallinfo2(3)); elsewhere the file stays empty.

The kernel would keep megabytes for a client that reads slowly. Here it keeps a few kilobytes, so
that such a client makes its server wait within seconds.
"""

from __future__ import annotations

import ctypes
import socket
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx

from mlx_streamexperts.server import _command

EVERY = 5.0  # seconds
KEPT = 4096  # bytes of a reply that the kernel keeps, twice


class _Figures(ctypes.Structure):
    """What mallinfo2 returns, bytes: `uordblks` in use in arenas, `hblkhd` mapped by themselves."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Narrow(_command.Server):
    """The server, with short queues to its clients."""

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KEPT)  # connections inherit it
        super().server_bind()


def sample(file: Path) -> None:
    """Write lines for ever, or nothing where this C library cannot tell."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    with file.open("w") as out:
        if ask is None:
            return
        ask.restype = _Figures
        while True:
            found = ask()
            beside = mx.get_active_memory() + mx.get_cache_memory()
            out.write(f"{found.uordblks + found.hblkhd - beside}\n")
            out.flush()
            time.sleep(EVERY)


if __name__ == "__main__":
    threading.Thread(target=sample, args=(Path(sys.argv[1]),), daemon=True).start()
    _command.Server = Narrow  # type: ignore[misc]
    sys.exit(_command.main(sys.argv[2:]))
