"""What the streamed models of this process hold together: one memory promise covers them all.

Kept here because no single stream knows of the others: the sum that a new model's budget starts
from, and MLX's limit of freed buffers, which is one for the process.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from .stream import ExpertStream

_living: dict[int, ExpertStream] = {}  # of models that have not been collected
_lock = threading.RLock()  # a collected model may close its stream in the middle of anything


def enter(expert_stream: ExpertStream) -> None:
    """Its model lives from now on."""
    _living[id(expert_stream)] = expert_stream


def leave(expert_stream: ExpertStream) -> None:
    """Its model has been collected."""
    _living.pop(id(expert_stream), None)


def alive(expert_stream: ExpertStream) -> bool:
    """Is its model still in memory?"""
    return id(expert_stream) in _living


def held() -> int:
    """Bytes that streamed models hold, those that nobody uses any more included."""
    if _living:
        gc.collect()  # a model that nobody can reach may be waiting for it
    return sum(s.held_bytes() for s in list(_living.values()))


class Limit:
    """One of MLX's limits, of which a process has one: the most that an open stream asks for.

    Args:
        set_limit: sets it and returns what it was.
    """

    def __init__(self, set_limit: Callable[[int], int]) -> None:
        self._set = set_limit
        self._asked: dict[int, int] = {}  # bytes by stream
        self._before = 0  # the limit while none is open

    def ask(self, expert_stream: ExpertStream, nbytes: int) -> None:
        """A stream asks for so many bytes, instead of what it asked for before."""
        with _lock:
            first = not self._asked
            self._asked[id(expert_stream)] = nbytes
            old = self._set(max(self._asked.values()))
            if first:
                self._before = old

    def leave(self, expert_stream: ExpertStream) -> None:
        """A stream is closed: it asks for nothing any more."""
        with _lock:
            if self._asked.pop(id(expert_stream), None) is not None:
                self._set(max(self._asked.values(), default=self._before))


FREED = Limit(lambda nbytes: mx.set_cache_limit(nbytes))
"""Freed buffers that MLX keeps for reuse."""

UNFINISHED = Limit(lambda nbytes: mx.set_memory_limit(nbytes))
"""Memory above which MLX lets operations end before it begins others (transforms.cpp).

Operations under way hold their results: without it, a prompt's pass was seen to take 1.6 times the
memory that its operations need one after the other.
"""
