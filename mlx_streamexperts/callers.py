"""Which threads call a model: a graph can be evaluated only by the thread that built it.

One thread may leave a layer's output unevaluated when it leaves the layer: whoever calls next, the
same thread, evaluates it before a slot changes. From the second thread on every call evaluates its
own output before it leaves. Between the two lies what the first thread had left behind when the
second one came: that is waited for.
"""

from __future__ import annotations

import threading

_PATIENCE_SECONDS = 2.0


class Callers:
    """The threads that call one model's layers.

    Attributes:
        shared: more than one does.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self.shared = False
        self._caught_up = threading.Event()
        self._lock = threading.Lock()

    def note(self) -> bool:
        """This thread is about to use slots; returns whether it must evaluate its output.

        A thread that is not the first waits, once, until the first has evaluated what it left, or
        for `_PATIENCE_SECONDS`: then the first one is not in a pass, and what it left is either
        evaluated or found not to be (`Bank.settle` raises).
        """
        me = threading.get_ident()
        if me == self._first:
            return self.shared
        with self._lock:
            if self._first is None:
                self._first = me
                return False
        self.shared = True
        if not self._caught_up.is_set():
            if any(t.ident == self._first for t in threading.enumerate()):  # it lives
                self._caught_up.wait(_PATIENCE_SECONDS)
            self._caught_up.set()
        return True

    def evaluated(self) -> None:
        """This thread has evaluated its output, and with it all of its pass so far."""
        if threading.get_ident() == self._first:
            self._caught_up.set()
