"""A drive of a stated rate and latency in place of this machine's, for measurements only.

`slowed` puts it under every reader of the process for the length of a `with` block; nothing else
streams through it. It can only slow down: a drive that is slower than stated stays slower.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .. import _osinfo as platform

_LATENCY = 80e-6  # of a fast NVMe drive's read


class Throttle:
    """Stands in for `_osinfo.read_into`.

    A read ends `latency` seconds after a bus that carries one read at a time would have delivered
    it. With the files in the page cache its rate does not vary.

    Args:
        bytes_per_s: rate of the bus; `math.inf` for latency alone.
        latency: seconds added to each read; reads in flight share them.
        folders: folders whose files, other than links, are on a drive of their own, and its rate.
    """

    def __init__(
        self,
        bytes_per_s: float,
        latency: float = _LATENCY,
        folders: Mapping[Path, float] | None = None,
    ) -> None:
        self._rates: dict[Path | None, float] = {None: bytes_per_s}
        for folder, rate in (folders or {}).items():
            self._rates[folder] = rate
        self._latency = latency
        self._free = dict.fromkeys(self._rates, 0.0)
        self._drive_of = {
            os.stat(file)[1:3]: folder for folder in folders or () for file in folder.iterdir()
        }
        self._lock = threading.Lock()
        self._read = platform.read_into

    def drive(self, fd: int) -> Path | None:
        """The folder among those with a drive of their own that an open file is in."""
        return self._drive_of.get(os.fstat(fd)[1:3]) if self._drive_of else None

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        size, drive = sum(map(len, buffers)), self.drive(fd)
        with self._lock:
            free = max(self._free[drive], time.perf_counter()) + size / self._rates[drive]
            self._free[drive], due = free, free + self._latency
        count = self._read(fd, buffers, offset)
        time.sleep(max(0.0, due - time.perf_counter()))
        return count


@contextmanager
def slowed(
    bytes_per_s: float, latency: float, folders: Mapping[Path, float] | None = None
) -> Iterator[None]:
    """Send every read of this process through a `Throttle` meanwhile; arguments as there."""
    original = platform.read_into
    platform.read_into = Throttle(bytes_per_s, latency, folders)
    try:
        yield
    finally:
        platform.read_into = original
