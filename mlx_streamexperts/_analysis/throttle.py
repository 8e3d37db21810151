"""A drive of a stated rate and latency in the place of this machine's, for measurements only.

Nothing in the package streams through it: `slowed` puts it under every reader of the process for
the length of a `with` block. It can only slow down: a drive that is slower than stated stays so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import _osinfo as platform

_LATENCY = 80e-6  # of a fast NVMe drive's read


class Throttle:
    """Stands in for `platform.read_into`.

    Reads end when a bus that carries one after the other would have delivered them, `latency`
    later. With the files in the page cache what it gives does not vary.

    Args:
        bytes_per_s: rate of the bus, in bytes/s; `math.inf` for latency alone.
        latency: seconds that each read takes besides; reads in flight share them.
    """

    def __init__(self, bytes_per_s: float, latency: float = _LATENCY) -> None:
        self._rate, self._latency = bytes_per_s, latency
        self._free, self._lock = 0.0, threading.Lock()
        self._read = platform.read_into

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        size = sum(map(len, buffers))
        with self._lock:
            self._free = max(self._free, time.perf_counter()) + size / self._rate
            due = self._free + self._latency
        count = self._read(fd, buffers, offset)
        time.sleep(max(0.0, due - time.perf_counter()))
        return count


@contextmanager
def slowed(bytes_per_s: float, latency: float) -> Iterator[None]:
    """Every read of this process goes through a `Throttle` meanwhile."""
    original = platform.read_into
    platform.read_into = Throttle(bytes_per_s, latency)
    try:
        yield
    finally:
        platform.read_into = original
