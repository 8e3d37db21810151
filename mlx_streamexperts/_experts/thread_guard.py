"""Which threads call a model: a graph can be evaluated only by the thread that built it.

One thread may leave a layer's output unevaluated when it leaves the layer: whoever calls next, the
same thread, evaluates it before a slot changes. From the second thread on every call evaluates its
own output before it leaves. Between the two lies what the first thread had left behind when the
second one came: the first evaluates it when it calls next, which the second one waits for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PATIENCE_SECONDS = 2.0
_LOOK_SECONDS = 0.002


class Callers:
    """The threads that call one model's layers.

    Args:
        catch_up: evaluates whatever the calling thread has built through the layers.

    Attributes:
        shared: more than one does.
        stepping: the first one is in a step that runs ahead.
    """

    def __init__(self, catch_up: Callable[[], None] = lambda: None) -> None:
        self._catch_up = catch_up
        self._first: int | None = None
        self._seen = 0.0  # when the first one called last
        self.shared = self.stepping = False
        self._caught_up = False
        self._lock = threading.Lock()

    def note(self) -> bool:
        """This thread is about to use slots; returns whether it must evaluate its output.

        A thread that is not the first waits until the first has caught up, as long as that one
        lives and calls, or has called within `_PATIENCE_SECONDS`. After that it is not in a pass,
        and what it left is either evaluated or found not to be (`Bank.flush_readers` raises).
        """
        me = threading.get_ident()
        if me == self._first:
            self._seen = time.perf_counter()
            if self.shared and not self._caught_up and not self.stepping:
                self._catch_up()
                self._caught_up = True
            return self.shared
        with self._lock:
            if self._first is None:
                self._first, self._seen = me, time.perf_counter()
                return False
        self.shared = True
        while not self._caught_up and self._busy():
            time.sleep(_LOOK_SECONDS)
        self._caught_up = True
        return True

    def _busy(self) -> bool:
        recent = self.stepping or time.perf_counter() - self._seen < _PATIENCE_SECONDS
        return recent and any(t.ident == self._first for t in threading.enumerate())
