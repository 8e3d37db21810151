"""Who is told of what happens while recordings run; several may run at a time."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Listener = TypeVar("Listener")


class Listeners(Generic[Listener]):
    """Functions to be called.

    Attributes:
        now: those at present, for whoever calls them: without a lock, one that leaves meanwhile
            may be told once more.
    """

    def __init__(self) -> None:
        self.now: tuple[Listener, ...] = ()
        self._lock = threading.Lock()

    def add(self, listener: Listener) -> None:
        """Tell this one too."""
        with self._lock:
            self.now = (*self.now, listener)

    def remove(self, listener: Listener) -> None:
        """Do not tell it any more; nothing happens if it is not told."""
        with self._lock:
            self.now = tuple(x for x in self.now if x != listener)
