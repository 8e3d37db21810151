"""A drive of a stated rate and latency in place of this machine's, for measurements only.

`slowed` puts it under every reader of the process for the length of a `with` block; nothing else
streams through it. It can only slow down: a drive that is slower than stated stays slower.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import _osinfo as platform

_LATENCY = 80e-6  # of a fast NVMe drive's read


class Throttle:
    """Stands in for `_osinfo.read_into`.

    A read ends `latency` seconds after a bus that carries one read at a time would have delivered
    it. With the files in the page cache its rate does not vary.

    Args:
        bytes_per_s: rate of the bus; `math.inf` for latency alone.
        latency: seconds added to each read; reads in flight share them.
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
    """Send every read of this process through a `Throttle` meanwhile."""
    original = platform.read_into
    platform.read_into = Throttle(bytes_per_s, latency)
    try:
        yield
    finally:
        platform.read_into = original
