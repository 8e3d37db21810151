"""Lists of functions to call when something happens; recordings add and remove themselves."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Listener = TypeVar("Listener")


class Listeners(Generic[Listener]):
    """Functions to call.

    Attributes:
        now: the present ones. Callers take no lock, so a function may be called once more after it
            was removed.
    """

    def __init__(self) -> None:
        self.now: tuple[Listener, ...] = ()
        self._lock = threading.Lock()

    def add(self, listener: Listener) -> None:
        """Call this function from now on."""
        with self._lock:
            self.now = (*self.now, listener)

    def remove(self, listener: Listener) -> None:
        """Stop calling this function, if it is called."""
        with self._lock:
            self.now = tuple(x for x in self.now if x != listener)
