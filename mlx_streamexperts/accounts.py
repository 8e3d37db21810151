"""What the streamed models of this process hold together: one memory promise covers them all.

Kept here because no single stream knows of the others: the sum that a new model's budget starts
from, and MLX's limit of freed buffers, which is one for the process.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from .stream import ExpertStream

_living: dict[int, ExpertStream] = {}  # of models that have not been collected
_limits: dict[int, int] = {}  # bytes of freed buffers that each open stream allows
_before = 0  # the limit while none is open
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


def limit_freed(expert_stream: ExpertStream, nbytes: int) -> None:
    """Let MLX keep no more freed buffers than that, or than another open stream allows."""
    global _before
    with _lock:
        first = not _limits
        _limits[id(expert_stream)] = nbytes
        old = mx.set_cache_limit(max(_limits.values()))
        if first:
            _before = old


def unlimit_freed(expert_stream: ExpertStream) -> None:
    """Undo `limit_freed`."""
    with _lock:
        if _limits.pop(id(expert_stream), None) is not None:
            mx.set_cache_limit(max(_limits.values(), default=_before))
