"""Keeps the threads that call one model apart: only the thread that built a graph can evaluate it.

A single thread may leave a layer's output unevaluated: that same thread calls next, and evaluates
it before a slot changes. Once a second thread calls, every call evaluates its own output before it
leaves. One output may still be unevaluated when the second thread comes: the first thread evaluates
it at its next call, and the second thread waits for that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PATIENCE_SECONDS = 2.0
_POLL_SECONDS = 0.002


class ThreadGuard:
    """Knows which threads call one model's layers.

    Args:
        flush: evaluates everything that the calling thread has built through the layers.

    Attributes:
        shared: more than one thread calls.
    """

    def __init__(self, flush: Callable[[], None] = lambda: None) -> None:
        self._flush = flush
        self._first: int | None = None
        self._seen = 0.0  # when the first thread called last
        self.shared = False
        self._in_step: Callable[[], bool] = lambda: False
        self._flushed = False
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Note that this thread is about to use slots.

        A thread that is not the first waits until the first one has flushed, as long as that one
        lives and calls, or called within `_PATIENCE_SECONDS`. After that it is not in a pass, and
        the output that it left is either evaluated or found not to be (`Bank.flush_readers`
        raises).

        Returns:
            Whether this thread must evaluate its output.
        """
        me = threading.get_ident()
        if me == self._first:
            self._seen = time.perf_counter()
            if self.shared and not self._flushed and not self._in_step():
                self._flush()
                self._flushed = True
            return self.shared
        with self._lock:
            if self._first is None:
                self._first, self._seen = me, time.perf_counter()
                return False
        self.shared = True
        while not self._flushed and self._first_is_busy():
            time.sleep(_POLL_SECONDS)
        self._flushed = True
        return True

    def exempt_steps(self, in_step: Callable[[], bool]) -> None:
        """Let the first thread not flush within a run-ahead step; others wait for its end.

        Args:
            in_step: is the first thread in one?
        """
        self._in_step = in_step

    def _first_is_busy(self) -> bool:
        recent = self._in_step() or time.perf_counter() - self._seen < _PATIENCE_SECONDS
        return recent and any(t.ident == self._first for t in threading.enumerate())
